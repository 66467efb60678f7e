"""Means, standard errors and differences between runs, against numpy and by hand."""

import math

import numpy as np
import pytest

from disc_train.evaluation.results import Evaluation, ProbeOutcome, Series, TextOutcome, difference


def _share(*right):
    return Series("Probes", "new", "choice", "share", {str(i): (float(r), 1.0) for i, r in enumerate(right)})


def test_the_standard_error_of_a_share_is_binomial():
    series = _share(1, 1, 1, 0, 0, 0, 0, 0)
    assert series.value == 3 / 8
    assert series.standard_error == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 8))
    assert _share(1).standard_error is None
    assert _share().value is None


def test_a_difference_is_paired():
    base, run = _share(1, 1, 0, 0, 0), _share(1, 0, 1, 1, 0)
    found = difference(run, base)
    changes = np.array([0, -1, 1, 1, 0])
    assert found.value == pytest.approx(changes.mean())
    assert found.standard_error == pytest.approx(changes.std() / math.sqrt(5))
    assert (found.gained, found.lost, found.unmatched) == (2, 1, 0)


def test_items_of_one_run_only_are_counted_and_left_out():
    found = difference(_share(1, 1, 1), _share(0, 1))
    assert (found.value, found.gained, found.lost, found.unmatched) == (0.5, 1, 0, 1)
    assert difference(_share(1), Series("Probes", "new", "choice", "share", {"x": (1.0, 1.0)})) is None


def test_a_mean_over_tokens():
    rng = np.random.default_rng(0)
    tokens, nats = rng.integers(5, 50, 400), rng.gamma(2.0, 1.0, 400)
    items = {str(i): (float(n * t), float(t)) for i, (n, t) in enumerate(zip(nats, tokens, strict=True))}
    series = Series("Texts", "news", "loss", "nats", items)
    assert series.value == pytest.approx((nats * tokens).sum() / tokens.sum())
    drawn = rng.integers(0, 400, (4000, 400))  # the bootstrap, over texts
    spread = ((nats * tokens)[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert series.standard_error == pytest.approx(spread, rel=0.1)
    perplexity = series._replace(unit="perplexity")
    assert perplexity.value == pytest.approx(math.exp(series.value))
    assert perplexity.standard_error == pytest.approx(series.standard_error * perplexity.value)
    worse = perplexity._replace(items={id: (1e4 * part, whole) for id, (part, whole) in items.items()})
    assert (worse.value, worse.standard_error) == (math.inf, math.inf)
    other = series._replace(items={id: (part, whole + 1) for id, (part, whole) in items.items()})
    assert difference(other, series) is None  # another tokenizer: the same texts have other tokens


def test_an_item_of_one_id_with_another_question_is_another():
    """Where a file has changed between two runs."""

    def series(*questions):
        probes = [
            ProbeOutcome(str(number), "new", "closed book", question, right_choice=True)
            for number, question in enumerate(questions)
        ]
        return Evaluation({}, {}, probes).series()[0]

    assert difference(series("Who?", "Why?"), series("Who?", "When?")).unmatched == 2


def test_written_and_read_again(tmp_path):
    beside = {"kl": 1.0, "entropy": 3.0, "reference_entropy": 2.5, "agreement": 4.0}
    found = Evaluation(
        settings={"model_name_or_path": "m"},
        versions={},
        probes=[
            ProbeOutcome("a", "new", "closed book", "What?", scores=[-1.0, -2.0], right_choice=True),
            ProbeOutcome("b", "new", "closed book", "Who?", excluded="too long"),
        ],
        texts=[TextOutcome(id="t", group="news", cut=0, tokens=5, predicted=4, loss=8.0, **beside)],
        tasks={
            "results": {"t": {"acc,none": 0.5, "f1,none": 0.3}},
            "items": {"t": {"acc,none": {"0": (1, 1), "1": (0, 1)}}},
        },
    )
    found.write(tmp_path / "evaluation.json")
    series = {(s.row, s.measure): s for s in Evaluation.read(tmp_path / "evaluation.json").series()}
    assert series == {(s.row, s.measure): s for s in found.series()}
    choice = series["new, closed book", "likeliest choice"]
    assert (choice.value, len(choice.items), choice.excluded) == (1.0, 1, 1)
    values = {measure: series["news", measure].value for measure in ("loss", "KL to the reference", "entropy drift")}
    assert values == {"loss": 2.0, "KL to the reference": 0.2, "entropy drift": 0.1}
    assert (series["t", "acc"].value, series["t", "acc"].standard_error) == (0.5, pytest.approx(0.5 / math.sqrt(2)))
    assert (series["t", "f1"].value, series["t", "f1"].standard_error) == (0.3, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"summary": [], "probes": [{"id": 1}], "texts": []}'])
def test_a_file_that_is_no_run(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json: expected what disc-eval writes"):
        Evaluation.read(tmp_path / "x.json")
