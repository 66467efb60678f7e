from typing import Any

import pytest

from tests.linear_kl.ranks import world


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Return what each rank of each world computed, by the number of ranks; the test file's `WORLDS` lists these."""
    return {
        ranks: world.run(request.module.__name__, ranks, tmp_path_factory.mktemp(f"world{ranks}"))
        for ranks in request.module.WORLDS
    }
