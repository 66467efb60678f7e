"""The example on a real model, at the tiny one with made-up data: from files of data to a page."""

import io
import json
import math
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

EXAMPLES = Path(__file__).parents[3] / "examples"
SIZE = {
    "entities": 2,
    "ecbd": 2,
    "texts": 2,
    "items": 2,
    "cache": True,
    "learning_rates": [1e-4],
    "seeds": [0],
}


@pytest.fixture
def data(tmp_path):
    """Files of the forms that prepare.py reads, in words of the tiny model's world."""

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def record(name, number, **more):
        return {
            "ent_str": name,
            "context": f"{name} is a town with {number} mills.",
            "augmented_probes": [f"{name} has {number} mills", f"There are {number} mills in {name}."],
            "probe_sentences": {"template_0": {"probe_sentence": f"In {name} are <extra_id_0> mills."} | more},
        }

    numbers = ["two", "four", "six"]
    labels = [f"<extra_id_0> {number} <extra_id_1>" for number in numbers]
    names = [(f"Town {letter}", number) for letter, number in zip("ABC", numbers, strict=True)]
    write("entity_inferences_augmented.json", [record(*n, labels=labels) | {"label": n[1]} for n in names] * 2)
    spans = [record(name, number, label=f"<extra_id_0> {number} <extra_id_1>") for name, number in names]
    write("ecbd_2023_augmented.json", spans)
    write("specificity_popular_20np_20random.json", spans)
    examples = [{"input": f"What is {i}?", "target_scores": {"no": 0, "yes": 1}} for i in range(3)]
    with tarfile.open(tmp_path / "bigbench.tar.gz", "w:gz") as archive:
        for task in ("crass_ai", "implicatures", "not_asked"):
            content = json.dumps({"examples": examples}).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_have_the_right_choice_first_and_nothing_from_behind_the_blank(real_model, data, tmp_path, monkeypatch):
    import prepare

    prepare.prepare(data, tmp_path / "out", SIZE, data / "bigbench.tar.gz")
    documents, records, uptake = (read(tmp_path / "out" / f"{n}.jsonl") for n in ("documents", "records", "uptake"))
    assert documents[0] == {
        "id": "Town A",
        "text": "Town A is a town with two mills. Town A has two mills. There are two mills in Town A.",
    }
    assert records[0] == {"teacher_context": "Town A is a town with two mills.\n", "target": "Town A has two mills."}
    assert [(each["group"], each["prompt"], each["choices"][0]) for each in uptake][::4] == [
        ("Entity Inferences", "In Town A are", " two"),
        ("ECBD", "In Town A are", " two"),
    ]
    assert {each["choices"][1] for each in uptake if each["group"] == "ECBD"} == {" two", " four"}
    tasks = read(tmp_path / "out" / "tasks.jsonl")
    assert [(each["group"], each["choices"]) for each in tasks[::2]] == [
        ("crass_ai", [" yes", " no"]),
        ("implicatures", [" yes", " no"]),
    ]
    monkeypatch.setattr(prepare, "TASKS", ("crass_ai", "known_unknowns"))
    with pytest.raises(ValueError, match=r"bigbench.tar.gz: expected .* without bigbench/.*/known_unknowns/task.json"):
        prepare.tasks(data / "bigbench.tar.gz", 2)


