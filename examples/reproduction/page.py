"""Write the page of a grid's results, from its file of results alone; what discussion.md says is put at its end."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from cells import Cell, Control, Grid, Row
from corpus import FORMS
from figures import ALLOWED, CATEGORIES, TOLERANCE, areas, at_rate, best_rate, bracketed, finished, kl_at, rates
from measures import GROUPS, SKILLS
from results import Initial, Results

COST = ("steps", "student tokens", "teacher tokens", "seconds")
KL = ("KL new documents", "KL other text")
FRONTIER = (
    "Area: the best share of new facts, asked or reworded, to be had for at most L points lost, averaged over L from 0"
    f" to {TOLERANCE:.0f}; points lost are the mean of old facts, skills and reading. Rate: the learning rate with the"
    f" most new facts, asked, of those that lose at most {ALLOWED:.0f} points in each of the three; the columns after"
    " it are at that rate."
)

LEVELS = (40, 60)
PAIRED = (
    "The method's area less the column's, paired by seed: mean ± standard error, in bold where the mean is more than"
    " twice that. KL: from the initial model to the updated one, on other text, where that share of new facts is first"
    " right when asked (between rates along a straight line); in brackets, of how many seeds, where not all reach it."
)


def write_page(grid: Grid, results: Results, folder: Path) -> None:
    """Write results.md into a folder.

    Raises:
        ValueError: a result is missing.
    """
    discussion = folder / "discussion.md"
    text = page(grid, results, discussion.read_text(encoding="utf-8") if discussion.exists() else "")
    (folder / "results.md").write_text(text, encoding="utf-8")


def page(grid: Grid, results: Results, discussion: str = "") -> str:
    cells = list(grid.cells())
    broken = sum("failed" in results[cell] for cell in cells)
    sections = [
        "# New knowledge against old skills",
        f"{len(cells)} runs, {broken} of which broke down; {_environments(results)}. Mean ± standard deviation over"
        " seeds; shares in percent, KL and negative log-likelihood (NLL) in nats a token. The protocol,"
        " `examples/reproduction/protocol.md`, says what was fixed before the runs were made and what each figure is."
        " Written from `runs.jsonl` by `page.py`.",
        "![new facts against what was kept: a curve a method, a point a learning rate](tradeoff.png)",
        "## The initial model",
        _initial_table(grid, results),
        "## Each method's frontier",
        _frontier_table(grid, results),
        f"{FRONTIER} {_bracketing(grid, results)}",
        "## Paired differences, and KL at equal uptake",
        _paired_table(grid, results),
        PAIRED,
        "## At that learning rate",
        _table_at_best(grid, results, [f"NLL {form}" for form in FORMS] + list(KL) + list(COST)),
        "Of the items, counted one by one, lost in each group and gained in all:",
        _table_at_best(grid, results, [*(f"{group} lost" for group in GROUPS), "gained"]),
        "## Every learning rate",
        table(
            ["method", "rate", *FORMS, *CATEGORIES, *SKILLS, *KL],
            [line for row in grid.methods for line in _by_rate(row, results, [*FORMS, *CATEGORIES, *SKILLS, *KL])],
        ),
        "## Controls",
        *(_control(control, results) for control in grid.controls),
        discussion,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _environments(results: Results) -> str:
    return "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in results.environments)


def compared(grid: Grid, results: Results, others: Results) -> str:
    """Write the areas of all methods whose runs are in both beside those of other results."""
    lines = []
    for row in (row for row in grid.methods if all(cell in others for cell in row.cells)):
        ours, theirs = (list(areas(row, each).values()) for each in (results, others))
        lines.append(f"{row.name:22}{spread(ours):>14}   {spread(theirs)}")
    return "\n".join([f"{'area':22}{'here':>14}   {others.path}", *lines])


def _bracketing(grid: Grid, results: Results) -> str:
    beyond = [row.name for row in grid.methods if not bracketed(row, results)]
    if beyond:
        return f"Learning rates beyond those tried may be better for: {', '.join(beyond)}."
    return f"All rates tried bracket the best one and reach a loss of {TOLERANCE:.0f} points."


def _initial_table(grid: Grid, results: Results) -> str:
    cells = [cell for row in grid.methods for cell in row.cells]
    tasks = dict.fromkeys(Initial.of(cell) for cell in cells)
    initial = [results[task] for task in tasks]
    lines = [
        [name, *(spread([100 * each[key][form]["accuracy"] for each in initial]) for form in FORMS)]
        for name, key in (("new facts, closed book", "closed_book"), ("new facts, document in context", "in_context"))
    ]
    kept = ", ".join(f"{group} {100 * initial[0]['kept'][group]['accuracy']:.1f}" for group in GROUPS)
    true = spread([100 * each["own_sentences_true"] for each in initial])
    return (
        table(["", *FORMS], lines)
        + f"\n\nAnswered exactly: {kept}. Of what it writes about the documents itself (for rephrase and CD-base),"
        f" {true} % are true statements of their facts."
    )


def _frontier_table(grid: Grid, results: Results) -> str:
    columns = [*FORMS, *CATEGORIES]
    base = areas(grid.methods[0], results)
    lines = []
    for row in grid.methods:
        area = areas(row, results)
        less = "" if row is grid.methods[0] else spread([area[seed] - base[seed] for seed in area], "+.1f")
        reworded = list(areas(row, results, "reworded").values())
        line = [row.name, spread(list(area.values())), less, spread(reworded), *_at_best(row, results, columns)]
        lines.append(line)
    header = ["method", "area, asked", f"less {grid.methods[0].name}'s", "area, reworded", "rate"]
    return table([*header, *columns], lines)


def _paired_table(grid: Grid, results: Results) -> str:
    of_row = {row.name: areas(row, results) for row in grid.methods}
    lines = []
    for row in grid.methods:
        area, line = of_row[row.name], [row.name]
        for name, other in of_row.items():
            line.append("" if name == row.name else _difference([area[seed] - other[seed] for seed in area]))
        for level in LEVELS:
            values = kl_at(row, results, level)
            line.append(spread(values, ".3f") + (f" ({len(values)})" if 0 < len(values) < len(area) else ""))
        lines.append(line)
    return table(["method", *(f"less {name}" for name in of_row), *(f"KL at {level} %" for level in LEVELS)], lines)


def _difference(values: Sequence[float]) -> str:
    """Write mean and standard error of some differences, in bold where the protocol calls it a difference."""
    if len(values) < 2:
        return format(values[0], "+.1f")
    mean, error = fmean(values), stdev(values) / len(values) ** 0.5
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def _table_at_best(grid: Grid, results: Results, columns: Sequence[str]) -> str:
    lines = [[row.name, *_at_best(row, results, columns)] for row in grid.methods]
    return table(["method", "rate", *columns], lines)


def _at_best(row: Row, results: Results, columns: Sequence[str]) -> list[str]:
    """Write the best learning rate of a row, and the figures of its runs with it."""
    rate = best_rate(row, results)
    return ["none", *[""] * len(columns)] if rate is None else _line(at_rate(row, rate), results, columns)


def _by_rate(row: Row, results: Results, columns: Sequence[str]) -> list[list[str]]:
    return [[row.name, *_line(at_rate(row, rate), results, columns)] for rate in rates(row)]


def _line(cells: Sequence[Cell], results: Results, columns: Sequence[str]) -> list[str]:
    """Write the learning rate of some runs and the spread of their figures; one that no run has stays empty."""
    runs = finished(cells, results)
    if not runs:
        return [f"{cells[0].learning_rate:g}", "broke down", *[""] * (len(columns) - 1)]
    broken = f" ({len(cells) - len(runs)} broke down)" if len(runs) < len(cells) else ""
    values = [[run[column] for run in runs if column in run] for column in columns]
    formatted = [spread(value, _format(column)) for value, column in zip(values, columns, strict=True)]
    return [f"{cells[0].learning_rate:g}{broken}", *formatted]


def _control(control: Control, results: Results) -> str:
    columns = [*FORMS, *CATEGORIES, *KL]
    if any(cell.updates == 2 for row in control.rows for cell in row.cells):
        columns.insert(len(FORMS), "asked, first documents")
    if any(cell.wrong for row in control.rows for cell in row.cells):
        columns[len(FORMS) : len(FORMS)] = [f"{form}, false" for form in FORMS]
    lines = [line for row in (control.base, *control.rows) for line in _by_rate(row, results, columns)]
    return f"### {control.name}\n\n" + table(["", "rate", *columns], lines)


def _format(column: str) -> str:
    if column.startswith(("NLL", "KL")):
        return ".2f"
    return ",.0f" if column in ("steps", "student tokens", "teacher tokens") else ".1f"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return ""
    deviation = format(stdev(values), form.removeprefix("+")) if len(values) > 1 else ""
    return format(fmean(values), form) + (f" ± {deviation}" if deviation else "")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
