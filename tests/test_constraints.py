"""The versions that `make` installs run on every Python that the project promises."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


def test_pinned_versions_take_the_oldest_python():
    """Such as 3.11.2, Debian 12's own: a package may want a later patch release."""
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = promised.removeprefix(">=") + ".0"
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    checked, refused = 0, []
    for pin in map(Requirement, filter(None, lines)):
        try:
            found = metadata.metadata(pin.name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        if found["Version"] in pin.specifier:
            checked += 1
            wanted = found["Requires-Python"] or ""
            if oldest not in SpecifierSet(wanted):
                refused.append(f"{pin}: wants Python {wanted}")
    if checked < 20:
        pytest.skip("other versions than the pinned ones are installed")
    assert not refused, "\n".join(refused)
