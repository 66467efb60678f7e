"""The page of the example on a real model: paired differences, and areas under frontiers."""

import json
from functools import partial

import pytest


def test_the_page_has_paired_differences_by_entity(real_model, tmp_path):
    """Two entities of two probes each: 0.1 and 0.3 nats less, so 0.2 with an error of 0.1; the ceiling beside it."""
    import page

    def row(name, nlls, **more):
        probes = {"Entity Inferences": {f"{i // 2} {i % 2}": [nll, i % 2] for i, nll in enumerate(nlls)}}
        probes |= {group: {"0 0": [2.0, 1], "1 0": [3.0, 0]} for group in ("ECBD", "specificity")}
        texts = {"for": [10, 20.0, 0.0], "with": [10, 40.0, 1.0]}
        found = {
            "name": name,
            "size": "quick",
            "probes": probes,
            "texts": texts,
            "seconds": {"training": 2, "measuring": 1},
        }
        return found | {"machine": "m", "python": "3", "torch": "2", "transformers": "5"} | more

    initial = row("initial model", [1.0, 1.0, 2.0, 2.0], tasks=["kept"])
    initial["probes"] |= {"kept": {"0": [1.0, 1]}, "at chance": {"0": [1.0, 0]}}
    initial["in context"] = {"Entity Inferences": {"0 0": [0.5, 1]}}
    trained = row("DiSC", [0.9, 0.9, 1.7, 1.7], learning_rate=1e-4, seed=0)
    trained["probes"]["kept"] = {"0": [1.0, 0]}
    broken = {"name": "TALR", "size": "quick", "learning_rate": 1e-4, "seed": 0, "failed": True, "seconds": 1}
    results = tmp_path / "runs.jsonl"
    environment = {name: initial[name] for name in ("machine", "python", "torch", "transformers")}
    results.write_text("".join(json.dumps(each) + "\n" for each in (initial, trained, broken | environment)))
    (tmp_path / "discussion.md").write_text("## Why\n\nBecause.\n")
    page.write_page(results)
    text = (tmp_path / "results.md").read_text()
    assert "| initial model | 50.0 | 1.500 |" in text and "| ... behind the definition | 100.0 | 0.500 |" in text
    assert "| DiSC, 0.0001 | +0.0 ± 0.0 | -0.200 ± 0.100 | +0.000 ± 0.000 |" in text
    assert "Broke down: TALR, 0.0001." in text and text.endswith("## Why\n\nBecause.\n")
    assert (tmp_path / "quick.png").stat().st_size > 1000
    for rows in ("", json.dumps(trained) + "\n"):
        results.write_text(rows)
        with pytest.raises(ValueError, match=r"runs.jsonl: expected results with a row of the initial model"):
            page.write_page(results)
    one = trained | {"probes": {"ECBD": {"0 0": [1.5, 1]}}}
    assert page.compared(one, initial, "ECBD, NLL") == "-0.500 ± nan", "of one item there is no error"
    del trained["probes"]["Entity Inferences"]["0 1"]
    with pytest.raises(ValueError, match=r"expected rows of the same probes and texts, got 2 and 1 .* of '0'"):
        page.compared(trained, initial, "Entity Inferences, NLL")