def test_false_texts_are_anothers_under_this_ones_name_and_asked_for(real_model, data, tmp_path):
    import prepare

    size = SIZE | {"entities": 3, "ecbd": 0, "items": 0, "one_at_a_time": True}
    prepare.prepare(data, tmp_path / "true", size, None)
    prepare.prepare(data, tmp_path / "out", size | {"false_texts": 1}, None)
    assert read(tmp_path / "out" / "false_documents.jsonl")[2] == {
        "id": "Town C",
        "text": "Town C is a town with six mills. Town C has six mills. Town C has two mills.",
    }
    entity = tmp_path / "out" / "entities" / "2"
    texts = ["Town C has six mills.", "Town C has two mills."]
    assert [record["target"] for record in read(entity / "false_records.jsonl")] == texts
    assert {record["teacher_context"] for record in read(entity / "false_records.jsonl")} == {
        "Town C is a town with six mills.\n"
    }
    for file in (entity / "uptake.jsonl", tmp_path / "out" / "ceiling.jsonl"):
        asked = {each["id"]: each for each in read(file) if each["group"] == "false answer"}
        assert asked["false answer 2 1"]["choices"] == [" two", " six", " four"]
    for name in ("documents", "records", "kept"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_text() == (tmp_path / "true" / f"{name}.jsonl").read_text()
    lines = [json.loads(line) for line in (data / prepare.INFERENCES).read_text().splitlines()]
    (data / prepare.INFERENCES).write_text("".join(json.dumps(line | {"label": "two"}) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"expected for Town A more than 1 texts, and another entity .* got none"):
        prepare.prepare(data, tmp_path / "alike", size | {"false_texts": 1}, None)
    with pytest.raises(ValueError, match="expected for Town A more than 2 texts"):
        prepare.prepare(data, tmp_path / "all", size | {"false_texts": 2}, None)
    with pytest.raises(ValueError, match="one_at_a_time: expected no entities of ECBD, got 2"):
        prepare.prepare(data, tmp_path / "both", size | {"ecbd": 2}, None)
    lines[1]["context"] = f"{lines[0]['context']} It is old"
    (data / prepare.INFERENCES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="expected no entity whose definition begins as that of Town B does, got one"):
        prepare.prepare(data, tmp_path / "prefix", size, None)


@pytest.mark.slow
def test_every_run_gives_a_line_and_what_is_there_is_not_made_again(real_model, data, tmp_path):
    import run
    from prepare import prepare

    out, model, results = tmp_path / "out", str(EXAMPLES / "tiny" / "model"), tmp_path / "runs.jsonl"
    prepare(data, out, SIZE, data / "bigbench.tar.gz")
    grid = yaml.safe_load(run.GRID.read_text())
    names = ["DiSC", "split finetuning", "CD-base"]
    grid |= {"sizes": {"quick": SIZE}, "methods": {name: grid["methods"][name] for name in names}}
    grid["controls"] = {"DiSC, top 1": grid["controls"]["DiSC, top 1"]}
    run.run(grid, out, model, results, "quick", jobs=1, only=["DiSC"])
    run.run(grid, out, model, results, "quick", jobs=1)
    run.run(grid, out, model, results, "quick", jobs=1, only=["DiSC, top 1"])
    with pytest.raises(ValueError, match=r"runs.jsonl: expected in the size quick rows of one model alone, got two"):
        run.run(grid, out, str(tmp_path), results, "quick", jobs=1)
    grid["controls"]["DiSC, top 1"] |= {"top_k": 2}  # no flag of disc-train
    with pytest.raises(ValueError, match=r"expected DiSC, top 1 .* got other top_k=1, top_k=2"):
        run.run(grid, out, model, results, "quick", jobs=1, only=["DiSC, top 1"])
    grid["methods"]["DiSC"] = grid["methods"]["DiSC"] | {"num_splits": 3}
    with pytest.raises(ValueError, match=r"expected DiSC .* got other --num_splits=3, --num_splits=5"):
        run.run(grid, out, model, results, "quick", jobs=1)
    rows = read(results)
    assert [row["name"] for row in rows] == ["initial model", *names, "DiSC, top 1"]
    assert rows[1]["texts"] != rows[-1]["texts"], "the loss of the likeliest token alone is another"
    assert not any(row.get("failed") for row in rows)
    for row in rows[1:]:
        assert row["probes"].keys() - {"crass_ai", "implicatures"} == {"Entity Inferences", "ECBD", "specificity"}
        assert all(kl > 0 for _, _, kl in row["texts"].values())


def test_nothing_more_is_made_after_an_interruption(real_model, tmp_path, monkeypatch):
    import run

    made, ended = [], []

    def make(grid, cell, data, model):
        made.append(cell)
        raise KeyboardInterrupt

    size = SIZE | {
        "cache": False,
        "methods": ["split finetuning", "finetuning", "TALR"],
        "learning_rates": [1e-4, 2e-4],
    }
    grid = yaml.safe_load(run.GRID.read_text()) | {"sizes": {"quick": size}, "controls": {}}
    results = tmp_path / "runs.jsonl"
    results.write_text(json.dumps({"name": run.INITIAL, "size": "quick", "tasks": []}) + "\n")
    (tmp_path / "tasks.jsonl").touch()
    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run, "made_of", lambda *_: {"model": "a", "data": "b"})
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))
    job = SimpleNamespace(terminate=lambda: ended.append("a run in its middle"))
    monkeypatch.setattr(run.multiprocessing, "active_children", lambda: [job])
    with pytest.raises(KeyboardInterrupt):
        run.run(grid, tmp_path, "no model is read", results, "quick", jobs=2)
    assert len(made) <= 2 and len(ended) == 1


def test_a_folder_is_of_one_size_and_whole(real_model, data, tmp_path, monkeypatch, capsys):
    import prepare
    import rows

    out = tmp_path / "out"
    prepare.prepare(data, out, SIZE, None)
    assert rows.made_of(out, str(tmp_path), SIZE).keys() == {"model", "data"}
    with pytest.raises(ValueError, match=r"--size: .* \(entities: 2\), got one with entities: 8"):
        rows.made_of(out, str(tmp_path), SIZE | {"entities": 8})
    with pytest.raises(ValueError, match=r"augmented.json: expected at least 8 entities, got 3"):
        prepare.prepare(data, out, SIZE | {"entities": 8}, None)
    with pytest.raises(ValueError, match="--data_folder: expected a folder that"):
        rows.made_of(out, str(tmp_path), SIZE)
    (data / prepare.ECBD).unlink()
    monkeypatch.setattr("sys.argv", ["prepare.py", "--data_folder", str(data), "--output_dir", str(out)])
    monkeypatch.setattr(prepare, "download", lambda *_: pytest.fail("358 MB for nothing"))
    with pytest.raises(SystemExit):
        prepare.main()
    assert f"missing: {prepare.ECBD}" in capsys.readouterr().err


