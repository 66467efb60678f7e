"""Rows of results: every measurement, and every one that could not be made, ends up in a table.

A table is named after its test file: `test_linear_kl.py` fills `linear_kl`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, report
from benchmarks.recording import recorded

TABLES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, metavar="DIR", help="write rows, tables and plots of this run to DIR/<device>/"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., AbstractContextManager[dict[str, Any]]]:
    """`with record(system=..., ...) as row` adds a row to this test file's table; see `recorded`."""

    def add(**known: Any) -> AbstractContextManager[dict[str, Any]]:
        rows = request.config.stash[TABLES].setdefault(request.path.stem.removeprefix("test_"), [])
        return recorded(rows, benchmark, **known)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.getoption("results")
    for name, rows in config.stash[TABLES].items():
        run = report.finished(name, rows, environment.describe())
        terminalreporter.section(name)
        terminalreporter.write_line(report.markdown(name, run))
        if results:
            for line in report.write(results / environment.folder_name(), name, run):
                terminalreporter.write_line(line)
