"""Render rows of results as Markdown tables and plots.

`pytest benchmarks/ --results benchmarks/results` writes `<table>.json`, `<table>.md` and `<table>-<plot>.png` itself.
Where matplotlib is missing there are no plots; where it is not, this renders a folder's `*.json` again:

    python benchmarks/report.py benchmarks/results/cpu
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]  # a measurement: `case`, `system` and `status`; with the status "measured", all its figures
Run = dict[str, Any]  # "environment": what `environment.py` says; "rows"
MEASURED = "measured"


@dataclass(frozen=True)
class Table:
    title: str
    explanation: str
    limit: str  # the system whose time the others of a case are divided by; "": none
    names: dict[str, Callable[[Row], str]]  # columns that every row has, by header
    figures: dict[str, Callable[[Row], str]]  # columns that a measured row has; another says in the first why not
    plots: dict[str, Callable[[Figure, list[Row]], str]]  # draw on the figure, return its title; "": nothing to draw


# Columns


def milliseconds(row: Row) -> str:
    return "" if row["seconds"] is None else f"{1e3 * row['seconds']:,.4g}"


def over_limit(row: Row) -> str:
    return "" if row["over_limit"] is None else f"{row['over_limit']:.2f}"


def mebibytes(row: Row) -> str:
    return "" if row["bytes_above"] is None else f"{row['bytes_above'] / 2**20:,.0f}"


def documents_a_second(row: Row) -> str:
    return "" if row["seconds"] is None else f"{row['documents'] / row['seconds']:,.4g}"


def times_the_limit(row: Row) -> str:
    """Write how many times as fast as the limit a row's system is."""
    return "" if row["over_limit"] is None else f"{1 / row['over_limit']:.2f}"


def gibibytes(field: str) -> Callable[[Row], str]:
    return lambda row: f"{row[field] / 2**30:,.3g}"


def least(unit: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row['least_seconds'][unit]:.2f}"