def test_the_area_is_the_mean_of_the_frontier_and_never_falls(real_model):
    """By hand: KL 0.1 and 0.4, uptake 1 and 2; at 0.2 it is 4/3, so (0.5 * 0.1 + 7/6 * 0.1) / 0.2; then a run worse."""
    import page

    areas, frontiers = (partial(of, measure="Python's documentation, KL") for of in (page.areas, page.frontiers))

    def row(name, kl, nll, rate=1e-5, seed=0):
        probes = {"Entity Inferences": {"0 0": [9.0, 0, 9.0, nll], "1 0": [9.0, 1, 9.0, nll]}}
        row = {"name": name, "learning_rate": rate, "seed": seed}
        return row | {"probes": probes, "texts": {"for": [10, 1.0, 10 * kl]}}

    initial = row("initial model", 0.0, 3.0)
    runs = [row("DiSC", 0.4, 1.0, 2e-5), row("DiSC", 0.1, 2.0)]
    assert areas(initial, runs) == pytest.approx([(0.05 + 7 / 60) / 0.2] * 2001)
    worse = [row("finetuning", 0.1, 2.0), row("finetuning", 0.15, 2.5, 2e-5)]
    assert areas(initial, worse)[0] == pytest.approx((0.05 + 0.1) / 0.2)
    text = frontiers(initial, [*runs, *worse, row("a control of one rate", 0.1, 0.0)])
    assert "| DiSC | 0.833 ± 0.000 |  | 1e-05, 2e-05 | 1 |" in text
    assert "| finetuning | 0.750 ± 0.000 | **-0.083 ± 0.000** |" in text and "control" not in text
    # A second seed, of DiSC alone: 0 at one rate, and a run that broke down, so half; a third that lacks a rate.
    broken = {"name": "DiSC", "learning_rate": 1e-5, "seed": 1, "failed": True}
    more = [row("DiSC", 0.4, 3.0, 2e-5, seed=1), broken, row("DiSC", 0.1, 0.0, seed=2)]
    text = frontiers(initial, [*runs, *worse, *more])
    assert "| DiSC | 0.417 ± 0.000 |  | 1e-05, 2e-05 | 2, 0.589 |" in text
    assert "| finetuning | 0.750 ± 0.000 | **-0.083 ± 0.000** | 1e-05, 2e-05 | 1 |" in text, "paired by seed"
    assert frontiers(initial, [row("DiSC", 0.1, 2.0), row("finetuning", 0.1, 2.0, 2e-5)]) == ""


def test_where_no_text_is_read_the_area_is_against_what_well_known_entities_lost(real_model):
    """By hand: NLL up by 0.1, uptake 1, and down by 0.3, uptake 0.5: that lost nothing, so it begins at (0, 0.5)."""
    import page

    def row(name, specificity, nll, rate=1e-5):
        probes = {"Entity Inferences": {"0 0": [9.0, 0, 9.0, nll], "1 0": [9.0, 1, 9.0, nll]}}
        probes |= {"specificity": {"0 0": [specificity, 1], "1 0": [specificity, 1]}}
        row = {"name": name, "size": "one_entity", "learning_rate": rate, "seed": 0, "probes": probes, "texts": {}}
        return row | {"tasks": [], "seconds": {"training": 1, "measuring": 1}}

    initial = row(page.INITIAL, 4.0, 3.0) | {"texts": {"for": [10, 1.0, 0.0]}}
    text = page.section([initial, row("DiSC", 4.1, 2.0, 2e-5), row("DiSC", 3.7, 2.5)], "one_entity")
    assert "| DiSC | 0.875 ± 0.000 |  | 1e-05, 2e-05 | 1 |" in text  # (0.1 * 0.75 + 0.1 * 1) / 0.2
    assert "up to a rise of 0.2 in specificity, NLL (" in text
    # Two that lost as much, beyond 0.2: the better one is the frontier's corner, in whatever order they come.
    alike = [row("DiSC", 4.4, 2.0), row("DiSC", 4.4, 1.0, 2e-5)]
    for runs in (alike, alike[::-1]):
        assert page.areas(initial, runs, "specificity, NLL")[0] == pytest.approx(0.5)
    less = row("DiSC", 4.1, 2.0)
    less["probes"]["Entity Inferences"]["1 1"] = [9.0, 1, 9.0, 2.0]
    with pytest.raises(ValueError, match="expected rows of the same probes"):
        page.areas(initial, [less], "specificity, NLL")


