"""Sweeps: which runs lists make, what is taken again, the table, the trade-off."""

import json
import signal
import sys
import time
from itertools import combinations

import pytest

from disc_train import sweep
from disc_train.cli import main
from disc_train.parallel.termination import Terminated
from tests.train.commands import error_line
from tests.train.files import write_jsonl


@pytest.fixture
def config(model_folder, write_documents, sentences, tmp_path):
    """config(**settings): a YAML file of one plain step on two documents, with what is given."""

    def write(**settings):
        documents = write_documents(" ".join(text) for text in sentences[:2])
        common = {"model_name_or_path": str(model_folder), "train_file": str(documents), "save_strategy": "no"}
        common |= {"output_dir": str(tmp_path / "sweep"), "max_steps": 1, "use_cpu": True, "signal_examples": 0}
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(common | {"per_device_train_batch_size": 2} | settings))  # JSON is YAML
        return str(path)

    return write


@pytest.fixture
def in_this_process(monkeypatch):
    """Run each command here; returns the list of command lines."""
    taken = []

    def run(argv, log):
        taken.append(argv)
        log.write_text("")
        return main(argv)

    monkeypatch.setattr(sweep, "_run_process", run)
    return taken


def test_a_sweep_over_one_cache(config, in_this_process, tmp_path, capsys):
    choices = [" Merin", " Aral"]
    probes = [
        write_jsonl(tmp_path / f"{name}.jsonl", {"question": "Where?", "choices": choices, "answer": 0})
        for name in ("new", "known")  # what is to be learned comes first, whatever the letters
    ]
    lists = {"learning_rate": ["1e-2", 1e-12], "temperature": [1.0, 2.0]}
    cache = {"teacher": "cache", "teacher_cache": str(tmp_path / "cache"), "freeze_head": True}
    path = config(**lists, **cache, probes_file=list(map(str, probes)))
    assert main([path]) == 0
    folder = tmp_path / "sweep"
    found = json.loads((folder / "sweep.json").read_text())["runs"]
    assert list(found) == [
        f"learning_rate={rate}_temperature={t}" for rate in ("1e-2", "1e-12") for t in ("1.0", "2.0")
    ]
    assert all((folder / name / "model.safetensors").is_file() for name in found)
    # Summaries are of one temperature, so that each has a cache; the second learning rate reads those.
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"temperature=1", "temperature=2"}
    assert len(list((tmp_path / "cache").rglob("shard-*"))) == 2
    moved, still = found["learning_rate=1e-2_temperature=1.0"], found["learning_rate=1e-12_temperature=1.0"]
    assert moved["first"] == pytest.approx(still["first"])
    uptake, retention = sweep.trade_off(still)
    assert abs(uptake) < 1e-6 and abs(retention) < 1e-6
    assert sweep.trade_off({"first": {}, "last": {}}) is None
    table = (folder / "sweep.md").read_text().splitlines()
    assert table[2].startswith("| learning_rate | temperature | new accuracy | new logprob | known accuracy |")
    assert table[4].startswith("| 1e-2 | 1.0 | ") and table[4].endswith(" | finished |")
    assert (folder / "sweep.png").is_file()

    assert len(in_this_process) == 4
    assert main([path]) == 0  # nothing is left
    assert len(in_this_process) == 4
    capsys.readouterr()
    assert main([path, "--max_steps", "2"]) == 1
    assert "holds a sweep of other settings than its lists: expected flags [], got ['--max_steps'" in error_line(
        capsys, 1
    )


def test_a_failed_run_is_a_row_and_is_taken_again(config, tmp_path, capsys, monkeypatch):
    path = config(learning_rate=[1e-3])

    def fail(argv, log):
        log.write_text("Some lines\ndisc-train: error: no room | here\nMore\n")
        return 1

    monkeypatch.setattr(sweep, "_run_process", fail)
    assert main([path]) == 1
    out, err = capsys.readouterr()
    assert "  failed: disc-train: error: no room | here\n" in out
    assert "1 of 1 runs failed (learning_rate=0.001); see" in err
    assert (tmp_path / "sweep" / "sweep.md").read_text().splitlines()[4] == (
        "| 0.001 | disc-train: error: no room / here |"
    )
    monkeypatch.setattr(sweep, "_run_process", lambda argv, log: main(argv))
    assert main([path]) == 0
    assert "There is no sweep.png: it takes --probes_file of two groups" in capsys.readouterr().out
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert set(rows["learning_rate=0.001"]) == {"values", "first", "last"}


def test_names_in_the_picture_do_not_overlap(tmp_path, monkeypatch):
    """Even of runs whose points lie together."""
    matplotlib = pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    both = {"eval_probes_a_logprob": 0.0, "eval_probes_b_logprob": 0.0}
    names = [f"learning_rate={rate}_temperature=1.0" for rate in ("1e-4", "1e-5", "1e-6")]
    sweep.draw({name: {"first": both, "last": both} for name in names}, tmp_path / "sweep.png")
    drawn[0].draw_without_rendering()
    texts = [text for text in drawn[0].findobj(matplotlib.text.Text) if "rate=" in text.get_text()]
    assert len(texts) == 3
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_what_is_no_sweep(config, in_this_process, tmp_path, capsys, monkeypatch):
    """A flag wins over a list; a wrong value is found before anything runs; a dry run is one run's."""
    path = config(learning_rate=[1e-3, 1e-4])
    assert main([path, "--learning_rate", "1e-5", "--dry_run"]) == 0
    assert main([path, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("What will run") == 2
    assert main([config(temperature=[1, -1])]) == 2
    assert "--temperature: expected a positive, finite number, got -1.0" in error_line(capsys, 2)
    assert main([config(temperature=[])]) == 2
    assert "temperature: expected values, got an empty list" in error_line(capsys, 2)
    monkeypatch.setattr(sweep, "processes_started", lambda: 2)
    assert main([config(temperature=[1, 2])]) == 2
    assert "a sweep starts its runs itself: expected one process" in error_line(capsys, 2)
    assert not in_this_process and not (tmp_path / "sweep").exists()


def test_a_signal_ends_the_process_of_the_run_and_waits_for_it(tmp_path, monkeypatch):
    """The started program takes SIGTERM, and writes a line before it ends."""
    program = (
        "import signal,sys,time; signal.signal(15, lambda *_: (print('saved'), sys.exit(0))); print('up', flush=True)"
    )
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", f"{program}; time.sleep(60)"])
    log = tmp_path / "log"

    def terminate(*_):
        deadline = time.monotonic() + 30
        while not (log.exists() and "up" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, terminate)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Terminated):
            sweep._run_process([], log)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert log.read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGTERM) != terminate
