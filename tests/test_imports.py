"""The direction of imports: which package, room and file may know of which, and what an import may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("disc_kernels", "disc_train")
# What of disc_kernels knows transformers; only hf imports it at its top.
KNOWS_TRANSFORMERS = {"disc_kernels.hf", "disc_kernels.integrations", "disc_kernels.shared_prefix.attention"}
# Rooms from the ground up: none imports one that stands after it. `disc_train.parallel` is not in the order: models are
# divided by it, and it compares the settings of runs.
ROOMS = [
    *(f"disc_kernels.{room}" for room in ("host", "autocast", "linear_kl", "frozen_head", "shared_prefix")),
    *(f"disc_kernels.{room}" for room in ("hf", "integrations")),
    *(f"disc_train.{room}" for room in ("flags", "data", "packing", "models", "teacher_cache", "objectives")),
    *(f"disc_train.{room}" for room in ("loop_config", "config", "summary", "teacher_from_flags")),
    *(f"disc_train.{room}" for room in ("generation", "evaluation")),
    *(f"disc_train.{room}" for room in ("resume", "checkpoints", "trainer", "cost", "run", "sweep", "cli")),
]
# What puts a training set together from a run's settings, and what names a model whose tokenizer cannot be read.
LOOKS_UP = {"disc_train.data.training_data", "disc_train.data.context_length"}
BACKENDS = [
    {f"disc_kernels.linear_kl.rows.{name}" for name in ("torch_backend", "triton_backend")},
    {f"disc_kernels.shared_prefix.backends.{name}" for name in ("flex", "varlen")},
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str, *, anywhere: bool = True) -> Iterator[str]:
    """Yield the modules that a module imports: at its top, or anywhere, in functions too."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def in_room(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("module", [module for module in MODULES if in_room(module, "disc_kernels")])
def test_kernels_know_neither_the_trainer_nor_its_libraries(module):
    roots = {name.partition(".")[0] for name in imported(module)}
    assert not roots & {"disc_train", "accelerate", "datasets", "peft", "trl"}
    if not any(in_room(module, room) for room in KNOWS_TRANSFORMERS):
        assert "transformers" not in roots
    if not in_room(module, "disc_kernels.hf"):
        assert "transformers" not in {name.partition(".")[0] for name in imported(module, anywhere=False)}


@pytest.mark.parametrize("backends", BACKENDS)
def test_backends_do_not_know_each_other(backends):
    for backend in backends & set(MODULES):
        assert not backends & set(imported(backend)), backend


def test_modules_import_each_other_in_one_direction():
    """Raises CycleError, which names a circle."""
    graph = {module: {name for name in imported(module) if name in MODULES} - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(set(MODULES) - LOOKS_UP))
def test_rooms_import_what_stands_before_them(module):
    places = [place for place, room in enumerate(ROOMS) if in_room(module, room)]
    later = ROOMS[places[0] + 1 :] if places else []
    known = [name for name in imported(module) if any(in_room(name, room) for room in later)]
    assert not known, f"{module} imports {', '.join(known)}"


@pytest.mark.parametrize("module", ["disc_kernels", "disc_kernels.shared_prefix"])
def test_importing_the_kernels_needs_torch_alone(module):
    """Triton is imported when a kernel is first used, and what else is heavy by who asks for it."""
    code = f"import sys, {module}; print(*{{'triton', 'transformers', 'datasets', 'peft'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
