import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def _modules_of_one_example():
    """Forget an example's modules after its test: another example has modules of the same names."""
    yield
    for name, module in list(sys.modules.items()):
        if EXAMPLES in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture
def reproduction(monkeypatch):
    """Make the reproduction's modules importable as its own scripts import them."""
    for folder in (EXAMPLES / "tiny", EXAMPLES / "reproduction"):
        monkeypatch.syspath_prepend(str(folder))
    return EXAMPLES / "reproduction"


@pytest.fixture
def small_grid(reproduction, tmp_path):
    """Write a grid of two methods, two rates, two seeds and one control: small_grid(**changes) returns its file."""

    def write(**changes):
        config = {
            "model": str(EXAMPLES / "tiny" / "model"),
            "pretraining_steps": 1600,
            "device": "cpu",
            "rate_factor": 1.0,
            "min_accuracy": 0.9,
            "seeds": [0, 1],
            "control_seeds": [0],
            "common": {"documents": 4, "epochs": 2, "batch_size": 2},
            "methods": {
                "DiSC": {"method": "disc", "learning_rates": [1e-4, 1e-3]},
                "CD-base": {"method": "cd", "temperature": 1.0, "learning_rates": [1e-4, 1e-3]},
            },
            "controls": {
                "Splits": {"of": "DiSC", "learning_rates": [1e-3], "variants": {"one": {"num_splits": 1}}},
            },
        }
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(config | changes, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def real_model(monkeypatch):
    """Make the modules of the example on a real model importable as its own scripts import them."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "real_model"))
    import prepare

    monkeypatch.setattr(prepare, "TASKS", ("crass_ai", "implicatures"))
