"""Render the tables of `docs/scaling.md`: what was measured on one machine, and what the cost model predicts.

    python -m benchmarks.scaling_page [--measure]

With `--measure` it first takes the steps anew, in a few processes, and writes `results/cpu/scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.cost_model import (
    MODELS,
    Hardware,
    Model,
    Plan,
    collectives,
    documents,
    held_bytes,
    operations,
    predict,
)

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/cpu/scaling.json"
DOCUMENTS = {"measured": 4, "predicted": 16}  # that a rank takes in a step
ROUNDS = 10
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
# Ranks that hold one copy of the models in HSDP: the fewest whole nodes whose memory holds them.
COPY = {"7B": 8, "70B": 16}
HARDWARE = {
    "peak": ("bf16 products, TFLOP/s", 1e12, "measured elsewhere, H200"),
    "memory": ("from and to its memory, TB/s", 1e12, "measured elsewhere, H200"),
    "efficiency": ("share of that peak which a step's products reach", 1, "assumed"),
    "nvlink": ("within a node, GB/s a GPU and direction", 1e9, "assumed: two thirds of the data sheet's 450"),
    "network": ("between nodes, GB/s a GPU and direction", 1e9, "assumed: four fifths of 400 Gbit/s a GPU"),
    "hop": ("from a rank of a ring to the next, microseconds", 1e-6, "assumed"),
    "node": ("GPUs a node", 1, "assumed"),
    "capacity": ("memory it has, GiB", 2**30, "H200"),
}


def plans(ranks: int, copy: int) -> dict[str, Plan | None]:
    """Return the plans that the predictions compare; None: the same as FSDP2."""
    return {
        "DDP": Plan(ranks),
        "FSDP2": Plan(ranks, shard=ranks),
        f"HSDP, {copy} a copy": Plan(ranks, shard=copy) if ranks > copy else None,
        "FSDP2, heads over 8": Plan(ranks, shard=ranks, vocab=8),
    }


def measured_plans(ranks: int) -> list[Plan]:
    """Return the plans that are measured on one machine; float32 throughout, which is what a CPU is fast in."""
    divisions = [(1, 1), (ranks, 1), (ranks, 2)] + ([(2, 1), (2, 2), (4, 4)] if ranks == 4 else [])
    return [Plan(ranks, shard, vocab, compute_bytes=4) for shard, vocab in (divisions if ranks > 1 else divisions[:1])]


def name_of(plan: Plan) -> str:
    if plan.ranks == 1:
        return "alone"
    if plan.shard == 1:
        return "DDP"
    name = "FSDP2" if plan.shard == plan.ranks else f"HSDP, {plan.shard} a copy"
    return name if plan.vocab == 1 else f"{name}, heads over {plan.vocab}"


def measure() -> dict[str, Any]:
    from benchmarks import environment
    from benchmarks.scaling_run import World, run_world

    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    rows = []
    for ranks in (1, 2, 4):
        rows += run_world(World(ranks, measured_plans(ranks), {}, DOCUMENTS["measured"], ROUNDS))
    here = {"command": "python -m benchmarks.scaling_page --measure", "load average before": load}
    return {"environment": environment.describe() | here, "rows": rows}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured() -> str:
    run = json.loads(RESULTS.read_text())
    rows = []
    for row in run["rows"]:
        plan = Plan(**row["plan"])
        payload = [f"{row['payload'][kind]:,}" if kind in row["payload"] else "" for kind in KINDS]
        time = f"{1e3 * row['seconds']:,.0f}"
        rows.append([str(plan.ranks), name_of(plan), *payload, time, f"{max(row['errors'].values()):.0e}"])
    keys = ("device", "load average before", "commit", "date", "torch")
    where = ", ".join(f"{key} {run['environment'][key]}" for key in keys)
    headers = ["processes", "how", *(f"{kind.replace('_', '-')}, bytes" for kind in KINDS), "ms a step", "error"]
    return f"{table(headers, rows)}\n\n`{run['environment']['command']}`: {where}."


def hardware() -> str:
    rows = []
    for field in fields(Hardware):
        what, unit, source = HARDWARE[field.name]
        rows.append([what, f"{field.default / unit:g}", source])  # type: ignore[operator]
    return table(["of a GPU", "", ""], rows)


def work() -> str:
    count = documents(DOCUMENTS["predicted"])
    parts = {name: operations(model, count) for name, model in MODELS.items()}
    headers = ["TFLOP a GPU and step", *(f"{name} ({model.name})" for name, model in MODELS.items())]
    return table(headers, [[part, *(f"{of[part] / 1e12:,.1f}" for of in parts.values())] for part in parts["7B"]])


def sent(name: str, ranks: int) -> str:
    """Write the table of what a GPU sends, by kind of collective, and holds, for each plan."""
    model, count = MODELS[name], documents(DOCUMENTS["predicted"])
    rows = []
    for label, plan in plans(ranks, COPY[name]).items():
        if plan is None:
            continue
        by_kind: Counter[str] = Counter()
        for collective in collectives(model, count, plan):
            by_kind[collective.kind] += round(collective.sent)
        gigabytes = [f"{by_kind[kind] / 1e9:,.1f}" if by_kind[kind] else "" for kind in KINDS]
        rows.append([label, *gigabytes, f"{by_kind.total() / 1e9:,.1f}", f"{held_bytes(model, plan) / 2**30:,.0f}"])
    headers = [f"{name}, {ranks} GPUs", *(f"{kind.replace('_', '-')}, GB" for kind in KINDS), "together", "GiB held"]
    return table(headers, rows)


def times(name: str) -> str:
    rows = []
    for ranks in GPUS:
        cells, best = [], 0.0
        for plan in plans(ranks, COPY[name]).values():
            text, speed = _prediction(MODELS[name], plan)
            cells.append(text)
            best = max(best, speed)
        rows.append([f"{ranks:,}", *cells, f"{best:,.0f}" if best else ""])
    return table([f"{name}: GPUs", *plans(GPUS[0], COPY[name]), "documents/s at best"], rows)


def _prediction(model: Model, plan: Plan | None) -> tuple[str, float]:
    """Return the seconds of a step, from all communication hidden to none, as text; documents a second at best."""
    if plan is None:
        return "as FSDP2", 0.0
    if held_bytes(model, plan) > Hardware().capacity:
        return f"needs {held_bytes(model, plan) / 2**30:,.0f} GiB", 0.0
    of = predict(model, documents(DOCUMENTS["predicted"]), plan, Hardware())
    return f"{of.overlapped:.2f} to {of.in_turn:.2f} s", plan.ranks * DOCUMENTS["predicted"] / of.overlapped


TABLES: dict[str, Callable[[], str]] = {
    "measured": measured,
    "hardware": hardware,
    "work": work,
    "sent 7B": lambda: sent("7B", 64),
    "sent 70B": lambda: sent("70B", 64),
    "times 7B": lambda: times("7B"),
    "times 70B": lambda: times("70B"),
}


def rendered(page: str) -> str:
    """Return the page with every table between its marks, `<!-- table: NAME -->` and `<!-- end -->`, made anew."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the tables of docs/scaling.md.")
    parser.add_argument("--measure", action="store_true", help="take the steps anew, a few minutes on two cores")
    if parser.parse_args().measure:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()
