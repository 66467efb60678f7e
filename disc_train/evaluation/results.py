"""Hold what an evaluation found: the outcome of every item, and the means over them.

Every mean is a sum over items divided by another: right answers by probes, nats by tokens. So one formula gives every
standard error, and that of the difference between two runs on the same items.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

FILE_NAME = "evaluation.json"

CLOSED_BOOK, IN_CONTEXT = "closed book", "in context"


@dataclass
class ProbeOutcome:
    id: str
    group: str
    condition: str  # CLOSED_BOOK or IN_CONTEXT
    question: str
    excluded: str | None = None  # why it was not asked; all below is then None
    scores: list[float] | None = None  # of every choice, mean log-probability a token; None: no choices
    right_choice: bool | None = None
    generated: str | None = None
    exact: bool | None = None  # what was generated is the answer
    contains: bool | None = None  # ... holds the answer


@dataclass(kw_only=True)
class TextSums:
    """Hold sums over a text's tokens, in nats at temperature 1; the last four only beside a reference."""

    tokens: int = 0  # that were read
    predicted: int = 0  # tokens but the first
    loss: float = 0.0  # negative log-likelihood of those
    kl: float | None = None  # KL(reference || model)
    entropy: float | None = None
    reference_entropy: float | None = None
    agreement: float | None = None  # positions where both models find one token the likeliest


@dataclass(kw_only=True)
class TextOutcome(TextSums):
    id: str
    group: str
    cut: int  # tokens beyond what the models read


@dataclass
class Evaluation:
    settings: dict[str, Any]
    versions: dict[str, str]
    probes: list[ProbeOutcome] = field(default_factory=list)
    texts: list[TextOutcome] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)  # lm-eval's results

    def write(self, path: Path) -> None:
        summary = [
            {"table": s.table, "row": s.row, "measure": s.measure, "value": s.value, "standard_error": s.standard_error}
            | {"items": len(s.items), "excluded": s.excluded}
            for s in self.series()
        ]
        path.write_text(
            json.dumps({"summary": summary, **asdict(self)}, indent=1, default=float) + "\n", encoding="utf-8"
        )

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read a file that `write` wrote.

        Raises:
            ValueError: it is no such file.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields.pop("summary")
            probes = [ProbeOutcome(**outcome) for outcome in fields.pop("probes")]
            texts = [TextOutcome(**outcome) for outcome in fields.pop("texts")]
            return cls(probes=probes, texts=texts, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"--compare: {path}: expected what disc-eval writes, got: {error!r}") from error

    def series(self) -> list["Series"]:
        """Return everything that was measured, in the order in which it is shown."""
        return [*_probe_series(self.probes), *_text_series(self.texts), *_task_series(self.tasks)]


class Series(NamedTuple):
    """Hold one measure of one group of items: its mean is sum(part) / sum(whole) over them."""

    table: Literal["Probes", "Texts", "Tasks"]
    row: str
    measure: str
    unit: Literal["share", "score", "nats", "perplexity"]  # score: a task's; perplexity: exp of a mean in nats
    items: dict[str, tuple[float, float]]  # by id: (part, whole)
    excluded: int = 0

    @property
    def mean(self) -> float:
        """Return the mean over the items; NaN where there are none."""
        whole = sum(whole for _, whole in self.items.values())
        return sum(part for part, _ in self.items.values()) / whole if whole else math.nan

    @property
    def value(self) -> float | None:
        """Return the mean, or its exp for a perplexity; None where there are no items."""
        if math.isnan(self.mean):
            return None
        return exp(self.mean) if self.unit == "perplexity" else self.mean

    @property
    def standard_error(self) -> float | None:
        """Return the error of the value: for shares the binomial sqrt(p (1 - p) / n); None for fewer than two items."""
        error = _standard_error(self.items.values())
        return error if error is None or self.unit != "perplexity" else error * exp(self.mean)


