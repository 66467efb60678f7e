"""Continue prompts by transformers' `generate`, in batches that do not change them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from disc_train.generation.batches import MAX_BATCH_TOKENS, batches_by_length, pad
from disc_train.progress import show_progress


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    *,
    done: int = 0,
    processors: Callable[[Sequence[int]], LogitsProcessorList] | None = None,
    what: str = "texts generated",
) -> Iterator[tuple[int, str, bool]]:
    """Yield the index of each prompt, the text of its likeliest continuation, and whether the model ended it.

    The longest prompts come first. What the model's generation config says of sampling and penalties is left aside.

    Args:
        prompts: token ids, none of them empty.
        done: how many prompts to leave out, of prompts in order of falling length. Their batches are still made: what
            stands beside a prompt may change how its logits are rounded.
        processors: of a batch, given by its indices: change the logits before the likeliest token is taken.
        what: how progress begins: the items and what happens to them.

    Raises:
        FloatingPointError: logits that are NaN.
    """
    if not prompts:
        return
    ends = end_tokens(model, tokenizer)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    batching = find_batching(model)
    if batching == "alone":
        batch_size = 1
    made = batches_by_length(lengths, batch_size, max_batch_tokens, equal=batching == "equal lengths")
    batches = [batch for batch in made if batch[-1] >= done]
    for batch in show_progress(batches, sum(map(len, batches)), what):
        changed = processors(batch) if processors else LogitsProcessorList()
        continuations = continue_batch(model, [prompts[index] for index in batch], max_new_tokens, ends, changed)
        for index, ids in zip(batch, continuations, strict=True):
            if index >= done:
                yield index, tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in ends  # type: ignore[misc]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a continuation: those that the model's generation config or the tokenizer names."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def find_batching(model: PreTrainedModel) -> Literal["padded", "equal lengths", "alone"]:
    """Find out which kind of batch gives a prompt the same logits as reading it alone.

    Padding gets into the convolutions of RecurrentGemma and into the blocks of keys that DeepSeek-V4 compresses,
    whatever the mask says. RWKV of transformers mixes the texts of a batch (5.23: `extract_key_value` adds [B, 1, D]
    and [B, D]).
    """
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    longer = [(7 * number + 1) % len(embeddings) for number in range(24)]
    prompt = longer[:17]
    alone = _first_logits(model, [prompt])
    # Rounding differs with a batch's shape; models that fail were off by 3 % and more.
    tolerance = 0.02 if torch.finfo(model.dtype).bits < 32 else 1e-3
    others: dict[Literal["padded", "equal lengths"], list[int]] = {"padded": longer, "equal lengths": longer[-17:]}
    for batching, other in others.items():
        if (_first_logits(model, [prompt, other]) - alone).norm() <= tolerance * alone.norm():
            return batching
    return "alone"


def _first_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the first prompt's logits of two new tokens [2, V], of which the first is chosen for it."""
    ids, mask = pad(prompts, "left", model.device)
    found = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=_greedy(2, ends=[0], output_logits=True, return_dict_in_generate=True),
        prefix_allowed_tokens_fn=lambda row, read: [1],  # no end
    )
    return torch.stack([logits[0].float() for logits in found.logits])


def _greedy(max_new_tokens: int, ends: Sequence[int], **options: Any) -> GenerationConfig:
    """Return settings without sampling and penalties; what is not set here would be taken from the model's own."""
    return GenerationConfig(
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
        **options,
    )


@torch.no_grad()
def continue_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, taken one after another, up to and with one of `ends`."""
    ids, mask = pad(prompts, "left", model.device)
    read = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=_greedy(max_new_tokens, ends),
        logits_processor=LogitsProcessorList([_RefuseNaN(), *processors]),
    )
    continuations: list[list[int]] = read[:, ids.shape[1] :].tolist()
    stops = [next((i + 1 for i, token in enumerate(row) if token in ends), None) for row in continuations]
    return [row[:stop] for row, stop in zip(continuations, stops, strict=True)]


class _RefuseNaN(LogitsProcessor):
    """Raise FloatingPointError at logits that are NaN, of which argmax would still pick one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FloatingPointError(
                "expected logits that are numbers from the model, got NaN: its weights are damaged, or its dtype has"
                " too small a range"
            )
        return scores
