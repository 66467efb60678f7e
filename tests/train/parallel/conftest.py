"""What the tests of several processes share."""

import json

import pytest


@pytest.fixture(scope="session")
def losses():
    """losses(folder): those that a run logged."""

    def read(folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    return read
