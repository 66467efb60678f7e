"""What the site's pages name is all there; `make docs` finds links that lead nowhere."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "api"
DOCUMENTED = {name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
CONSTANTS = {"FLEX", "VARLEN"}  # names that `attention_implementation` returns


@pytest.mark.parametrize("package", ["disc_kernels", "disc_kernels.hf", "disc_kernels.shared_prefix"])
def test_every_public_name_has_an_entry(package):
    documented = {name.rsplit(".", 1)[1] for name in DOCUMENTED if name.startswith("disc_kernels.")}
    assert set(importlib.import_module(package).__all__) - CONSTANTS <= documented


@pytest.mark.parametrize("module", ["trl", "liger"])
def test_every_integration_has_an_entry(module):
    home = f"disc_kernels.integrations.{module}"
    public = {
        f"{home}.{name}"
        for name, value in vars(importlib.import_module(home)).items()
        if getattr(value, "__module__", None) == home and not name.startswith("_")
    }
    assert public <= DOCUMENTED
