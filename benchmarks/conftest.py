"""Rows of results: every measurement, and every one that could not be made, ends up in a table.

A table is named after its test file: `test_linear_kl.py` fills `linear_kl`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment, report

TABLES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, metavar="DIR", help="write rows, tables and plots of this run to DIR/<device>/"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Adds a row to the table of this test file and returns it; what it is given later is in the results too."""

    def add(**known: Any) -> dict[str, Any]:
        row = {"status": "failed: see the output of the test", **known}
        request.config.stash[TABLES].setdefault(request.path.stem.removeprefix("test_"), []).append(row)
        return row

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