def error(part: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if part not in row["errors"]:
            return ""
        got, plain = row["errors"][part], row.get("float32_logits_errors", {}).get(part)
        return f"{got:.1e} ({got / plain:.2f})" if plain else f"{got:.1e}"

    return text


# Plots


def time_over_limit(figure: Figure, rows: list[Row]) -> str:
    """Draw time over the limit: a line for each case, and on it a marker for each system."""
    measured = [row for row in rows if row["status"] == MEASURED and row["over_limit"] and row["system"] != "products"]
    if not measured:
        return ""
    cases = list(dict.fromkeys(row["case"] for row in measured))
    figure.set_size_inches(9, 2.2 + 0.4 * len(cases))
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1, label="the products alone")
    for system, style in styles(rows).items():
        own = [row for row in measured if row["system"] == system]
        if own:
            x, y = [row["over_limit"] for row in own], [cases.index(row["case"]) for row in own]
            axes.plot(x, y, linestyle="", **style)
    shapes = {row["case"]: f"{row['rows']:,} x {row['hidden']:,} x {row['vocab']:,}" for row in measured}
    axes.set_yticks(range(len(cases)), [f"{case}\n{shapes[case]}" for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylabel("case, with its rows x hidden size x vocabulary")
    largest = max(row["over_limit"] for row in measured)
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if tick <= 1.2 * largest]
    axes.set_xscale("log")
    axes.set_xticks([], minor=True)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(
        "time / time of the matrix products alone\n\n"
        "forward: without a backward; else with one. frozen: a head that is not trained. n: so many tokens.\n"
        "valid: that percentage of the tokens is compared. shared: so many rows are compared with each teacher row.\n"
        "expected: the teacher's expected embedding is given. cross-entropy: labels are.",
        fontsize=9,
    )
    return "Mean forward KL: time over the limit"


def memory_over_tokens(figure: Figure, rows: list[Row]) -> str:
    """Draw peak memory over N, for cases that differ in nothing but N: of such groups, the one with the most N."""
    same = ("hidden", "vocab", "dtype", "frozen_head", "backward", "valid_percent", "shared", "summarised")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["system"] != "products":
            # Results of before there were labels do not say that they have none.
            key = *(row[field] for field in same), row.get("labelled", False)
            groups.setdefault(key, []).append(row)
    group = max(groups.values(), key=lambda group: len({row["tokens"] for row in group}), default=[])
    tokens = sorted({row["tokens"] for row in group})
    if len(tokens) < 2:
        return ""
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    for system, style in styles(rows).items():
        own = sorted((row for row in group if row["system"] == system), key=lambda row: row["tokens"])
        held = {row["tokens"]: row["bytes_above"] / 2**20 for row in own if row["status"] == MEASURED}
        if held:
            axes.plot(list(held), list(held.values()), **style)
        for row in own:
            if row["status"] == "out of memory":
                top = axes.get_xaxis_transform()  # x in tokens, y from 0 to 1
                axes.plot(row["tokens"], 0.97, transform=top, **style | {"label": None})
                note = f"{system}: out of memory  "
                axes.text(row["tokens"], 0.95, note, transform=top, rotation=90, va="top", ha="center", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("N, tokens")
    axes.set_ylabel("peak above inputs and gradients, MiB")
    first = group[0]
    return f"Forward + backward: memory at D {first['hidden']}, V {first['vocab']}, {first['dtype']}"


def speed_over_documents(figure: Figure, rows: list[Row]) -> str:
    """Draw our speed over documents a step, with a line for each shape and kind of suffixes."""
    measured = [row for row in rows if row["system"] == "ours" and row["status"] == MEASURED and row["over_limit"]]
    if not measured:
        return ""
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=1, label="the loop")
    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    for shape, suffixes in dict.fromkeys((row["shape"], row["suffixes"]) for row in measured):
        own = [row for row in measured if (row["shape"], row["suffixes"]) == (shape, suffixes)]
        own.sort(key=lambda row: row["documents"])
        x, y = [row["documents"] for row in own], [1 / row["over_limit"] for row in own]
        style = {"color": f"C{shapes.index(shape)}", "marker": "o" if suffixes == "sentence" else "s"}
        axes.plot(x, y, linestyle="-" if suffixes == "sentence" else "--", label=f"{shape}, {suffixes}", **style)
    documents = sorted({row["documents"] for row in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(documents, map(str, documents))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("documents a step")
    axes.set_ylabel("documents a second, over the loop's")
    return "Whole training steps: speed over the per-split loop"


def error_over_divergence(figure: Figure, rows: list[Row]) -> str:
    """Draw a panel for each dtype, and in it a line for each system."""
    figure.set_size_inches(9, 4)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        for system, style in styles(rows).items():
            own = [row for row in rows if (row["system"], row["dtype"], row["status"]) == (system, dtype, MEASURED)]
            label = {} if dtype == dtypes[0] else {"label": None}
            if own:
                x, y = [row["divergence"] for row in own], [row["errors"]["hidden"] for row in own]
                axes.plot(x, y, **style | label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_title(dtype, fontsize=9)
        axes.set_xlabel("KL(teacher || student), nats a row")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error of the hidden gradient")
    return "How accurate a gradient is the closer the student is to its teacher"


def styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Choose a colour and a marker for every system, the same in every plot of a run."""
    systems = dict.fromkeys(row["system"] for row in rows if row["system"] != "products")
    return {
        system: {"label": system, "color": f"C{i}", "marker": "oDs^vP*X<>"[i % 10], "markersize": 7, "alpha": 0.8}
        for i, system in enumerate(systems)
    }


TABLES = {
    "linear_kl": Table(
        title="The linear KL: time, memory, accuracy",
        explanation=(
            "Mean forward KL over the rows, or cross-entropy where the case says so; forward and backward, unless it"
            " says `forward`. `products` is the"
            " limit: the matrix products of the case alone, operands and results in its dtype (on CUDA by cuBLAS)."
            " Times are medians between synchronisations, on CUDA with the L2 cache overwritten before each call."
            " MiB is the peak above inputs and gradients. An error is the norm of the difference from float64 over the"
            " norm; in brackets, that over the error of plain torch with float32 logits; beyond 0.1 (bfloat16) or 0.001"
            " (float32) a result is wrong and has no time. Peers run with their defaults, on gathered rows: none takes"
            " row indices."
        ),
        limit="products",
        names={
            "case": lambda row: row["case"],
            "M x D x V": lambda row: f"{row['rows']} x {row['hidden']} x {row['vocab']}",
            "system": lambda row: row["system"],
        },
        figures={
            "ms": milliseconds,
            "over the products": over_limit,
            "MiB": mebibytes,
            "error of the loss": error("loss"),
            "of the hidden gradient": error("hidden"),
            "of the weight gradient": error("weight"),
        },
        plots={"time": time_over_limit, "memory": memory_over_tokens},
    ),
    "precision": Table(
        title="The linear KL close to the teacher: accuracy",
        explanation=(
            "Forward KL, 256 rows, hidden size 256, vocabulary 32000. The teacher's head is a copy of the student's and"
            " its hidden states are the student's, moved until the mean KL is the case's, as where a model is distilled"
            " from itself. An error is the norm of the difference from float64 over the norm; in brackets, that over"
            " the error of plain torch with float32 logits. `ours_one_head` is given one tensor as both heads."
        ),
        limit="",
        names={"case": lambda row: row["case"], "system": lambda row: row["system"]},
        figures={
            "error of the loss": error("loss"),
            "of the hidden gradient": error("hidden"),
            "of the weight gradient": error("weight"),
        },
        plots={"error": error_over_divergence},
    ),
    "row_kernel": Table(
        title="The row kernel: instructions, bytes, time",
        explanation=(
            "The kernel that turns two rows of logits into divergence and gradient: forward KL with a bfloat16"
            " gradient, in two passes over the vocabulary. Instructions and bytes an entry are counted in the machine"
            " code for sm_90. From them follows how long each unit of an H200 at its highest clock and bandwidth is"
            " busy with the case; the kernel takes at least the longest of these. The last column is measured, where"
            " there is a GPU."
        ),
        limit="",
        names={"case": lambda row: row["case"]},
        figures={
            "instructions an entry": lambda row: f"{row['instructions']:.0f}",
            "bytes an entry": lambda row: f"{row['bytes']:.0f}",
            "bytes with one read": lambda row: f"{row['bytes_read_once']:.0f}",
            "issue, ms": least("issue"),
            "loads and stores, ms": least("loads and stores"),
            "special functions, ms": least("special functions"),
            "memory, ms": least("memory"),
            "measured, ms": milliseconds,
        },
        plots={},
    ),
    "step": Table(
        title="Whole training steps: documents a second, memory",
        explanation=(
            "Both models' forwards, loss, backward and AdamW, for models of these shapes with random weights. A case is"
            " named by shape, suffixes and documents a step. Documents are random tokens, 400 in the mean, in 16"
            " sentences, with up to 5 splits: 4 random sentences and the last, or 5 random positions, each suffix to"
            " the end. `per_split_loop` is the procedure of the method's authors, two forwards and a backward for every"
            " split. `mixed` precision is theirs: a float32 student under bfloat16 autocast, a bfloat16 teacher;"
            " `bfloat16` is everything, AdamW's states included. Times are medians between synchronisations. GiB is"
            " the peak of all that is held: both models' weights, AdamW's states, gradients and activations. An error"
            " is the norm of the difference from the loop over the norm, in the first step; beyond 0.15 (mixed,"
            " bfloat16) or 0.0001 (float32) a result is wrong and has no time."
        ),
        limit="per_split_loop",
        names={
            "case": lambda row: row["case"],
            "precision": lambda row: row["precision"],
            "system": lambda row: row["system"],
        },
        figures={
            "documents/s": documents_a_second,
            "over the loop's": times_the_limit,
            "GiB": gibibytes("bytes"),
            "GiB, gradients and activations": gibibytes("bytes_above"),
            "error of the loss": error("loss"),
            "of the head's gradient": error("head"),
            "of the first layer's": error("first"),
        },
        plots={"speed": speed_over_documents},
    ),
}


def finished(name: str, rows: list[Row], environment: dict[str, str]) -> Run:
    """Make a run of recorded rows: add to every measured one its time over the limit."""
    limits = {row["case"]: row.get("seconds") for row in rows if row["system"] == TABLES[name].limit}
    for row in rows:
        if row["status"] == MEASURED and TABLES[name].limit:
            limit = limits.get(row["case"])
            row["over_limit"] = row["seconds"] / limit if row["seconds"] and limit else None
    return {"environment": environment, "rows": rows}


def markdown(name: str, run: Run) -> str:
    table = TABLES[name]
    headers = [*table.names, *table.figures]
    lines = [f"# {table.title}", "", table.explanation, ""]
    lines += [f"- {key}: {value}" for key, value in run["environment"].items()]
    lines += ["", f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    for row in run["rows"]:
        if row["status"] == MEASURED:
            figures = [text(row) for text in table.figures.values()]
        else:
            figures = [row["status"].replace("|", "\\|")] + [""] * (len(table.figures) - 1)
        lines.append(f"| {' | '.join([*(text(row) for text in table.names.values()), *figures])} |")
    return "\n".join(lines) + "\n"


def save(folder: Path, name: str, run: Run) -> Path:
    """Write a table's rows and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path


def write(folder: Path, name: str, run: Run) -> Iterator[str]:
    """Write a table's files; yield the path of each, or why it was not written."""
    yield str(save(folder, name, run))
    text = markdown(name, run)
    for plot, draw in TABLES[name].plots.items():
        path = folder / f"{name}-{plot}.png"
        path.unlink(missing_ok=True)  # a plot of another run must not stand beside this one's table
        try:
            from matplotlib.figure import Figure
        except ImportError:
            yield f"{path} not drawn: matplotlib is not installed"
            text += f"\n{path.name} not drawn: matplotlib is not installed\n"
            continue
        figure = Figure(layout="constrained", dpi=130)
        title = draw(figure, run["rows"])
        if title:
            figure.suptitle(f"{title}\n{run['environment']['device']}", fontsize=10)
            figure.axes[0].grid(alpha=0.3)
            figure.legend(loc="outside right upper", fontsize=8)
            figure.savefig(path)
            yield str(path)
            text += f"\n![{title}]({path.name})\n"
    (folder / f"{name}.md").write_text(text)
    yield str(folder / f"{name}.md")


def main(folder: Path) -> None:
    for name in TABLES:
        source = folder / f"{name}.json"
        if source.exists():
            print(*write(folder, name, json.loads(source.read_text())), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
