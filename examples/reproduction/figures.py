"""Compute the figures of runs by name, and the frontier between what was learned and what was lost."""

from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean
from typing import Any

from cells import Cell, Row
from corpus import FORMS
from measures import GROUPS, SKILLS
from results import Initial, Results

CATEGORIES = {"old facts": ("old facts",), "skills": SKILLS, "reading": ("reading",)}
TOLERANCE = 10.0  # points lost, up to which the area under the frontier is taken
ALLOWED = 5.0  # points lost in any category by the learning rate that a method is shown with


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Return what the page shows of a run that did not break down, by name; shares in percent."""
    uptake, kept = run["uptake"], run["kept"]
    result = {form: 100 * uptake[form]["accuracy"] for form in FORMS}
    result |= {f"NLL {form}": uptake[form]["nll"] for form in FORMS}
    result |= {f"{group} lost": kept[group]["lost"] for group in GROUPS}
    result["gained"] = sum(kept[group]["gained"] for group in GROUPS)
    result |= {skill: 100 * kept[skill]["accuracy"] for skill in SKILLS}
    result |= shares_kept(kept)
    for category, groups in CATEGORIES.items():
        losses = [(kept[group]["lost"] - kept[group]["gained"]) / kept[group]["items"] for group in groups]
        result[f"points of {category}"] = 100 * fmean(losses)
    result["points lost"] = fmean(result[f"points of {category}"] for category in CATEGORIES)
    result |= {f"KL {text}": value for text, value in run["kl"].items()} | run["compute"]
    result |= {f"{form}, false": 100 * uptake[form]["wrong"] for form in FORMS if "wrong" in uptake[form]}
    if "uptake of the first" in run:
        result["asked, first documents"] = 100 * run["uptake of the first"]["asked"]["accuracy"]
    return result


def shares_kept(kept: dict[str, Any]) -> dict[str, float]:
    """Compute what percentage of each category's items is right, and the mean, "kept"; all skills weigh the same."""
    shares = {
        category: 100 * fmean(kept[group]["accuracy"] for group in groups) for category, groups in CATEGORIES.items()
    }
    return shares | {"kept": fmean(shares.values())}


def finished(cells: Iterable[Cell], results: Results) -> list[dict[str, float]]:
    """Return the figures of the runs that did not break down."""
    return [figures(run) for cell in cells if "failed" not in (run := results[cell])]


def area_under_frontier(points: Iterable[tuple[float, float]], start: float) -> float:
    """Compute the best uptake to be had for at most L points lost, averaged over L from 0 to 10, in percent.

    Args:
        points: (points lost, uptake in percent), one a learning rate.
        start: uptake of the initial model, which is to be had for nothing.
    """
    area, best, reached = 0.0, start, 0.0
    for lost, uptake in sorted((max(lost, 0.0), uptake) for lost, uptake in points):
        if lost >= TOLERANCE:
            break
        area += best * (lost - reached)
        best, reached = max(best, uptake), lost
    return (area + best * (TOLERANCE - reached)) / TOLERANCE


def areas(row: Row, results: Results, form: str = "asked") -> dict[int, float]:
    """Compute the area under a method's frontier, by seed, with uptake in one form of words."""
    result = {}
    for seed in dict.fromkeys(cell.seed for cell in row.cells):
        cells = [cell for cell in row.cells if cell.seed == seed]
        initial = results[Initial.of(cells[0])]
        points = [(run["points lost"], run[form]) for run in finished(cells, results)]
        result[seed] = area_under_frontier(points, 100 * initial["closed_book"][form]["accuracy"])
    return result


def kl_at(row: Row, results: Results, level: float) -> list[float]:
    """Return the KL on other text at which `level` percent of the new facts, asked, are first right, for each seed.

    Seeds that never get there are left out. The runs of a seed in order of rate, after the initial model, are joined by
    straight lines.
    """
    result = []
    for seed in dict.fromkeys(cell.seed for cell in row.cells):
        cells = sorted((cell for cell in row.cells if cell.seed == seed), key=lambda cell: cell.learning_rate)
        initial = results[Initial.of(cells[0])]["closed_book"]["asked"]["accuracy"]
        points = [(100 * initial, 0.0)] + [(run["asked"], run["KL other text"]) for run in finished(cells, results)]
        for (uptake, kl), (next_uptake, next_kl) in pairwise(points):
            if next_uptake >= level:
                result.append(kl + (level - uptake) / (next_uptake - uptake) * (next_kl - kl))
                break
    return result


def rates(row: Row) -> list[float]:
    return sorted({cell.learning_rate for cell in row.cells})


def at_rate(row: Row, rate: float) -> list[Cell]:
    """Return a row's runs with one learning rate, one a seed."""
    return [cell for cell in row.cells if cell.learning_rate == rate]


def best_rate(row: Row, results: Results) -> float | None:
    """Choose the learning rate with the largest mean uptake of those that lose at most 5 points in every category.

    Points are averaged over the seeds. None: every rate loses more, or breaks down on a seed.
    """
    allowed: dict[float, float] = {}
    for rate in rates(row):
        cells = at_rate(row, rate)
        runs = finished(cells, results)
        losses = [fmean(run[f"points of {category}"] for run in runs) for category in CATEGORIES] if runs else [100.0]
        if len(runs) == len(cells) and max(losses) <= ALLOWED:
            allowed[rate] = fmean(run["asked"] for run in runs)
    return max(allowed, key=allowed.__getitem__, default=None)


def bracketed(row: Row, results: Results) -> bool:
    """Tell whether the best learning rate has others on both sides, and the largest loses TOLERANCE points or more."""
    tried = rates(row)
    runs = finished(at_rate(row, tried[-1]), results)
    reached = not runs or fmean(run["points lost"] for run in runs) >= TOLERANCE
    return reached and best_rate(row, results) in tried[1:-1]