def exp(nats: float) -> float:
    """Return e to the power of a number of nats; infinity where that is too large for a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class Difference(NamedTuple):
    """Measure how far a run is from another, over the items that both have."""

    value: float
    standard_error: float | None
    gained: int  # items with a larger part; of shares: right now, wrong before
    lost: int
    unmatched: int  # items that only one of the two has


def difference(run: Series, base: Series) -> Difference | None:
    """Subtract `base` from `run` item by item; None where they share no item, or an item has another size."""
    common = run.items.keys() & base.items.keys()
    if not common or any(run.items[id][1] != base.items[id][1] for id in common):
        return None
    parts = {id: run.items[id][0] - base.items[id][0] for id in common}
    pairs = [(parts[id], run.items[id][1]) for id in common]
    return Difference(
        value=sum(part for part, _ in pairs) / sum(whole for _, whole in pairs),
        standard_error=_standard_error(pairs),
        gained=sum(part > 0 for part in parts.values()),
        lost=sum(part < 0 for part in parts.values()),
        unmatched=len(run.items.keys() ^ base.items.keys()),
    )


def _standard_error(items: Iterable[tuple[float, float]]) -> float | None:
    """Return the standard error of sum_i part_i / sum_i whole_i over independent items, to first order:
    sqrt(sum_i (part_i - mean * whole_i)^2) / sum_i whole_i."""
    pairs = list(items)
    whole = sum(whole for _, whole in pairs)
    if len(pairs) < 2 or not whole:
        return None
    mean = sum(part for part, _ in pairs) / whole
    return math.sqrt(sum((part - mean * size) ** 2 for part, size in pairs)) / whole


PROBE_MEASURES = {
    "likeliest choice": "right_choice",
    "generated exactly": "exact",
    "in what was generated": "contains",
}
BESIDE_REFERENCE: list[tuple[str, Any, Callable[[Any], float]]] = [
    ("KL to the reference", "nats", lambda text: text.kl),
    ("entropy", "nats", lambda text: text.entropy),
    ("entropy drift", "nats", lambda text: text.entropy - text.reference_entropy),
    ("same likeliest token", "share", lambda text: text.agreement),
]


def _probe_series(outcomes: list[ProbeOutcome]) -> Iterable[Series]:
    for group, condition in dict.fromkeys((outcome.group, outcome.condition) for outcome in outcomes):
        here = [outcome for outcome in outcomes if (outcome.group, outcome.condition) == (group, condition)]
        excluded = sum(outcome.excluded is not None for outcome in here)
        for measure, name in PROBE_MEASURES.items():
            # The question too: where files have changed between runs, items of one id are not one item.
            given = {f"{outcome.id} {outcome.question}": getattr(outcome, name) for outcome in here}
            items = {id: (float(right), 1.0) for id, right in given.items() if right is not None}
            if items or (excluded and measure == "likeliest choice"):  # a row that has lost all its items is shown
                yield Series("Probes", f"{group}, {condition}", measure, "share", items, excluded)


def _text_series(outcomes: list[TextOutcome]) -> Iterable[Series]:
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.group == group]
        losses = {outcome.id: (outcome.loss, float(outcome.predicted)) for outcome in here if outcome.predicted}
        excluded = len(here) - len(losses)  # too short to predict anything
        yield Series("Texts", group, "loss", "nats", losses, excluded)
        yield Series("Texts", group, "perplexity", "perplexity", losses, excluded)
        compared = [outcome for outcome in here if outcome.tokens and outcome.kl is not None]
        for measure, unit, part in BESIDE_REFERENCE if compared else ():
            items = {outcome.id: (part(outcome), float(outcome.tokens)) for outcome in compared}
            yield Series("Texts", group, measure, unit, items, excluded)


def _task_series(tasks: dict[str, Any]) -> Iterable[Series]:
    for task, metrics in tasks.get("results", {}).items():
        for name, value in metrics.items():
            if "_stderr" in name or "," not in name or not isinstance(value, (int, float)):
                continue
            given = tasks["items"].get(task, {}).get(name, {})
            items = {id: (part, whole) for id, (part, whole) in given.items()}
            # What is no mean over items (a corpus' F1, the mean over a group of tasks) has its value alone.
            series = Series("Tasks", task, name.removesuffix(",none"), "score", items)
            yield (
                series if math.isclose(series.mean, value, abs_tol=1e-6) else series._replace(items={"": (value, 1.0)})
            )