def test_rows_of_something_else_are_refused_and_a_line_that_was_cut_off_is_none(real_model, tmp_path):
    from rows import add, open_results, read_results

    path, ours = tmp_path / "runs.jsonl", {"model": "a", "data": "b"}
    row = {"name": "DiSC", "size": "quick", "learning_rate": 1e-4, "seed": 0, "seconds": 1}
    assert open_results(path, "quick", ours) == []
    add(path, row)  # one of the first, which do not say what they were made of
    add(path, row | ours | {"seed": 1})
    whole = path.read_text()
    path.write_text(whole + '{"name": "TALR", "si')
    assert len(read_results(path)) == 2 and path.read_text() != whole
    assert len(open_results(path, "quick", ours)) == 2 and path.read_text() == whole
    for other in ({"model": "c"}, {"data": "c"}):
        (name,) = other
        path.write_text(whole)
        with pytest.raises(
            ValueError, match=f"runs.jsonl: expected in the size quick rows of one {name} alone, got two"
        ):
            open_results(path, "quick", ours | other)
        path.write_text(whole + json.dumps(row | ours | other | {"seed": 2}) + "\n")
        with pytest.raises(ValueError, match=f"rows of one {name} alone"):
            read_results(path)
    path.write_text(whole + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"expected one row of a run, got two of \('quick', 'DiSC'"):
        read_results(path)
    path.write_text(whole + "DiSC\n" + whole)
    with pytest.raises(ValueError, match=r"runs.jsonl:3: expected a JSON record, got 'DiSC'"):
        read_results(path)


@pytest.mark.slow
def test_an_entity_that_is_taught_alone_is_asked_alone(real_model, data, tmp_path):
    import page
    import run
    from prepare import prepare

    size = SIZE | {"ecbd": 0, "items": 0, "cache": False, "one_at_a_time": True, "methods": ["split finetuning"]}
    grid = yaml.safe_load(run.GRID.read_text()) | {"sizes": {"alone": size | {"common": {"num_train_epochs": 2}}}}
    out, results = tmp_path / "out", tmp_path / "runs.jsonl"
    prepare(data, out, size, None)
    texts = [record["target"] for record in read(out / "entities" / "1" / "records.jsonl")]
    assert texts == ["Town B has four mills.", "There are four mills in Town B."]
    mismatched = read(out / "entities" / "1" / "mismatched.jsonl")
    assert [record["target"] for record in mismatched] == texts
    assert not any("Town B" in record["teacher_context"] for record in mismatched)
    with pytest.raises(
        ValueError, match=r"--only: .* size alone some of \['split finetuning'\], got \['CD-base, T = 2'\]"
    ):
        run.run(grid, out, "no model is read", results, "alone", jobs=1, only=["CD-base, T = 2"])
    (out / "model").symlink_to(EXAMPLES / "tiny" / "model")
    run.run(grid, out, str(out / "model"), results, "alone", jobs=1)
    initial, *rows = read(results)
    assert [row["entity"] for row in rows] == [0, 1]
    for row in rows:
        assert {number.partition(" ")[0] for number in row["probes"]["Entity Inferences"]} == {str(row["entity"])}
        assert all(len(values) == 4 for values in row["probes"]["Entity Inferences"].values())  # beside the other's
        assert row["probes"]["specificity"] != initial["probes"]["specificity"] and row["texts"] == {}
        assert "--num_train_epochs=2" in row["flags"]
        assert not any(str(tmp_path) in flag for flag in row["flags"])  # no path of the machine in results
    first, second = (row["probes"] for row in rows)
    (together,) = page.joined(rows)
    assert together["probes"]["Entity Inferences"] == first["Entity Inferences"] | second["Entity Inferences"]
    number = next(iter(first["specificity"]))
    both = first["specificity"][number][0] + second["specificity"][number][0]
    assert together["probes"]["specificity"][number][0] == pytest.approx(both / 2)
    rows[1] = {name: rows[1][name] for name in ("name", "size", "learning_rate", "seed", "entity")} | {"failed": True}
    rows[1] |= {name: initial[name] for name in ("machine", "python", "torch", "transformers")}
    for number, name in enumerate(["2 entities |", "1 entities |"]):
        page.write_page(results)
        text = (tmp_path / "results.md").read_text()
        assert f"| split finetuning, 0.0001, {name}" in text
        assert ("Broke down: split finetuning, 0.0001, entity 1." in text) is bool(number)
        results.write_text("".join(json.dumps(row) + "\n" for row in (initial, *rows)))


