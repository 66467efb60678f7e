"""Write the page of a file of results: a table a size, paired differences, a plot; discussion.md is put at its end.

python examples/real_model/page.py examples/real_model/results/runs.jsonl
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

from rows import INITIAL, MADE_OF, read_results

Record = dict[str, Any]
LEARNED = "Entity Inferences, NLL beside others"
LOST = ("Python's documentation, KL", "specificity, NLL")
TOLERANCE = 0.2  # nats a token by which what is lost may rise: up to there the area under the frontier is taken
RESAMPLES = 2000
RUN = ("name", "learning_rate", "seed")
Items = dict[str, tuple[float, float]]  # by entity or text: (sum, weight); a mean is sum of sums over sum of weights
UPTAKE = ("Entity Inferences", "false answer", "ECBD", "release notes")
PLOTTED = ("Entity Inferences, % right", "ECBD, NLL", "release notes, % right")
# Name -> what its values are multiplied by where they are shown.
MEASURES = {
    "Entity Inferences, % right": 100.0,
    "Entity Inferences, NLL beside others": 1.0,
    "Entity Inferences, NLL among labels": 1.0,
    "Entity Inferences, NLL": 1.0,
    "false answer, % given": 100.0,
    "false answer, NLL beside others": 1.0,
    "false answer, NLL among labels": 1.0,
    "ECBD, NLL": 1.0,
    "release notes, % right": 100.0,
    "release notes, NLL among labels": 1.0,
    "release notes, NLL": 1.0,
    "specificity, NLL": 1.0,
    "BIG-bench, % right": 100.0,
    "Python's documentation, loss": 1.0,
    "Python's documentation, KL": 1.0,
}


# Of a probe. The last two are not in rows made at first, the last not in probes whose choices no other entity's has.
COLUMNS = {"NLL": 0, "% right": 1, "% given": 1, "NLL among labels": 2, "NLL beside others": 3}


def items(row: Record, measure: str, condition: str = "probes") -> Items:
    """Return what a measure is the mean of. Probes of one entity are one item: they are not independent."""
    group, _, what = measure.rpartition(", ")
    if group.startswith("Python"):
        column = {"loss": 1, "KL": 2}[what]
        return {name: (values[column], values[0]) for name, values in row["texts"].items()}
    found: dict[str, list[float]] = {}
    probes = row.get(condition, {})
    names = [group] if group != "BIG-bench" else [name for name in probes if name not in (*UPTAKE, "specificity")]
    for name in names:
        for number, values in probes.get(name, {}).items():
            entity = number.partition(" ")[0] if name in UPTAKE else f"{name} {number}"
            if COLUMNS[what] < len(values):
                found.setdefault(entity, []).append(values[COLUMNS[what]])
    return {entity: (sum(values), len(values)) for entity, values in found.items()}


def joined(rows: Sequence[Record]) -> list[Record]:
    """Make one row of those that differ in the entity that was taught alone: all uptake, the mean of what is kept."""
    runs: dict[tuple[Any, ...], list[Record]] = {}
    for number, row in enumerate(rows):
        alone = "entity" in row and not row.get("failed")
        runs.setdefault(run_of(row) if alone else (number,), []).append(row)
    return [_joined(each) | {"entities": len(each)} if len(run) > 1 else each[0] for run, each in runs.items()]


def _joined(rows: Sequence[Record]) -> Record:
    """Average the probes and texts of a run's rows; raise ValueError if they were not measured alike."""
    try:
        if any(row["probes"].keys() != rows[0]["probes"].keys() for row in rows):
            raise ValueError
        probes = {group: means([row["probes"][group] for row in rows]) for group in rows[0]["probes"]}
    except ValueError:
        raise ValueError(f"expected rows of {title(rows[0])} that were measured alike, got others") from None
    seconds = {part: sum(row["seconds"][part] for row in rows) for part in rows[0]["seconds"]}
    return rows[0] | {"probes": probes, "texts": means([row["texts"] for row in rows]), "seconds": seconds}


