"""Let the initial model itself write about a document: the texts of "rephrase" and of CD-base.

The tiny model follows no instruction to paraphrase, but it goes on from a document's end and the entity's name with
another statement, as likely as not in other words. That is how it is asked.
"""

from collections.abc import Sequence

import torch
import world
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 24  # no statement of the world has as many after its name


@torch.no_grad()
def own_sentences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: str, name: str, count: int
) -> list[str]:
    """Sample up to `count` different sentences about an entity, at temperature 1, behind the document and the name.

    They are the first of twice as many samples. The draws are torch's: `torch.manual_seed` decides them.
    """
    name = name[0].upper() + name[1:]
    prompt = torch.tensor([tokenizer.encode(f"{document} {name}", add_special_tokens=False)], device=model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        top_k=0,
        num_return_sequences=2 * count,
        eos_token_id=[*tokenizer.encode("."), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    mask = torch.ones_like(prompt)
    read = model.generate(input_ids=prompt, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    sentences = [f"{name}{tokenizer.decode(ids, skip_special_tokens=True)}" for ids in read[:, prompt.shape[1] :]]
    return list(dict.fromkeys(sentences))[:count]


def share_true(sentences: Sequence[tuple[str, world.Entity]]) -> float:
    """Return the share of sentences that state a fact of their entity, in any words."""
    return sum(sentence in _true_statements(entity) for sentence, entity in sentences) / len(sentences)


def _true_statements(entity: world.Entity) -> set[str]:
    templates = {key: attribute.statements for key, attribute in world.KINDS[entity.kind].items()}
    return {
        world.sentence(template, name=entity.name, value=entity.facts[key])
        for key in entity.facts
        for template in templates[key]
    }
