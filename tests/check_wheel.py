"""Check what `make dist` has built: what is inside, and that it works where nothing of the repository is.

    python tests/check_wheel.py build/dist build/installed

The second folder is where the wheel was installed; what it needs is this Python's.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

USE = """
import pathlib, sys
import torch
import disc_kernels, disc_kernels.hf, disc_train.cli, disc_train.trainer
assert pathlib.Path(disc_kernels.__file__).is_relative_to(sys.argv[1]), disc_kernels.__file__
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
disc_kernels.fused_suffix_kl(hidden, head, torch.randn(3, 4), head).backward()
assert hidden.grad.abs().sum() > 0
for flag in ("--version", "--help"):
    assert disc_train.cli.main([flag]) == 0
"""


def main(built: Path, installed: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (licence,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert archive.read(licence) == Path("LICENSE").read_bytes()
    here = {str(path) for package in ("disc_kernels", "disc_train") for path in Path(package).rglob("*.py")}
    assert set(names) == here | {"disc_kernels/py.typed", "disc_train/py.typed"}, set(names) ^ here
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert here | {"LICENSE", "README.md", "pyproject.toml"} <= files
    assert not {name for name in files if name.split("/")[0] in ("tests", "benchmarks", "examples", "docs")}
    folder = str(installed.resolve())
    subprocess.run([sys.executable, "-c", USE, folder], cwd=built, env=os.environ | {"PYTHONPATH": folder}, check=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