def test_no_run_of_a_size_is_made_twice(real_model):
    import run

    grid = yaml.safe_load(run.GRID.read_text())
    for size in grid["sizes"]:
        cells = [tuple(cell.items()) for cell in run.cells(grid, size)]
        assert len(cells) == len(set(cells)), size
    rates = [cell["learning_rate"] for cell in run.cells(grid, "default") if cell["name"] == "DiSC + LoRA"]
    assert rates == grid["controls"]["DiSC + LoRA"]["learning_rates"]
    assert not any(
        flag.startswith("--learning_rates")
        for cell in run.cells(grid, "default")
        for flag in run.training_flags(grid, cell, Path(), "")
    )


@pytest.mark.slow
def test_each_of_several_updates_begins_where_the_last_one_ended(real_model, data, tmp_path, monkeypatch):
    """The teacher is the model before each update, and all entities are asked about after the last."""
    import run
    from prepare import prepare

    size = SIZE | {"ecbd": 0, "items": 0, "cache": False, "one_at_a_time": True, "one_after_another": True}
    names = ["DiSC", "DiSC, T = 1, initial teacher"]
    grid = yaml.safe_load(run.GRID.read_text()) | {"sizes": {"after": size | {"methods": names}}}
    out, results, begun = tmp_path / "out", tmp_path / "runs.jsonl", []
    prepare(data, out, size, None)
    (out / "model").symlink_to(EXAMPLES / "tiny" / "model")
    train = run.train
    monkeypatch.setattr(run, "train", lambda *parsed: (begun.append(parsed), train(*parsed)))
    run.run(grid, out, str(out / "model"), results, "after", jobs=1)
    (first, ended), (second, _), *kept = begun
    assert (first.model_name_or_path, second.model_name_or_path) == (str(out / "model"), ended.output_dir)
    assert first.teacher_name_or_path is second.teacher_name_or_path is None  # the model that it begins from
    assert [each.train_file for each, _ in begun] == [[f"{out}/entities/{n}/documents.jsonl"] for n in (0, 1)] * 2
    assert [each.teacher_name_or_path for each, _ in kept] == [str(out / "model")] * 2
    assert kept[1][0].model_name_or_path == kept[0][1].output_dir
    initial, row, _ = read(results)
    assert row["probes"]["Entity Inferences"].keys() == initial["probes"]["Entity Inferences"].keys()
    assert row["texts"].keys() == initial["texts"].keys()
    assert not list((out / "trained" / "after").iterdir())


def test_what_makes_a_label_likelier_everywhere_is_no_knowledge(real_model):
    """Two entities with the same choices: own NLL less that after the other's words; one with choices of its own."""
    import run

    def asked(number, *shares):
        return {"id": f"E {number}", "group": "E", "scores": [math.log(share) for share in shares]}

    choices = {"E 0 0": [" a", " b"], "E 1 0": [" b", " a"], "E 2 0": [" c", " d"], "E 2 1": [" d", " c"]}
    probes = [asked("0 0", 0.9, 0.1), asked("1 0", 0.4, 0.6), asked("2 0", 0.5, 0.5), asked("2 1", 0.5, 0.5)]
    first, second, *alone = run.beside_others(probes, choices)
    assert first == pytest.approx([math.log(0.6) - math.log(0.9)])
    assert second == pytest.approx([math.log(0.1) - math.log(0.4)])
    assert alone == [[], []]


def test_part_of_an_update_is_kept(real_model, tmp_path):
    import run
    import torch
    from transformers import AutoModelForCausalLM

    initial = str(EXAMPLES / "tiny" / "model")
    model = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    run.keep_part(tmp_path, initial, 0.25)
    after = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.allclose(after, before + 0.25, atol=1e-6)


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_a_run_that_breaks_down_is_a_result(real_model, tmp_path, monkeypatch, where):
    """A loss that is NaN, or after the last step the model itself; nothing is left of it."""
    import run

    def break_down(*arguments):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(run, "train", lambda _, loop: Path(loop.output_dir).mkdir(parents=True))
    monkeypatch.setattr(run, where, break_down)
    for name in ("uptake", "kept", "tasks_kept"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    grid = yaml.safe_load(run.GRID.read_text())
    cell = next(cell for cell in run.cells(grid, "quick") if cell["name"] == "split finetuning")
    row = run.make(grid, cell, tmp_path, "no model is read")
    assert row["failed"] and cell.items() <= row.items()
    assert not [*tmp_path.glob("trained/*/*")]
