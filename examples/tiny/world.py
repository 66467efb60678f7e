"""Make up a small world of people, towns and ships: facts, documents that restate them, questions, and a few skills.

Every sentence names its entity before it gives the value of a fact, so that a reader who knows the fact can complete
the sentence without what came before. Run as a script, this writes the committed data files, always the same ones:

    python examples/tiny/world.py --output_dir examples/tiny
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SEED = 2026
NUM_OLD_ENTITIES = 200
NUM_NEW_ENTITIES = 50
NUM_CHOICES = 8
STATEMENTS_PER_FACT = 5
PROBES_PER_SKILL = 20


@dataclass(frozen=True)
class Attribute:
    values: list[str]
    statements: list[str]
    questions: list[str]


@dataclass(frozen=True)
class Entity:
    kind: str
    name: str
    facts: dict[str, str]


VOCABULARY: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KINDS: dict[str, dict[str, Attribute]] = {
    kind: {key: Attribute(**fields) for key, fields in attributes.items()}
    for kind, attributes in VOCABULARY["kinds"].items()
}
SYLLABLES: list[str] = VOCABULARY["syllables"]
INTRODUCTIONS: list[str] = VOCABULARY["introductions"]
WORDS: list[str] = VOCABULARY["words"]
NUMBERS = ["one", "two", "three", "four"]


def invented_word(rng: random.Random, num_syllables: int) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(num_syllables)).capitalize()


def invented_name(kind: str, rng: random.Random) -> str:
    if kind == "person":
        return f"{invented_word(rng, 2)} {invented_word(rng, 2)}"
    if kind == "town":
        return f"{rng.choice(['Fort', 'Lake', 'Mount', 'Port'])} {invented_word(rng, 3)}"
    return f"the {invented_word(rng, 3)} {rng.choice(['Pearl', 'Queen', 'Star', 'Swan'])}"


def make_entity(kind: str, rng: random.Random, taken: set[str]) -> Entity:
    """Make up an entity with a name that is not in `taken`, and a value for every attribute of its kind."""
    name = invented_name(kind, rng)
    while name in taken:
        name = invented_name(kind, rng)
    return Entity(kind, name, {key: rng.choice(attribute.values) for key, attribute in KINDS[kind].items()})


def known_entities() -> tuple[list[Entity], list[Entity]]:
    """Return the old entities, which pretraining teaches, and the new ones, which only `documents.jsonl` is about."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    kinds = list(KINDS)
    entities = []
    for i in range(NUM_OLD_ENTITIES + NUM_NEW_ENTITIES):
        entities.append(make_entity(kinds[i % len(kinds)], rng, taken))
        taken.add(entities[-1].name)
    return entities[:NUM_OLD_ENTITIES], entities[NUM_OLD_ENTITIES:]


def sentence(template: str, **fields: str) -> str:
    text = template.format(**fields)
    return text[0].upper() + text[1:]


def document_statements(entity: Entity, rng: random.Random, keys: Sequence[str], repeats: int) -> list[str]:
    """State the facts under `keys` once, then again in other words, `repeats` times in all."""
    attributes = KINDS[entity.kind]
    templates = {key: rng.sample(attributes[key].statements, repeats) for key in keys}
    return statements(entity, templates, repeats, rng)


def statements(entity: Entity, templates: dict[str, list[str]], repeats: int, rng: random.Random) -> list[str]:
    """State all facts of `templates` in their first words, in any order, then in their next, `repeats` times in all."""
    return [
        sentence(templates[key][i], name=entity.name, value=entity.facts[key])
        for i in range(repeats)
        for key in rng.sample(list(templates), len(templates))
    ]


def document_text(entity: Entity, rng: random.Random, repeats: int) -> str:
    introduction = sentence(rng.choice(INTRODUCTIONS), name=entity.name)
    return " ".join([introduction, *document_statements(entity, rng, list(entity.facts), repeats)])


