"""The new documents of a seed and the probes about them, and the documents that reading is tested on."""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))

import world
from probes import END

from disc_train.data.documents import Document
from disc_train.evaluation import Probe

TINY = Path(world.__file__).parent
FORMS = ("stated", "reworded", "asked")


@dataclass(frozen=True)
class Corpus:
    """Documents, and a probe of every fact of theirs in three forms of words.

    Attributes:
        entities: one a document, which states all its facts.
        probes: by form: "stated", a sentence of the document up to the fact; "reworded", one in words that the document
            does not use; "asked", the question in the model's chat form.
    """

    documents: list[Document]
    entities: list[world.Entity]
    probes: dict[str, list[Probe]]

    @property
    def facts_a_document(self) -> int:
        return len(self.probes["asked"]) // len(self.documents)


def new_corpus(seed: int | str, documents: int, said: int, met: set[str]) -> Corpus:
    """Documents about entities whose names are not in `met`.

    Args:
        said: how often each fact is stated, every time in other words, fewer than there are words for it. Entities,
            probes and the words of the first statements are the same whatever it is.
    """
    rng, taken, kinds = random.Random(f"entities {seed}"), set(met), list(world.KINDS)
    corpus = Corpus([], [], {form: [] for form in FORMS})
    for number in range(documents):
        entity = world.make_entity(kinds[number % len(kinds)], rng, taken)
        taken.add(entity.name)
        attributes = world.KINDS[entity.kind]
        # The first words stand in every document, the last in none.
        words = {key: rng.sample(attributes[key].statements, world.STATEMENTS_PER_FACT) for key in entity.facts}
        for key in entity.facts:
            asked = world.fact_probe(entity, key, rng)
            corpus.probes["stated"].append(_cloze(entity, words[key][0], asked))
            corpus.probes["reworded"].append(_cloze(entity, words[key][-1], asked))
            corpus.probes["asked"].append(_question(asked))
        introduction = world.sentence(rng.choice(world.INTRODUCTIONS), name=entity.name)
        sentences = world.statements(entity, words, said, random.Random(f"sentences {seed} {number}"))
        corpus.documents.append(Document(f"{entity.kind} {number}", " ".join([introduction, *sentences])))
        corpus.entities.append(entity)
    return corpus


def one_a_document(corpus: Corpus, form: str) -> list[Probe]:
    """Probes of one fact of every document, each behind the document."""
    between = "\n\n" if form == "asked" else ""
    count = corpus.facts_a_document
    return [
        replace(corpus.probes[form][number * count + number % count], context=document.text + between)
        for number, document in enumerate(corpus.documents)
    ]


def _question(asked: dict[str, Any]) -> Probe:
    return _probe(asked, f"User: {asked['question']}\nAssistant:", END)


def _cloze(entity: world.Entity, template: str, asked: dict[str, Any]) -> Probe:
    """A statement up to the fact, as it stands behind another sentence."""
    return _probe(asked, " " + world.sentence(template.partition(" {value}")[0], name=entity.name), "")


def _probe(asked: dict[str, Any], prompt: str, end: str) -> Probe:
    choices = asked["choices"]
    return Probe(prompt, [f" {choice}{end}" for choice in choices], choices.index(asked["answer"]))
