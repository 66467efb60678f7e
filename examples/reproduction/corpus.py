"""Make the new documents of a seed and the probes about them, and the documents that reading is tested on."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny"))

import world
from probes import END

from disc_train.data.documents import Document
from disc_train.evaluation import Probe

TINY = Path(world.__file__).parent
T = TypeVar("T")
FORMS = ("stated", "reworded", "asked")


@dataclass(frozen=True)
class Corpus:
    """Hold documents, and a probe of each of their facts in three forms of words.

    Attributes:
        entities: one a document, which states all its facts.
        probes: by form: "stated", a sentence of the document up to the fact; "reworded", one in words that the document
            does not use; "asked", the question in the model's chat form.
        wrong: where documents contradict themselves, the false value of every fact, as the number of a choice of its
            probes.
    """

    documents: list[Document]
    entities: list[world.Entity]
    probes: dict[str, list[Probe]]
    wrong: list[int]

    @property
    def facts_a_document(self) -> int:
        return len(self.probes["asked"]) // len(self.documents)


def new_corpus(seed: int | str, documents: int, said: int, met: set[str], wrong: bool = False) -> Corpus:
    """Make documents about entities whose names are not in `met`, and the probes of their facts.

    Args:
        said: how often each fact is stated, every time in other words, fewer than there are words for it. Entities,
            probes and the words of the first statements are the same whatever it is.
        wrong: one statement of every fact, drawn at random, gives another of the choices.
    """
    rng, taken, kinds = random.Random(f"entities {seed}"), set(met), list(world.KINDS)
    corpus = Corpus([], [], {form: [] for form in FORMS}, [])
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
        if wrong:
            _contradict(sentences, corpus, entity, words, said, random.Random(f"wrong {seed} {number}"))
        corpus.documents.append(Document(f"{entity.kind} {number}", " ".join([introduction, *sentences])))
        corpus.entities.append(entity)
    return corpus


def _contradict(
    sentences: list[str],
    corpus: Corpus,
    entity: world.Entity,
    words: dict[str, list[str]],
    said: int,
    rng: random.Random,
) -> None:
    """Give one statement of every fact a false value, which is noted in the corpus."""
    for key, probe in zip(entity.facts, corpus.probes["asked"][-len(entity.facts) :], strict=True):
        corpus.wrong.append(rng.choice([i for i in range(len(probe.choices)) if i != probe.answer]))
        value = probe.choices[corpus.wrong[-1]].removesuffix(END).strip()
        template = words[key][rng.randrange(said)]
        true = world.sentence(template, name=entity.name, value=entity.facts[key])
        sentences[sentences.index(true)] = world.sentence(template, name=entity.name, value=value)


def join(documents: Sequence[Document], number: int) -> list[Document]:
    """Join documents one after another, every `number` of them to one."""
    parts = [documents[start : start + number] for start in range(0, len(documents), number)]
    return [Document(part[0].name, " ".join(document.text for document in part)) for part in parts]


def one_a_document(corpus: Corpus, form: str, joined: int = 1) -> list[Probe]:
    """Return a probe of one fact of every entity, behind the document that tells of it."""
    between = "\n\n" if form == "asked" else ""
    documents = join(corpus.documents, joined)
    return [
        replace(probe, context=documents[number // joined].text + between)
        for number, probe in enumerate(one_of_each(corpus, corpus.probes[form]))
    ]


def one_of_each(corpus: Corpus, values: Sequence[T]) -> list[T]:
    """Choose one value for each entity, where `values` has one for each fact.

    It is the first entity's first, the second's second, and so on.
    """
    count = corpus.facts_a_document
    return [values[start + start // count % count] for start in range(0, len(values), count)]


def _question(asked: dict[str, Any]) -> Probe:
    return _probe(asked, f"User: {asked['question']}\nAssistant:", END)


def _cloze(entity: world.Entity, template: str, asked: dict[str, Any]) -> Probe:
    """Make a probe whose prompt is a statement up to the fact, as it stands behind another sentence."""
    return _probe(asked, " " + world.sentence(template.partition(" {value}")[0], name=entity.name), "")


def _probe(asked: dict[str, Any], prompt: str, end: str) -> Probe:
    choices = asked["choices"]
    return Probe(prompt, [f" {choice}{end}" for choice in choices], choices.index(asked["answer"]))
