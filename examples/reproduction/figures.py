"""Figures of results: what was lost, the frontier between what was learned and what was lost, and its area."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from cells import Cell, Row
from measures import SKILLS
from results import Initial, Results

Record = dict[str, Any]
CATEGORIES = {"old facts": ("old facts",), "skills": SKILLS, "reading": ("reading",)}
TOLERANCE = 20.0  # points lost, up to which the area under the frontier is taken
ALLOWED = 5.0  # points lost in any category by the rate a method is shown with


def share(kept: Record, category: str) -> float:
    """Percent of a category's items that are right; the skills weigh the same."""
    return 100 * fmean(kept[group]["accuracy"] for group in CATEGORIES[category])


def lost(kept: Record, category: str) -> float:
    """Points lost since the initial model: items lost less items gained."""
    return 100 * fmean(
        (kept[group]["lost"] - kept[group]["gained"]) / kept[group]["items"] for group in CATEGORIES[category]
    )


def mean_lost(kept: Record) -> float:
    return fmean(lost(kept, category) for category in CATEGORIES)


def learned(result: Record, form: str = "asked") -> float:
    """Percent of the new facts that are right without their document."""
    return 100 * result["uptake"][form]["accuracy"]


def area_under_frontier(points: Iterable[tuple[float, float]], start: float) -> float:
    """The best uptake that is to be had for at most L points lost, averaged over L from 0 to 20: percent.

    Args:
        points: (points lost, uptake in percent) of a method's runs, one a learning rate.
        start: uptake of the initial model, which is to be had for nothing.
    """
    area, best, reached = 0.0, start, 0.0
    for points_lost, uptake in sorted(points):
        if points_lost >= TOLERANCE:
            break
        area += best * (max(points_lost, 0.0) - reached)
        best, reached = max(best, uptake), max(points_lost, 0.0)
    return (area + best * (TOLERANCE - reached)) / TOLERANCE


def areas(row: Row, results: Results) -> dict[int, float]:
    """The area under the frontier of a method, by seed."""
    by_seed: dict[int, list[Cell]] = {}
    for cell in row.cells:
        by_seed.setdefault(cell.seed, []).append(cell)
    return {
        seed: area_under_frontier(
            [(mean_lost(r["kept"]), learned(r)) for r in finished(cells, results)],
            100 * results[Initial(seed, cells[0].documents, cells[0].said)]["closed_book"]["asked"]["accuracy"],
        )
        for seed, cells in by_seed.items()
    }


def finished(cells: Iterable[Cell], results: Results) -> list[Record]:
    """The results of the runs that did not break down."""
    return [result for cell in cells if "failed" not in (result := results[cell])]


def rates(row: Row) -> list[float]:
    return sorted({cell.learning_rate for cell in row.cells})


def at_rate(row: Row, rate: float) -> list[Cell]:
    """A row's runs with one learning rate: one a seed."""
    return [cell for cell in row.cells if cell.learning_rate == rate]


def best_rate(row: Row, results: Results) -> float | None:
    """The learning rate with the largest mean uptake of those that lose at most 5 points in each category, on average
    over the seeds; None if every rate loses more, or breaks down on a seed."""
    allowed: dict[float, float] = {}
    for rate in rates(row):
        cells = at_rate(row, rate)
        runs = finished(cells, results)
        if len(runs) == len(cells) and all(
            fmean(lost(run["kept"], category) for run in runs) <= ALLOWED for category in CATEGORIES
        ):
            allowed[rate] = fmean(learned(run) for run in runs)
    return max(allowed, key=allowed.__getitem__, default=None)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {format(stdev(values), form)}" if len(values) > 1 else ""
    return f"{format(fmean(values), form)}{deviation}" if values else "-"
