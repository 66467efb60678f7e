"""A sample of `make families`: a family of each kind comes out as the committed table says."""

import json

import pytest

from benchmarks.families import PAGE, RESULTS, TOLERANCE, Outcome, examine, render

KNOWN = json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "mamba2", "bart"])
def test_a_family_comes_out_as_the_table_says(family):
    outcome = examine(family)
    assert outcome.result == KNOWN[family]["result"]
    assert max(outcome.loss, outcome.gradient) < TOLERANCE


def test_the_page_shows_the_results():
    """Versions aside, which are those of the run."""
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert render([Outcome(**KNOWN[family]) for family in sorted(KNOWN)]).splitlines()[4:] == page[4:]


def test_no_family_is_trained_wrongly():
    assert not [name for name, found in KNOWN.items() if found["result"] in ("WRONG", "FAILED")]
