"""Measure a model: what it took up, what it kept, and how far it moved."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from corpus import FORMS, TINY, Corpus, one_a_document
from probes import answers_exactly, load_probes, read_jsonl
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.evaluation import Probe, choice_scores, kl_to_reference

Record = dict[str, Any]
SKILLS = ("add", "repeat", "reverse", "count", "capitals")
GROUPS = ("old facts", *SKILLS, "reading")


def uptake(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: dict[str, list[Probe]],
    wrong: Sequence[int] = (),
) -> Record:
    """Measure by form how often a fact is the likeliest of its 8 choices, and its mean negative log-likelihood a token.

    Args:
        wrong: the choice that each probe's document gives as well; how often that is the likeliest is "wrong".
    """
    result: Record = {}
    for form in FORMS:
        scores = choice_scores(model, tokenizer, probes[form])
        own = [s[probe.answer] for s, probe in zip(scores, probes[form], strict=True)]
        result[form] = {
            "accuracy": fmean(max(s) == score for s, score in zip(scores, own, strict=True)),
            "nll": -fmean(own),
        }
        if wrong:
            result[form]["wrong"] = fmean(max(s) == s[choice] for s, choice in zip(scores, wrong, strict=True))
    return result


class Retention:
    """Measure what an updated model can still do of what the initial one could.

    An item is kept if greedy decoding writes its answer out exactly, end of text included. The groups are the old
    facts, each skill, and reading: questions about documents that no run trains on.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, unread: Corpus) -> None:
        self.initial_model, self.tokenizer = model, tokenizer
        skills = read_jsonl(TINY / "skills.jsonl")
        self.items = [("old facts", probe) for probe in load_probes(TINY / "old_facts.jsonl")]
        self.items += zip((record["skill"] for record in skills), load_probes(TINY / "skills.jsonl"), strict=True)
        self.items += [("reading", probe) for probe in one_a_document(unread, "asked")]
        self.initially_right = self._right(model)

    def measure(self, model: PreTrainedModel) -> Record:
        """Return by group: accuracy, the number of items, and how many were lost and gained since the initial model."""
        right = self._right(model)
        result: Record = {}
        for group in GROUPS:
            own = [number for number, (name, _) in enumerate(self.items) if name == group]
            before, after = [self.initially_right[i] for i in own], [right[i] for i in own]
            result[group] = {
                "accuracy": fmean(after),
                "items": len(own),
                "lost": sum(b and not a for b, a in zip(before, after, strict=True)),
                "gained": sum(a and not b for b, a in zip(before, after, strict=True)),
            }
        return result

    def kl(self, model: PreTrainedModel) -> float:
        """Measure KL(initial model || model) on a third of the items with contexts and answers, in nats a token."""
        texts = [probe.context + probe.prompt + probe.choices[probe.answer] for _, probe in self.items[::3]]
        return kl_to_reference(model, self.initial_model, self.tokenizer, texts)

    def _right(self, model: PreTrainedModel) -> list[bool]:
        return [answers_exactly(model, self.tokenizer, probe) for _, probe in self.items]
