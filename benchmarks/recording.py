"""Keep a row of results for every measurement, and for every one that could not be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.peers import NotAvailable, reason


@contextmanager
def recorded(
    rows: list[dict[str, Any]], benchmark: Any, /, system: str, *, strict: bool = False, **known: Any
) -> Iterator[dict[str, Any]]:
    """Add a row of results that the block fills; its `status` is "measured", or says why there is no measurement.

    A test without a measurement is skipped. Ours may run out of memory or not be available on a device, but its other
    errors make the test fail; if `strict`, everybody's do.
    """
    row = {"status": "failed: see the output of the test", "system": system, **known}
    rows.append(row)
    try:
        yield row
    except Exception as error:
        row["status"] = reason(error)
        excused = isinstance(error, NotAvailable) or row["status"] == "out of memory"
        if (strict or system.startswith("ours")) and not excused:
            raise
    # Outside the `except`: its traceback would keep the tensors of a system that ran out of memory.
    if row["status"] != "measured":
        pytest.skip(row["status"])
    benchmark.extra_info |= row  # for --benchmark-json
