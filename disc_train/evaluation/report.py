"""Write reports for people: tables in Markdown, a chart, runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from disc_train.evaluation.chart import draw
from disc_train.evaluation.results import FILE_NAME, Evaluation, Series, difference
from disc_train.flags import check_folder

Cell = tuple[str, str, str]  # table, row, measure
COMPARISON = "comparison.md"


def check_nothing_is_there(folder: Path) -> None:
    """Raise ValueError if a folder has the results of an earlier run, which would be lost, or cannot be written to."""
    check_folder("--output_dir", folder)
    for name in (FILE_NAME, COMPARISON):
        if Path(folder, name).exists():
            raise ValueError(
                f"--output_dir: expected a folder without results, got {folder} with the {name} of an earlier run:"
                " choose another folder, or move that away"
            )


def write_report(found: Evaluation, folder: Path) -> str:
    """Write evaluation.json, .md and .png into a folder; return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    found.write(folder / FILE_NAME)
    series = found.series()
    settings = found.settings
    lines = [f"# {settings['model_name_or_path']}", ""]
    if settings["reference_name_or_path"]:
        lines += [f"The reference is {settings['reference_name_or_path']}.", ""]
    lines += _tables({_cell(each): _value(each) for each in series})
    lines += _notes(found)
    return _finish(lines, {settings["model_name_or_path"]: series}, folder / "evaluation")


def write_comparison(runs: Sequence[str], folder: Path) -> str:
    """Write comparison.md and .png of finished runs, given by folder or JSON file; return the Markdown.

    Raises:
        ValueError: a run that is none, or runs that measured nothing in common with the first.
    """
    paths = [Path(run, FILE_NAME) if Path(run).is_dir() else Path(run) for run in runs]
    found = [{_cell(each): each for each in Evaluation.read(path).series()} for path in paths]
    base, *others = found
    for run, other in zip(runs[1:], others, strict=True):
        if not base.keys() & other.keys():
            raise ValueError(f"--compare: {run} has measured nothing that {runs[0]} has")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}: {run}" for number, run in enumerate(runs, start=1)]
    lines = ["# Runs side by side", "", *(f"- {name}" for name in names), ""]
    cells: dict[Cell, str] = {}
    for cell in dict.fromkeys(cell for series in found for cell in series):
        table, row, measure = cell
        for number, series in enumerate(found, start=1):
            if cell in series:
                change = "" if series is base or cell not in base else _change(series[cell], base[cell])
                cells[table, f"{row}: {measure}", str(number)] = _value(series[cell]) + change
    lines += _tables(cells)
    lines += [
        "In the last brackets: the difference from run 1 and its standard error, over the items that both have; and"
        " how many items were gained and lost.",
        "",
    ]
    drawn = {name: list(series.values()) for name, series in zip(names, found, strict=True)}
    return _finish(lines, drawn, folder / COMPARISON)


def _finish(lines: list[str], runs: dict[str, list[Series]], path: Path) -> str:
    if not draw(runs, path.with_suffix(".png")):
        lines += ["No chart was drawn: it needs matplotlib (pip install matplotlib).", ""]
    text = "\n".join(lines)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _tables(cells: dict[Cell, str]) -> list[str]:
    """Write a Markdown table for each of "Probes", "Texts", "Tasks" that has cells, in the order in which they come."""
    lines = []
    for table in dict.fromkeys(table for table, _, _ in cells):
        here = {(row, column): text for (name, row, column), text in cells.items() if name == table}
        columns = list(dict.fromkeys(column for _, column in here))
        lines += [f"## {table}", "", f"|  | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
        for row in dict.fromkeys(row for row, _ in here):
            values = [here.get((row, column), "-") for column in columns]
            lines.append(f"| {' | '.join([' '.join(row.replace('|', '/').split()), *values])} |")
        lines.append("")
    return lines


def _notes(found: Evaluation) -> list[str]:
    """List what was left out or cut, and how to read the rest."""
    lines = [
        f"- left out: {each.id}, {each.condition}: {each.excluded}"
        for each in found.probes
        if each.excluded is not None
    ]
    for group in dict.fromkeys(each.group for each in found.texts):
        here = [each for each in found.texts if each.group == group]
        cut = [each.cut for each in here if each.cut]
        lines.append(
            f"- {group}: {len(here):,} texts, {sum(each.tokens for each in here):,} tokens read; {len(cut):,} cut"
            f" ({sum(cut):,} tokens dropped); {sum(not each.predicted for each in here):,} too short to predict a token"
        )
    lines.append("- ± standard error over items, n their number; loss, KL and entropy in nats a token")
    return [*lines, ""]


def _cell(series: Series) -> Cell:
    return series.table, series.row, series.measure


def _value(series: Series) -> str:
    counts = [f"n {len(series.items):,}"] if series.unit in ("share", "score") else []
    counts += [f"{series.excluded:,} left out"] if series.excluded else []
    shown = "-" if series.value is None else _number(series, series.value, series.standard_error)
    return f"{shown} ({', '.join(counts)})" if counts else shown


def _number(series: Series, value: float, error: float | None, sign: str = "") -> str:
    if series.unit == "share":
        return f"{100 * value:{sign}.1f}%" + ("" if error is None else f" ± {100 * error:.1f}")
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _change(run: Series, base: Series) -> str:
    change = difference(run, base)
    if change is None:
        return " (not the same items)"
    if run.unit == "perplexity":  # the loss has the difference
        return ""
    text = _number(run, change.value, change.standard_error, sign="+")
    if run.unit in ("share", "score") and all(whole == 1 for _, whole in run.items.values()) and len(run.items) > 1:
        text += f"; +{change.gained} -{change.lost}"
    if change.unmatched:
        text += f"; {change.unmatched} in one run only"
    return f" ({text})"
