"""Continuations of prompts, a padded batch at a time, by transformers' own `generate`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a continuation: those the model's generation config names, and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def continue_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    processors: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """The likeliest next tokens after each prompt, one after another, up to one of `ends` and with it.

    Whatever the model's generation config says of sampling and penalties is left aside.

    Args:
        prompts: token ids, none empty; the shorter ones are padded on the left.
        processors: change the logits before the likeliest token is taken: with noise, it is a sample.

    Raises:
        FloatingPointError: logits that are NaN.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    read = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_RefuseNaN(), *(processors or ())]),
    )
    return [_until_end(row, set(ends)) for row in read[:, longest:].tolist()]


class _RefuseNaN(LogitsProcessor):
    """The likeliest of NaN is some token too."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FloatingPointError(
                "expected logits that are numbers from the model, got NaN: its weights are damaged, or its dtype has"
                " too small a range"
            )
        return scores


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((position + 1 for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
