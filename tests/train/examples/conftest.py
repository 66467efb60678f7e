import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def _modules_of_one_example():
    """Forget an example's modules after its test: another example has modules of the same names."""
    yield
    for name, module in list(sys.modules.items()):
        if EXAMPLES in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]
