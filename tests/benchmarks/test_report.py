"""Rows become a table that says everything they say, and plots where there is matplotlib."""

import json
import sys

import pytest

from benchmarks import report


def row(case: str, system: str, tokens: int = 512, **fields):
    shape = {"tokens": tokens, "rows": tokens, "hidden": 896, "vocab": 50257, "dtype": "float32"}
    kind = {"frozen_head": False, "backward": True, "valid_percent": 100, "shared": 1, "summarised": False}
    return {"case": case, "system": system, **shape, **kind, "status": "measured", **fields}


def measured(case: str, system: str, seconds: float, tokens: int = 512):
    errors = {} if system == "products" else {"loss": 2e-9, "hidden": 6e-7}
    figures = {"seconds": seconds, "rounds": 3, "bytes_above": None if system == "products" else 2**20 * tokens}
    return row(
        case, system, tokens, **figures, errors=errors, float32_logits_errors={k: v / 2 for k, v in errors.items()}
    )


@pytest.fixture
def run():
    rows = [
        measured("gpt2", "products", 0.8),
        measured("gpt2", "ours", 1.0),
        row("gpt2", "trl_chunked", status="not installed: No module named 'trl'"),
        measured("gpt2-n2048", "products", 3.2, 2048),
        measured("gpt2-n2048", "ours", 4.8, 2048),
        row("gpt2-n2048", "eager", 2048, status="out of memory"),
        row("gpt2", "fla_fused", status="wrong: relative gradient error of weight 1.3e-01"),
    ]
    return report.finished("linear_kl", rows, {"device": "some GPU", "commit": "abc"})


def line(text: str, case: str, system: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    [found] = [cells for cells in lines if cells[0] == case and cells[2:3] == [system]]
    return found


def test_time_over_the_limit_of_the_same_case(run):
    assert [row.get("over_limit") for row in run["rows"]] == [1.0, 1.25, None, 1.0, pytest.approx(1.5), None, None]


def test_table(run):
    text = report.markdown("linear_kl", run)
    assert "- device: some GPU" in text
    assert line(text, "gpt2", "ours")[3:] == ["1,000", "1.25", "512", "2.0e-09 (2.00)", "6.0e-07 (2.00)", ""]
    assert line(text, "gpt2", "products")[3:] == ["800", "1.00", "", "", "", ""]
    assert line(text, "gpt2", "trl_chunked")[3] == "not installed: No module named 'trl'"
    assert line(text, "gpt2-n2048", "eager")[3] == "out of memory"
    assert line(text, "gpt2", "fla_fused")[3].startswith("wrong: ")


def test_a_case_whose_limit_was_not_measured():
    run = report.finished("linear_kl", [measured("gpt2", "ours", 1.0)], {"device": "cpu"})
    assert line(report.markdown("linear_kl", run), "gpt2", "ours")[3:5] == ["1,000", ""]


def test_files(run, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["linear_kl.json", "linear_kl-time.png", "linear_kl-memory.png", "linear_kl.md"]
    assert list(report.write(tmp_path, "linear_kl", run)) == [str(tmp_path / name) for name in names]
    assert json.loads((tmp_path / "linear_kl.json").read_text()) == run
    assert "](linear_kl-memory.png)" in (tmp_path / "linear_kl.md").read_text()
    for plot in tmp_path.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(run, tmp_path, monkeypatch):
    (tmp_path / "linear_kl-time.png").write_text("another run's")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = list(report.write(tmp_path, "linear_kl", run))
    assert sum("matplotlib is not installed" in line for line in said) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"linear_kl.json", "linear_kl.md"}
    text = (tmp_path / "linear_kl.md").read_text()
    assert "linear_kl-time.png not drawn: matplotlib is not installed" in text
    assert line(text, "gpt2", "ours")[4] == "1.25"


def test_rendered_again_from_the_rows(run, tmp_path, capsys):
    list(report.write(tmp_path, "linear_kl", run))
    before = (tmp_path / "linear_kl.md").read_text()
    (tmp_path / "linear_kl.md").unlink()
    report.main(tmp_path)
    assert (tmp_path / "linear_kl.md").read_text() == before
    assert "linear_kl.md" in capsys.readouterr().out


@pytest.fixture
def steps():
    def step(system: str, documents: int, **fields):
        case = {"case": f"tiny-sentence-d{documents}", "shape": "tiny", "precision": "float32", "suffixes": "sentence"}
        return case | {"documents": documents, "system": system, "status": "measured"} | fields

    held = {"bytes": 3 * 2**30, "bytes_above": 2**29}
    errors = {"loss": 1e-8, "head": 2e-7, "first": 3e-7}
    rows = [
        step("per_split_loop", 4, seconds=2.0, errors={}, **held),
        step("ours", 4, seconds=0.5, errors=errors, **held),
        step("per_split_loop", 16, seconds=8.0, errors={}, **held),
        step("ours", 16, status="out of memory"),
    ]
    return report.finished("step", rows, {"device": "some GPU"})


def test_steps_are_compared_with_the_loop(steps):
    text = report.markdown("step", steps)
    errors = ["1.0e-08", "2.0e-07", "3.0e-07"]
    assert line(text, "tiny-sentence-d4", "ours")[3:] == ["8", "4.00", "3", "0.5", *errors]
    assert line(text, "tiny-sentence-d4", "per_split_loop")[3:] == ["2", "1.00", "3", "0.5", "", "", ""]
    assert line(text, "tiny-sentence-d16", "ours")[3] == "out of memory"


def test_plot_of_steps(steps, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["step.json", "step-speed.png", "step.md"]
    assert list(report.write(tmp_path, "step", steps)) == [str(tmp_path / name) for name in names]


def test_plot_without_a_measurement_of_ours(steps, tmp_path):
    pytest.importorskip("matplotlib")
    steps["rows"] = [row for row in steps["rows"] if row["system"] != "ours"]
    assert list(report.write(tmp_path, "step", steps)) == [str(tmp_path / name) for name in ("step.json", "step.md")]