def question(entity: Entity, key: str, rng: random.Random) -> str:
    return sentence(rng.choice(KINDS[entity.kind][key].questions), name=entity.name)


def fact_probe(entity: Entity, key: str, rng: random.Random) -> dict[str, Any]:
    answer = entity.facts[key]
    others = [value for value in KINDS[entity.kind][key].values if value != answer]
    return probe(question(entity, key, rng), [answer, *rng.sample(others, NUM_CHOICES - 1)], rng)


def probe(question: str, choices: list[str], rng: random.Random) -> dict[str, Any]:
    """Make a probe of a question and its choices in any order; the first of them is the answer."""
    return {"question": question, "choices": rng.sample(choices, len(choices)), "answer": choices[0]}


# A skill makes a question and choices, of which the first is the answer and the others are near misses.


def skill_add(rng: random.Random) -> tuple[str, list[str]]:
    a, b = rng.randrange(1, 7), rng.randrange(1, 7)
    others = [str(value) for value in range(2, 13) if value != a + b]
    return f"What is {a} plus {b}?", [str(a + b), *rng.sample(others, NUM_CHOICES - 1)]


def skill_repeat(rng: random.Random) -> tuple[str, list[str]]:
    (word, other), n = rng.sample(WORDS, 2), rng.randrange(2, 5)
    counts = [n, *(count for count in range(1, 6) if count != n)]
    choices = [" ".join([word] * count) for count in counts]
    return f"Say the word {word} {NUMBERS[n - 1]} times.", [*choices, " ".join([other] * n)]


def skill_reverse(rng: random.Random) -> tuple[str, list[str]]:
    words = rng.sample(WORDS, 3)
    orders = itertools.permutations(reversed(words))  # the first is the answer
    return f"Reverse the words {' '.join(words)}.", [" ".join(order) for order in orders]


def skill_count(rng: random.Random) -> tuple[str, list[str]]:
    word, n = rng.choice(WORDS), rng.randrange(1, 5)
    choices = sorted(NUMBERS, key=lambda number: number != NUMBERS[n - 1])
    return f"Count the words {' '.join([word] * n)}.", choices


def skill_capitals(rng: random.Random) -> tuple[str, list[str]]:
    word, *others = rng.sample(WORDS, NUM_CHOICES - 1)
    return f"Write the word {word} in capitals.", [word.upper(), word, *(other.upper() for other in others)]


SKILLS = {
    "add": skill_add,
    "repeat": skill_repeat,
    "reverse": skill_reverse,
    "count": skill_count,
    "capitals": skill_capitals,
}


def skill_probes(name: str, rng: random.Random) -> list[dict[str, Any]]:
    probes: dict[str, dict[str, Any]] = {}
    while len(probes) < PROBES_PER_SKILL:
        text, choices = SKILLS[name](rng)
        probes[text] = {"skill": name, **probe(text, choices, rng)}
    return list(probes.values())


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    output_dir = parser.parse_args().output_dir
    rng = random.Random(SEED + 1)
    old, new = known_entities()
    ids = [f"{entity.kind}-{i:02d}" for i, entity in enumerate(new)]
    documents = [
        {"id": i, "text": document_text(entity, rng, STATEMENTS_PER_FACT)} for i, entity in zip(ids, new, strict=True)
    ]
    write_jsonl(output_dir / "documents.jsonl", documents)
    new_facts = [
        {"document": i, **fact_probe(entity, key, rng)}
        for i, entity in zip(ids, new, strict=True)
        for key in entity.facts
    ]
    write_jsonl(output_dir / "new_facts.jsonl", new_facts)
    old_facts = [fact_probe(entity, rng.choice(list(entity.facts)), rng) for entity in old]
    write_jsonl(output_dir / "old_facts.jsonl", old_facts)
    write_jsonl(output_dir / "skills.jsonl", (probe for name in SKILLS for probe in skill_probes(name, rng)))


if __name__ == "__main__":
    main()
