"""Draw the trade-off: what was learned against what was kept, and the areas under the frontiers."""

from pathlib import Path
from statistics import fmean, stdev

from cells import Grid, Row
from figures import areas, at_rate, finished, rates, shares_kept
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Initial, Results

MARKERS = "osD^vPX<>*"


def write_plot(grid: Grid, results: Results, path: Path) -> None:
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    curves, near, bars = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for axes, deviations in ((curves, True), (near, False)):
        for number, row in enumerate(grid.methods):
            _curve(axes, row, results, f"C{number}", MARKERS[number % len(MARKERS)], deviations)
        _initial(axes, grid, results)
        axes.set_xlabel("kept: mean of old facts, skills and reading (%)")
    curves.set_xlim(left=max(75, curves.get_xlim()[0]))  # further left so much is lost that nothing is traded off
    curves.set_ylabel("new facts, asked without the document (%)")
    curves.set_title("A point a learning rate; bars: deviation over seeds", fontsize=10)
    near.set_xlim(95, 100.2)
    near.set_ylim(0, 90)
    near.set_title("The same where little is lost, without bars", fontsize=10)
    figure.legend(*curves.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=6)

    for number, row in enumerate(grid.methods):
        values = list(areas(row, results).values())
        bars.barh(number, fmean(values), color=f"C{number}", alpha=0.6)
        bars.plot(values, [number] * len(values), "k.", markersize=4)
    bars.set_yticks(range(len(grid.methods)), [row.name for row in grid.methods])
    bars.invert_yaxis()
    bars.set_title("Area under the frontier (%); a dot a seed", fontsize=10)
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, row: Row, results: Results, color: str, marker: str, deviations: bool) -> None:
    points = [runs for rate in rates(row) if (runs := finished(at_rate(row, rate), results))]
    x, y = ([fmean(run[name] for run in runs) for runs in points] for name in ("kept", "asked"))
    dx, dy = (
        [stdev([run[name] for run in runs]) if deviations and len(runs) > 1 else 0.0 for runs in points]
        for name in ("kept", "asked")
    )
    axes.errorbar(x, y, dy, dx, color=color, marker=marker, markersize=6, elinewidth=0.6, label=row.name)


def _initial(axes: Axes, grid: Grid, results: Results) -> None:
    tasks = {Initial.of(cell) for row in grid.methods for cell in row.cells}
    initial = [results[task] for task in sorted(tasks)]
    kept = fmean(shares_kept(each["kept"])["kept"] for each in initial)
    closed, ceiling = (
        fmean(100 * each[key]["asked"]["accuracy"] for each in initial) for key in ("closed_book", "in_context")
    )
    axes.plot(kept, closed, "k*", markersize=12, label="initial model")
    axes.axhline(ceiling, color="grey", linestyle=":", label="initial model, document in context")
