"""Keep a row of results for every measurement, and for every one that could not be made.

A table is named after its test file: `test_linear_kl.py` fills `linear_kl`. With `--results` a table's JSON is written
anew after every row, so that a run that is killed loses one measurement; Markdown and plots follow at the end.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, report
from benchmarks.recording import recorded

TABLES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, metavar="DIR", help="write rows, tables and plots of this run to DIR/<device>/"
    )
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="measure for S seconds, the most important cases first; what is left out is a row that says so",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}
    config.stash[START] = time.monotonic()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import patch_language_once_a_launch

        patch_language_once_a_launch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test of a case and a system all that its module measures on this device, or rehearses for a GPU."""
    if not {"case", "system"} <= set(metafunc.fixturenames):
        return
    cases = metafunc.module.CASES[metafunc.module.DEVICE]
    if metafunc.config.getoption("rehearsal"):
        cases = [case.rehearsed() for case in metafunc.module.CASES["cuda"]]
    measurements = [pytest.param(case, system, id=f"{case.name}-{system}") for case in cases for system in case.systems]
    metafunc.parametrize(("case", "system"), measurements)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return getattr(case, "rank", 0)

    items.sort(key=rank)  # stable: cases and systems of one rank stay in the order in which they are listed


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: Any
) -> Iterator[Callable[..., AbstractContextManager[dict[str, Any]]]]:
    """Yield `record`: `with record(system=..., ...) as row` adds a row to this test file's table; see `recorded`."""
    config, name = request.config, request.path.stem.removeprefix("test_")
    rows = config.stash[TABLES].setdefault(name, [])
    seconds = config.getoption("seconds")

    def add(**known: Any) -> AbstractContextManager[dict[str, Any]]:
        if time.monotonic() - config.stash[START] > seconds:
            rows.append({"status": f"left out: {seconds:g} seconds were spent on what stands before", **known})
            pytest.skip(rows[-1]["status"])
        return recorded(rows, benchmark, strict=config.getoption("rehearsal"), **known)

    yield add
    if config.getoption("results"):
        report.save(config.getoption("results") / environment.folder_name(), name, _run(name, rows))


def _run(name: str, rows: list[dict[str, Any]]) -> report.Run:
    return report.finished(name, rows, environment.describe())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.getoption("results")
    for name, rows in config.stash[TABLES].items():
        run = _run(name, rows)
        terminalreporter.section(name)
        terminalreporter.write_line(report.markdown(name, run))
        if results:
            for line in report.write(results / environment.folder_name(), name, run):
                terminalreporter.write_line(line)
