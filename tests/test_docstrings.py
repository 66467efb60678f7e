"""Docstrings say in their first line what the thing does, and begin with the verb."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("disc_kernels", "disc_train", "benchmarks", "examples", "tests")
NO_VERB = re.compile(
    r"""(?x)
    (?! [A-Z][a-z]+ (-[a-z]+)? ,? \s )      # code, a symbol, a list, or a single word
    | \w+ (?<!s) s \b | \w{3,} ing \b       # "Documents", "Takes", "Training"
    | ( A | An | The | This | That | These | Those | It | Its | You | One | Two | Both | All | Every | Each | Any
      | Some | No | None | What | Who | Whose | How | When | Where | Whether | Which | Why | If | As | So | Only
      | Not | Of | In | On | At | By | For | From | To | With | Without | Within | Between | Behind | Beside
      | Before | After | Into | Under | Up | Per | Like | Here | There | Same | Once | First | Last | Next
      | Another | Other | More | Most | Percent
      ) \b
    """
)


def non_verb_openers(source: str) -> Iterator[str]:
    """Yield name and first line of every docstring that does not begin with a verb."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = (ast.get_docstring(node) or "Say nothing.").partition("\n")[0]
        if NO_VERB.match(first):
            yield f"{getattr(node, 'name', 'the module')}: {first}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_begin_with_a_verb(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    if folder == "tests":  # what its helpers do; a test itself says what holds
        files = [path for path in files if not path.name.startswith("test_")]
    found = [f"{path.relative_to(ROOT)}: {line}" for path in files for line in non_verb_openers(path.read_text())]
    assert files and not found, "\n".join(found)


@pytest.mark.parametrize(
    "first", ["The loss.", "Of rows.", "How many times faster.", "M.", "`x` doubled.", "Takes a step.", "Rows -> text."]
)
def test_other_openers_are_found(first):
    assert list(non_verb_openers(f'class A:\n    def f():\n        """{first}"""')) == [f"f: {first}"]
