"""Train a model by every method of grid.yaml, measure each, and append a line a run to results.

    python examples/real_model/run.py --data_folder runs/real_model --results runs/real_model/runs.jsonl [--size quick]

It goes on where it was interrupted: a run that has its line is not made again. A trained model is measured and deleted.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "reproduction"))

import top_k
from results import one_writer
from rows import INITIAL, add, environment, made_of, open_results, read

from disc_train.config import parse_arguments
from disc_train.evaluation.config import parse_arguments as parse_evaluation
from disc_train.evaluation.run import run as evaluate
from disc_train.objectives.methods import WITH_TEACHER
from disc_train.run import fill_cache
from disc_train.run import run as train

Record = dict[str, Any]
GRID = Path(__file__).resolve().parent / "grid.yaml"
BESIDE = ("top_k", "update_share", "initial_teacher")  # no flags of disc-train: `make` and `update` see to them


def cells(grid: Record, size: str) -> Iterator[Record]:
    """Yield what identifies each run, the middle of the rates first: most is known early."""
    settings = grid["sizes"][size]
    seeds, rates, methods = settings["seeds"], settings["learning_rates"], settings.get("methods", grid["methods"])
    middle_first = sorted(rates, key=lambda rate: abs(rates.index(rate) - len(rates) // 2))
    for seed in seeds:
        for rate in middle_first:
            for name in methods:
                cell = {"name": name, "size": size, "learning_rate": float(rate), "seed": seed}
                alone = settings.get("one_at_a_time") and not settings.get("one_after_another")
                yield from ({**cell, "entity": entity} for entity in range(settings["entities"])) if alone else (cell,)
    for name in () if settings.get("one_at_a_time") else [name for name in grid["controls"] if name not in methods]:
        for rate in grid["controls"][name].get("learning_rates", middle_first[:1]):
            yield {"name": name, "size": size, "learning_rate": float(rate), "seed": seeds[0]}


def training_flags(grid: Record, cell: Record, data: Path, model: str) -> list[str]:
    """Return what disc-train is called with, but for --output_dir."""
    settings = grid["common"] | grid["sizes"][cell["size"]].get("common", {}) | settings_of(grid, cell["name"])
    for name in ("learning_rates", *BESIDE):
        settings.pop(name, None)
    method = settings["method"]
    texts = settings.get("train_file", "records" if method == "cd" else "documents")
    settings |= {"learning_rate": cell["learning_rate"], "seed": cell["seed"]}
    settings |= {"model_name_or_path": model, "train_file": data / f"{texts}.jsonl"}
    if "replay_file" in settings:
        settings["replay_file"] = data / f"{settings['replay_file']}.jsonl"
    if method not in ("disc", "cd"):
        settings.pop("signal_examples")
    # A control is one run of one epoch: a cache that no other run reads costs more than its teacher.
    if method in WITH_TEACHER and cell["name"] in grid["methods"] and grid["sizes"][cell["size"]]["cache"]:
        folder = f"{method}-{settings.get('temperature', 1.0)}"  # a summary is of one temperature
        settings |= {"teacher": "cache", "teacher_cache": data / "cache" / cell["size"] / folder}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


def recorded(grid: Record, cell: Record, data: Path, model: str) -> list[str]:
    """Return the settings that a row of the results is known by: flags, and what is no flag of disc-train."""
    settings = settings_of(grid, cell["name"])
    return training_flags(grid, cell, data, model) + [f"{name}={settings[name]}" for name in BESIDE if name in settings]


def settings_of(grid: Record, name: str) -> Record:
    return (grid["methods"] | grid["controls"] | grid["of_one_size"])[name]


def measure(model: str, reference: str | None, probes: Sequence[Path], texts: Path | None, folder: Path) -> Record:
    """Measure a model with disc-eval; return every item's figures, without its words.

    Args:
        reference: that from which the KL on the texts is taken.

    Returns:
        "probes": by group, of every probe by its id: the right choice's negative log-likelihood (NLL) in nats a token,
        whether it is the likeliest, its NLL among the choices, in nats: of the softmax over their scores; and that
        NLL less its mean in other entities' probes with the same choices, if there are. "in context" the same behind
        the definition. "texts": by id: tokens predicted, sums of loss and KL in nats.
    """
    flags = [f"--model_name_or_path={model}", f"--output_dir={folder}", "--max_new_tokens=0"]
    flags += ["--dtype=float32"]  # in the 16 bits that a GPU would take rounding is as large as some differences
    flags += [f"--texts_file={texts}"] if texts else []
    flags += [f"--reference_name_or_path={reference}"] if texts and reference else []
    shutil.rmtree(folder, ignore_errors=True)
    evaluate(parse_evaluation([*flags, "--probes_file", *map(str, probes)]))
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    choices = {probe["id"]: probe["choices"] for path in probes for probe in read(path)}
    result: Record = {"probes": {}, "in context": {}}
    for condition, name in (("closed book", "probes"), ("in context", "in context")):
        asked = [each for each in found["probes"] if each["condition"] == condition and each["scores"] is not None]
        for each, alike in zip(asked, beside_others(asked, choices), strict=True):
            among = torch.tensor(each["scores"]).log_softmax(0)[0].item()
            values = [-each["scores"][0], int(each["right_choice"]), -among, *alike]
            items = result[name].setdefault(each["group"], {})
            items[each["id"].removeprefix(each["group"] + " ")] = [round(value, 4) for value in values]
    result["texts"] = {
        each["id"]: [each["predicted"], round(each["loss"], 3), round(each["kl"] or 0.0, 4)] for each in found["texts"]
    }
    return result


def beside_others(asked: Sequence[Record], choices: Record) -> Iterator[list[float]]:
    """Yield each right choice's NLL among the choices less its mean in other entities' probes with the same choices.

    What makes a choice likelier after any words at all, which is no knowledge, is in both. Nothing without such probes.
    """
    logprobs = []
    for each in asked:
        names = choices[each["id"]]
        logprobs.append(dict(zip(names, torch.tensor(each["scores"]).log_softmax(0).tolist(), strict=True)))
    alike: dict[tuple[str, frozenset[str]], list[int]] = {}
    for place, each in enumerate(asked):
        alike.setdefault((each["group"], frozenset(logprobs[place])), []).append(place)

    def entity(place: int) -> str:
        return asked[place]["id"].removeprefix(asked[place]["group"] + " ").partition(" ")[0]

    for place, each in enumerate(asked):
        right = choices[each["id"]][0]
        family = alike[each["group"], frozenset(logprobs[place])]
        others = [logprobs[other][right] for other in family if entity(other) != entity(place)]
        yield [sum(others) / len(others) - logprobs[place][right]] if others else []


def above_chance(outcome: Record, probes: Sequence[Record]) -> list[str]:
    """Name the tasks on which a model is right more often than by chance, by more than two standard errors."""
    chosen = []
    for task in dict.fromkeys(probe["group"] for probe in probes):
        chances = [1 / len(probe["choices"]) for probe in probes if probe["group"] == task]
        error = math.sqrt(sum(chance * (1 - chance) for chance in chances)) / len(chances)
        right = [values[1] for values in outcome["probes"][task].values()]
        if sum(right) / len(right) > sum(chances) / len(chances) + 2 * error:
            chosen.append(task)
    return chosen


def measure_initial(data: Path, model: str, size: str) -> Record:
    """Measure the initial model, and find the tasks on which it is above chance."""
    begin = time.monotonic()
    paths = [data / f"{name}.jsonl" for name in ("ceiling", "kept", "tasks") if (data / f"{name}.jsonl").stat().st_size]
    outcome = measure(model, None, paths, data / "python.jsonl", data / "evaluation" / INITIAL)
    probes = read(data / "tasks.jsonl")
    chosen = above_chance(outcome, probes)
    return {"name": INITIAL, "size": size, **outcome, "tasks": chosen, "seconds": round(time.monotonic() - begin)}


def make(grid: Record, cell: Record, data: Path, model: str) -> Record:
    """Make one run: train, measure, delete; return its line of the results."""
    folder = data / "trained" / cell["size"] / " ".join(map(str, cell.values()))
    size, settings = grid["sizes"][cell["size"]], settings_of(grid, cell["name"])
    alone = "entity" in cell
    entities = [cell["entity"]] if alone else range(size["entities"]) if size.get("one_after_another") else []
    updates = [data / "entities" / str(entity) for entity in entities] or [data]
    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    asked = ("uptake", "kept") if alone else ("uptake", "kept", "tasks_kept")
    paths = [path for name in asked if (path := (updates[0] if alone else data) / f"{name}.jsonl").stat().st_size]
    try:
        with top_k.distilling(settings.get("top_k", 0), "cut"):
            trained = update(grid, cell, updates, model, folder)
        if "update_share" in settings:
            keep_part(trained, model, settings["update_share"])
        end = time.monotonic()
        outcome = measure(str(trained), model, paths, None if alone else data / "python.jsonl", folder / "evaluation")
    except FloatingPointError:  # of a loss, or after the last step of what the model says
        return cell | {"failed": True, "seconds": round(time.monotonic() - begin)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if alone:  # others were asked to tell what became of the same choices
        uptake = {group: found for group, found in outcome["probes"].items() if group != "specificity"}
        outcome["probes"] |= {group: of_entity(found, cell["entity"]) for group, found in uptake.items()}
    seconds = {"training": round(end - begin), "measuring": round(time.monotonic() - end)}
    flags = [flag.replace(f"{data}/", "") for flag in recorded(grid, cell, data, model)]
    return cell | outcome | {"seconds": seconds, "flags": flags}


def update(grid: Record, cell: Record, updates: Sequence[Path], model: str, folder: Path) -> Path:
    """Train on the texts of one folder after another, each time from what the last one left; return where that is."""
    teacher = [f"--teacher_name_or_path={model}"] if settings_of(grid, cell["name"]).get("initial_teacher") else []
    for number, texts in enumerate(updates):
        trained = folder / str(number)
        train(*parse_arguments([*training_flags(grid, cell, texts, model), *teacher, f"--output_dir={trained}"]))
        if number:
            shutil.rmtree(model)
        model = str(trained)
    return trained


def of_entity(probes: Record, entity: int) -> Record:
    """Return the probes of one entity, by their numbers."""
    return {number: values for number, values in probes.items() if number.partition(" ")[0] == str(entity)}


@torch.no_grad()
def keep_part(folder: Path, initial: str, share: float) -> None:
    """Replace the trained weights in a folder by initial + share * (trained - initial) (WiSE-FT, arXiv 2109.01903)."""
    before, model = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (initial, folder))
    for weight, start in zip(model.parameters(), before.parameters(), strict=True):
        weight.lerp_(start, 1 - share)
    model.save_pretrained(folder)


def is_made(rows: Sequence[Record], cell: Record, flags: Sequence[str], data: Path) -> bool:
    """Return whether a run has its row; raise ValueError if that was made with other settings than the grid has now."""
    row = next((row for row in rows if cell.items() <= row.items()), None)
    made, now = (
        # Wherever the model is, and whether the teacher's cache was there.
        {flag.replace(f"{data}/", "") for flag in each if not flag.startswith(("--model_name", "--teacher"))}
        for each in ((row or {}).get("flags", flags), flags)
    )
    if made != now:
        changed = ", ".join(sorted(made ^ now))
        raise ValueError(f"--results: expected {cell['name']} made with the settings of grid.yaml, got other {changed}")
    return row is not None


def run(grid: Record, data: Path, model: str, results: Path, size: str, jobs: int, only: Sequence[str] = ()) -> None:
    """Make the runs that have no line in `results` yet, `jobs` at a time.

    Raises:
        ValueError: a name that is none of the size, a folder that was prepared for another, or results of another model
            or of other data.
    """
    names = only or grid["sizes"][size].get("methods", grid["methods"])
    wanted = [cell for cell in cells(grid, size) if cell["name"] in names]
    if unknown := set(only) - {cell["name"] for cell in wanted}:
        known = dict.fromkeys(cell["name"] for cell in cells(grid, size))
        raise ValueError(f"--only: expected of the size {size} some of {[*known]}, got {sorted(unknown)}")
    ours = made_of(data, model, grid["sizes"][size])
    made = open_results(results, size, ours)
    common = ours | environment()
    initial = next((row for row in made if row["name"] == INITIAL), None)
    if initial is None:
        initial = measure_initial(data, model, size)
        add(results, initial | common)
    tasks = [probe for probe in read(data / "tasks.jsonl") if probe["group"] in initial["tasks"]]
    (data / "tasks_kept.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in tasks), encoding="utf-8")
    missing = [cell for cell in wanted if not is_made(made, cell, recorded(grid, cell, data, model), data)]
    # Filled here, one after another: a cache is written by one process at a time.
    caches: dict[str, list[str]] = {}
    for cell in missing:
        flags = training_flags(grid, cell, data, model)
        folder = next((flag for flag in flags if flag.startswith("--teacher_cache=")), None)
        if folder:
            caches.setdefault(folder, flags)
    for flags in caches.values():
        fill_cache(*parse_arguments(flags, "disc-cache"))
    work = partial(make, grid, data=data, model=model)
    if jobs == 1:
        for cell in missing:
            add(results, work(cell) | common)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            for done in as_completed([pool.submit(work, cell) for cell in missing]):
                add(results, done.result() | common)
        except BaseException:
            for job in multiprocessing.active_children():
                job.terminate()
            pool.shutdown(cancel_futures=True)  # else all that is left would be made, and thrown away
            raise


def main() -> None:
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_folder", type=Path, required=True, help="What prepare.py wrote.")
    parser.add_argument("--results", type=Path, default=Path("runs/real_model/runs.jsonl"))
    parser.add_argument("--model", help="Any causal model's name or folder; by default the data folder's.")
    parser.add_argument(
        "--size", default="default", choices=grid["sizes"], help="That with which the folder was prepared."
    )
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, of one thread each on a CPU.")
    parser.add_argument(
        "--only", nargs="*", default=[], help="Names of methods or controls; by default the methods of the size."
    )
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {asked.jobs}")
    torch.set_num_threads(1)
    model = asked.model or str(asked.data_folder / "model")
    try:
        with one_writer(asked.data_folder):
            run(grid, asked.data_folder, model, asked.results, asked.size, asked.jobs, asked.only)
    except (ValueError, OSError, BrokenExecutor) as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the jobs would be left behind
    main()
