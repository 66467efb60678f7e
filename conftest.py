"""Take the option of every run of pytest here."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearsal",
        action="store_true",
        help="run on the CPU, at tiny sizes, what needs a GPU: tests marked gpu, and the GPU's benchmarks",
    )