def test_a_run_of_some_entities_has_no_area_and_is_compared_with_none_of_others(real_model):
    import page

    def row(name, entities, rate, nll=2.0, specificity=4.1):
        probes = {"Entity Inferences": {f"{entity} 0": [9.0, 0, 9.0, nll] for entity in entities}}
        probes |= {"specificity": {"0 0": [specificity, 1], "1 0": [specificity, 1]}}
        row = {"name": name, "learning_rate": rate, "seed": 0, "probes": probes, "texts": {}, "entities": len(entities)}
        return row | {"tasks": [], "seconds": {"training": 1, "measuring": 1}}

    initial = row(page.INITIAL, "012", 0, 3.0, 4.0) | {"texts": {"for": [10, 1.0, 0.0]}}
    del initial["entities"]
    whole = [row(name, "012", rate) for name in ("DiSC", "split finetuning") for rate in (1e-5, 2e-5)]
    partly = [row("split finetuning", "01", 4e-5), row("DiSC", "012", 4e-5, 0.0)]
    text = page.section([initial, *whole, *partly], "one_entity")
    assert "| split finetuning | 0.750 ± 0.000 | " in text and "| 1e-05, 2e-05 | 1 |" in text
    assert "| DiSC | 2.250 ± 0.000 |  | 1e-05, 2e-05, 4e-05 | 1 |" in text
    assert "| DiSC, 4e-05, 3 entities |" not in text.partition("From split finetuning")[2]
    broken = {"name": "DiSC", "learning_rate": 4e-5, "seed": 0, "entity": 2, "failed": True}
    text = page.section([initial, *whole, row("DiSC", "01", 4e-5, 0.0), broken], "one_entity")
    assert (
        "| DiSC | 0.750 ± 0.000 |  | 1e-05, 2e-05, 4e-05 | 1 |" in text and "Broke down: DiSC, 4e-05, entity 2" in text
    )


def test_runs_are_compared_with_true_texts_with_updates_alone_and_over_seeds(real_model):
    import page

    def row(name, right, seed=0, nll=2.0):
        probes = {"Entity Inferences": {"0 0": [nll, right[0], nll, nll], "1 0": [nll, right[1], nll, nll]}}
        probes |= {"false answer": {"0 0": [1.0, 1 - right[0]], "1 0": [1.0, 1 - right[1]]}}
        probes |= {"specificity": {"0 0": [4.0, 1], "1 0": [4.0, 1]}}
        row = {"name": name, "learning_rate": 2e-5, "seed": seed, "probes": probes, "texts": {}, "tasks": []}
        return row | {"seconds": {"training": 1, "measuring": 1}}

    initial = row(page.INITIAL, (0, 0)) | {"texts": {"for": [10, 1.0, 0.0]}}
    rows = [initial, row("DiSC", (1, 1)), row("DiSC, false texts", (1, 0)), row("DiSC", (0, 1), seed=1, nll=3.0)]
    text = page.section(rows, "false_texts", [row("DiSC", (0, 0)) | {"entities": 2}])
    true_texts, alone = text.partition("From the same from true texts")[2].split("From each entity's update alone")
    alone, seeds = alone.split("standard deviation over seeds")
    assert "| DiSC, false texts, 2e-05 | -50.0 ± 50.0 | +0.000 ± 0.000 |" in true_texts
    assert "| DiSC, 2e-05 | **+100.0 ± 0.0** |" in alone and "seed 1" not in alone and "false texts" not in alone
    assert "| DiSC, 2e-05, seed 0, 1 | 75.0 ± 35.4 | 2.500 ± 0.707 |" in seeds and "false texts" not in seeds
    # Entity 0 is right in one of two seeds, entity 1 in both; by split finetuning never. The third lacks an entity.
    others = [row("split finetuning", (0, 0)), row("split finetuning", (0, 0), seed=1)]
    partly = row("DiSC", (1, 1), seed=2)
    del partly["probes"]["Entity Inferences"]["0 0"]
    text = page.section([*rows, *others[::-1], partly], "more_seeds")
    assert "| DiSC, 2e-05, seed 0, 1 | **+75.0 ± 25.0** |" in text.partition("From split finetuning, means over")[2]
    third = row("DiSC", (1, 1), seed=2)  # compared over the seeds that both have
    text = page.section([*rows, *others, third], "more_seeds")
    assert "| DiSC, 2e-05, seed 0, 1 | **+75.0 ± 25.0** |" in text.partition("From split finetuning, means over")[2]
    # From false texts split finetuning is the base of what was made from false texts.
    false = row("split finetuning, false texts", (0, 0))
    text = page.section([*rows, *others, false], "false_texts").partition("From split finetuning at")[2]
    assert (
        "| DiSC, false texts, 2e-05 | +50.0 ± 50.0 |" in text
        and "| split finetuning, false texts" not in text.partition("From")[0]
    )
    del third["probes"]["false answer"]
    with pytest.raises(ValueError, match=r"expected rows of DiSC, 2e-05 that were measured alike, got others"):
        page.section([*rows, third, row("split finetuning", (0, 0), seed=2), *others], "more_seeds")
    assert "false answer, % given" in text