def means(of_rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return the mean of the figures of each probe or text over the rows that have it."""
    found: dict[str, list[Sequence[float]]] = {}
    for each in of_rows:
        for number, values in each.items():
            found.setdefault(number, []).append(values)
    return {number: np.mean(values, axis=0).tolist() for number, values in found.items()}


def mean(found: Mapping[str, tuple[float, float]]) -> float:
    return sum(part for part, _ in found.values()) / sum(whole for _, whole in found.values())


def difference(found: Items, base: Items) -> tuple[float, float]:
    """Return the mean of `found` less that of `base` over the items of both, and its standard error, NaN of one item.

    Raises:
        ValueError: an item is not of as many probes or tokens in both.
    """
    if unlike := [name for name in found if name in base and found[name][1] != base[name][1]]:
        weights = f"{base[unlike[0]][1]} and {found[unlike[0]][1]}"
        raise ValueError(f"expected rows of the same probes and texts, got {weights} probes or tokens of {unlike[0]!r}")
    pairs = [(found[name][0] - base[name][0], found[name][1]) for name in found if name in base]
    whole = sum(weight for _, weight in pairs)
    change = sum(part for part, _ in pairs) / whole
    squares = sum((part - change * weight) ** 2 for part, weight in pairs)
    return change, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / whole if len(pairs) > 1 else math.nan


def areas(initial: Record, runs: Sequence[Record], measure: str) -> np.ndarray:
    """Return the area under the frontier of one method's runs: of all entities first, then of entities drawn anew.

    Uptake is by how many nats the right label of Entity Inferences became likelier among all labels, over what the same
    label became in other entities' probes; what is lost is by how much `measure` rose, at least 0. The frontier goes in
    straight lines from the initial model (0, 0) through the runs by what they lost, and never falls; its mean over a
    loss of 0 to TOLERANCE is the area. Beyond the last run it is flat.
    """
    base, before = items(initial, LEARNED), mean(items(initial, measure))
    # Of two runs that lost as much that comes first which learned more.
    points = [(max(0.0, mean(items(row, measure)) - before), difference(items(row, LEARNED), base)[0]) for row in runs]
    order = sorted(range(len(runs)), key=points.__getitem__)
    lost = [0.0, *(points[place][0] for place in order)]
    after = [items(runs[place], LEARNED) for place in order]
    gained = np.array([[base[name][0] - found[name][0] for name in base] for found in after]).reshape(-1, len(base))
    weights = np.array([weight for _, weight in base.values()])
    draws = np.random.default_rng(0).multinomial(len(base), np.full(len(base), 1 / len(base)), RESAMPLES)
    draws = np.vstack([np.ones(len(base)), draws])
    uptake = np.column_stack([np.zeros(len(draws)), draws @ gained.T / (draws @ weights)[:, None]])
    best = np.maximum.accumulate(uptake, axis=1)
    # The corners of the frontier are its runs, so the trapezoids between them are exact.
    places = np.unique([0.0, *(each for each in lost if each < TOLERANCE), TOLERANCE])
    return np.array([np.trapezoid(np.interp(places, lost, each), places) for each in best]) / TOLERANCE


def whole_runs(rows: Sequence[Record], entities: int) -> list[Record]:
    """Leave out runs that lack an entity yet; a run in which the update with one entity broke down is one that did."""
    broken = {run_of(row) for row in rows if row.get("failed")}
    unbroken = [row for row in rows if run_of(row) not in broken and row.get("entities", entities) == entities]
    return unbroken + [{"failed": True, **dict(zip(RUN, run, strict=True))} for run in broken]


def run_of(row: Record) -> tuple[Any, ...]:
    return tuple(row[name] for name in RUN)


def frontiers(initial: Record, rows: Sequence[Record], measure: str) -> str:
    """Write the area of each method of several rates, the mean over its seeds, and its paired difference to DiSC's.

    `measure` is that of what is lost. A seed counts once it has all rates of the method; a run that broke down adds no
    point.
    """
    found: dict[str, tuple[str, dict[int, np.ndarray]]] = {}
    rows = whole_runs(rows, len(items(initial, "Entity Inferences, % right")))
    for name in dict.fromkeys(row["name"] for row in rows if not row.get("failed")):
        of_seed: dict[int, list[Record]] = {}
        for row in (row for row in rows if row["name"] == name):
            of_seed.setdefault(row["seed"], []).append(row)
        rates = sorted({row["learning_rate"] for runs in of_seed.values() for row in runs})
        whole = {seed: runs for seed, runs in of_seed.items() if len(runs) == len(rates) > 1}
        if whole:
            finished = {seed: [run for run in runs if not run.get("failed")] for seed, runs in whole.items()}
            found[name] = (
                ", ".join(f"{rate:g}" for rate in rates),
                {seed: areas(initial, runs, measure) for seed, runs in finished.items()},
            )
    lines = []
    for name, (tried, by_seed) in found.items():
        values = np.mean([*by_seed.values()], axis=0)
        of_disc = found["DiSC"][1] if "DiSC" in found and name != "DiSC" else {}
        less = [area - of_disc[seed] for seed, area in by_seed.items() if seed in of_disc]
        difference_to = with_error((change := np.mean(less, axis=0))[0], change[1:].std()) if less else ""
        spread = f", {np.std([each[0] for each in by_seed.values()], ddof=1):.3f}" if len(by_seed) > 1 else ""
        area = f"{values[0]:.3f} ± {values[1:].std():.3f}"
        lines.append((values[0], [name, area, difference_to, tried, f"{len(by_seed)}{spread}"]))
    header = ["method", "area", "less DiSC's", "rates", "seeds, deviation over them"]
    return table(header, [line for _, line in sorted(lines, key=lambda pair: -pair[0])]) if lines else ""


def shown(value: float, scale: float, sign: str = "") -> str:
    return f"{scale * value:{sign}.1f}" if scale > 1 else f"{value:{sign}.3f}"


def compared(row: Record, base: Record, measure: str) -> str:
    """Return the paired difference of two runs, or nothing where they share no items."""
    found, other = items(row, measure), items(base, measure)
    if not found.keys() & other.keys():
        return ""
    return with_error(*difference(found, other), MEASURES[measure])


def with_error(change: float, error: float, scale: float = 1.0) -> str:
    """Return a difference and its standard error, in bold where it is larger than two of them."""
    text = f"{shown(change, scale, '+')} ± {shown(error, scale)}"
    return f"**{text}**" if abs(change) > 2 * error else text


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def title(row: Record) -> str:
    alone = f", entity {row['entity']}" if "entity" in row else ""
    entities = f", {row['entities']} entities" if "entities" in row else alone
    return f"{row['name']}, {row['learning_rate']:g}" + (f", seed {row['seed']}" if row["seed"] else "") + entities


def section(rows: Sequence[Record], size: str, alone: Sequence[Record] = ()) -> str:
    """Write the means of one size, the differences from the initial model, from split finetuning and from others.

    `alone` has the runs in which each entity was taught by itself that was taught after others here.
    """
    initial = next(row for row in rows if row["name"] == INITIAL)
    asked_of_all = (*UPTAKE, "specificity", *initial["tasks"])  # only the initial model was asked all tasks
    initial = initial | {"probes": {name: found for name, found in initial["probes"].items() if name in asked_of_all}}
    runs = [row for row in rows if row["name"] != INITIAL and not row.get("failed")]
    measures = [measure for measure in MEASURES if any(items(row, measure) for row in (initial, *runs))]

    def line(row: Record, condition: str = "probes") -> list[str]:
        found = {m: {} if row is initial and m.endswith("KL") else items(row, m, condition) for m in measures}
        return [shown(mean(each), MEASURES[m]) if each else "" for m, each in found.items()]

    lines = [["initial model", *line(initial), ""]]
    behind = "document" if items(initial, "release notes, NLL") else "definition"
    lines.append([f"... behind the {behind}", *line(initial | {"texts": {}}, "in context"), ""])
    for row in runs:
        lines.append([title(row), *line(row), f"{row['seconds']['training']} + {row['seconds']['measuring']}"])
    parts = [f"## {size}"]
    measured = [row for row in rows if row["name"] != INITIAL and (row.get("failed") or items(row, LEARNED))]
    # Texts are not read where every entity is taught by itself.
    lost = next(measure for measure in LOST if all(items(row, measure) for row in runs))
    if items(initial, LEARNED) and (of_methods := frontiers(initial, measured, lost)):
        errors = "± over entities, of what was learned alone"
        parts.append(f"Area under the frontier of {LEARNED}, up to a rise of {TOLERANCE} in {lost} ({errors}):")
        parts.append(of_methods)
    parts.append(table(["", *measures, "s, training + measuring"], lines))
    parts += [
        "From the initial model, paired:",
        table(
            ["", *measures], [[title(row), *(compared(row, initial, measure) for measure in measures)] for row in runs]
        ),
    ]
    parts += against(runs, runs, measures, "split finetuning", split_finetuning)
    parts += against(runs, runs, measures, "the same from true texts", lambda name: name.removesuffix(", false texts"))
    # There the other entities were not taught: what is beside them is another measure.
    kept = [measure for measure in measures if measure != LEARNED]
    parts += against(
        runs, alone, kept, "each entity's update alone", lambda name: name.removesuffix(", initial teacher")
    )
    parts += over_seeds(runs, measures)
    failed = [title(row) for row in rows if row.get("failed")]
    parts += [f"Broke down: {', '.join(failed)}."] if failed else []
    if initial["tasks"]:
        parts.append(f"BIG-bench: {', '.join(initial['tasks'])}.")
    return "\n\n".join(parts)


def split_finetuning(name: str) -> str:
    """Name the run of split finetuning that a run is compared with: from false texts as it is, or from true ones."""
    return "split finetuning" + ", false texts" * name.endswith(", false texts")


def against(
    runs: Sequence[Record], bases: Sequence[Record], measures: Sequence[str], what: str, base_of: Callable[[str], str]
) -> list[str]:
    """Write the paired differences of runs from others of the same rate, seed and entities, if there are any."""

    def kind(row: Record) -> tuple[Any, ...]:
        return (*run_of(row)[1:], items(row, "Entity Inferences, % right").keys())

    lines = []
    for row in runs:
        alike = (each for each in bases if each["name"] == base_of(row["name"]) and kind(each) == kind(row))
        base = next(alike, row)
        if base is not row:
            lines.append([title(row), *(compared(row, base, measure) for measure in measures)])
    return [f"From {what} at the same rate, paired:", table(["", *measures], lines)] if lines else []


def over_seeds(runs: Sequence[Record], measures: Sequence[str]) -> list[str]:
    """Write, of each method and rate with several seeds, mean and standard deviation, and the differences of means.

    Means are compared over the seeds that both methods have.
    """
    seeds: dict[tuple[Any, ...], dict[int, Record]] = {}
    for row in sorted(runs, key=lambda row: row["seed"]):
        entities = frozenset(items(row, "Entity Inferences, % right"))
        seeds.setdefault((row["name"], row["learning_rate"], entities), {})[row["seed"]] = row
    lines, differences = [], []
    for (name, *alike), by_seed in seeds.items():
        bases = seeds.get((split_finetuning(name), *alike), {})
        both = [seed for seed in by_seed if seed in bases and bases[seed] is not by_seed[seed]]
        if len(both) > 1:
            row, base = (_joined([each[seed] for seed in both]) for each in (by_seed, bases))
            differences.append([_over(row, both), *(compared(row, base, measure) for measure in measures)])
        if len(by_seed) > 1:
            spread = []
            for measure in measures:
                values = [mean(found) for row in by_seed.values() if (found := items(row, measure))]
                moments = (np.mean(values), np.std(values, ddof=1)) if len(values) > 1 else ()
                spread.append(" ± ".join(shown(moment, MEASURES[measure]) for moment in moments))
            lines.append([_over(next(iter(by_seed.values())), by_seed), *spread])
    parts = ["Mean ± standard deviation over seeds:", table(["", *measures], lines)] if lines else []
    if differences:
        parts += ["From split finetuning, means over seeds, paired:", table(["", *measures], differences)]
    return parts


def _over(row: Record, seeds: Iterable[int]) -> str:
    return title(row | {"seed": ", ".join(map(str, seeds))})


def plot(rows: Sequence[Record], path: Path) -> None:
    """Draw uptake against what moved: a line a method, a point a learning rate."""
    initial = next(row for row in rows if row["name"] == INITIAL)
    figure = Figure(figsize=(12, 5), layout="constrained")
    uptake = [measure for measure in PLOTTED if items(initial, measure)]
    made = [row for row in rows if not row.get("failed")]
    lost = [measure for measure in LOST if all(items(row, measure) for row in made)]
    places = zip(figure.subplots(1, len(lost), squeeze=False)[0], lost, cycle(uptake), strict=False)
    for axes, across, up in places:
        for name in dict.fromkeys(row["name"] for row in made):
            runs = [row for row in made if row["name"] == name]
            runs.sort(key=lambda row: row.get("learning_rate", 0))
            x, y = ([MEASURES[m] * mean(items(row, m)) for row in runs] for m in (across, up))
            line = "-" * (len({row.get("seed") for row in runs}) == 1)
            axes.plot(x, y, "k*" if name == INITIAL else f"o{line}", label=name)
        if inside := items(initial, up, "in context"):
            behind = "document" if up.startswith("release") else "definition"
            ceiling = MEASURES[up] * mean(inside)
            axes.axhline(ceiling, color="grey", linestyle=":", label=f"initial model behind the {behind}")
        axes.set_xlabel(f"{across} (nats a token)")
        axes.set_ylabel(up if up.endswith("right") else f"{up} (nats a token; less is more learned)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=100)


def write_page(results: Path) -> None:
    """Write results.md and a plot a size beside the file of results.

    Raises:
        ValueError: there is nothing of the initial model, which all others are compared with.
    """
    if not results.is_file():
        raise ValueError(f"{results}: expected a file of results, got none")
    rows = read_results(results)
    sizes = dict.fromkeys(row["size"] for row in rows)
    if not rows or {row["size"] for row in rows if row["name"] == INITIAL} != sizes.keys():
        raise ValueError(f"{results}: expected results with a row of the initial model in each size, got {[*sizes]}")
    environments = dict.fromkeys(
        f"{row['machine']}, Python {row['python']}, torch {row['torch']}, transformers {row['transformers']}"
        for row in rows
    )
    parts = [
        "# A real model on real texts",
        f"Written by `page.py` from `{results.name}`: {'; '.join(environments)}. `protocol.md` says what was fixed"
        " before the runs."
        " NLL, loss and KL in nats a token, of which less is better; 'beside others': less its mean after the"
        " words of other entities, so below 0 where the right label is likelier after its own. ± is the standard"
        " error of the paired difference over entities, texts or items; bold: the difference is more than two of"
        " them. It does not hold the spread over seeds.",
    ]
    for size in sizes:
        of_size = joined([row for row in rows if row["size"] == size])
        plot(of_size, results.parent / f"{size}.png")
        made_of = next(([row[name] for name in MADE_OF] for row in of_size if MADE_OF[0] in row), None)
        alone = [row for row in rows if row["size"] == "one_entity" and not row.get("failed")]
        alone = joined([row for row in alone if [row.get(name) for name in MADE_OF] == made_of])
        parts.append(section(of_size, size, alone if size == "one_after_another" else ()))
        parts.append(f"![uptake against what moved]({size}.png)")
    discussion = results.parent / "discussion.md"
    parts += [discussion.read_text(encoding="utf-8").strip()] if discussion.exists() else []
    (results.parent / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    try:
        write_page(parser.parse_args().results)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
