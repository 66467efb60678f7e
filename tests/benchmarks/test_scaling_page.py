"""The scaling page is what its command renders, and what it says was measured is what the cost model counts."""

import json
import re

import pytest

from benchmarks import scaling_page
from benchmarks.cost_model import MODELS, Plan, collectives, documents
from benchmarks.scaling_page import DOCUMENTS, PAGE, RESULTS, TABLES, rendered
from benchmarks.scaling_run import SHAPE, model_of

ROWS = json.loads(RESULTS.read_text())["rows"]


def test_the_page_is_as_rendered():
    page = PAGE.read_text()
    assert rendered(page) == page, "python -m benchmarks.scaling_page"
    assert re.findall("<!-- table: (.+?) -->", page) == list(TABLES)


def test_another_figure_would_change_the_page(monkeypatch):
    monkeypatch.setitem(scaling_page.MODELS, "7B", MODELS["70B"])
    page = PAGE.read_text()
    assert rendered(page) != page


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row["plan"].values())))
def test_measured_bytes_are_the_models(row):
    plan = Plan(**row["plan"])
    counted: dict[str, int] = {}
    for collective in collectives(model_of(SHAPE), documents(DOCUMENTS["measured"]), plan):
        counted[collective.kind] = counted.get(collective.kind, 0) + collective.payload
    assert row["payload"] == counted
    assert max(row["errors"].values()) < 1e-4


def test_all_plans_were_measured():
    expected = [plan for ranks in (1, 2, 4) for plan in scaling_page.measured_plans(ranks)]
    assert [Plan(**row["plan"]) for row in ROWS] == expected
