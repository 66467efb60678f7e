"""Make tests quick enough under Triton's interpreter, which takes about a tenth of a second a row."""

import math
from collections import defaultdict
from typing import Any

import pytest


def patch_language_once_a_launch() -> None:
    """Let the interpreter replace the functions of Triton's language once a launch and module.

    It looks through the whole language again at every call of a device function, where nothing is left to replace.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()  # the launch before has put the language back
        launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


def left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of impl="triton" that the interpreter need not run.

    Where a test has all combinations of several parameters, the one with the fewest values takes them in turn instead:
    of three parameters all pairs are tried, of two every value.
    """
    tests: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if "triton" in (given.get("impl"), given.get("fused_impl")):
            tests[item.nodeid.partition("[")[0]].append(item)
    return [item for runs in tests.values() for item in _beyond_pairs(runs)]


def _beyond_pairs(runs: list[Any]) -> list[pytest.Item]:
    """Return the runs of one test in which the shortest parameter does not have the value whose turn it is."""
    columns = {_numbered([repr(run.callspec.params[name]) for run in runs]) for name in runs[0].callspec.params}
    varied = sorted((column for column in columns if max(column) > 0), key=lambda column: (max(column), column))
    if len(varied) < 2 or math.prod(max(column) + 1 for column in varied) != len(runs):
        return []
    shortest, *others = varied
    turns = (sum(numbers) % (max(shortest) + 1) for numbers in zip(*others, strict=True))
    return [run for run, number, turn in zip(runs, shortest, turns, strict=True) if number != turn]


def _numbered(values: list[str]) -> tuple[int, ...]:
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return tuple(numbers[value] for value in values)
