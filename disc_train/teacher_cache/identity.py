"""Describe which model, texts and settings a cache belongs to, so that no run reads the rows of another."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from disc_kernels.hf import OutputHead
from disc_train.models.pretrained import load_pretrained
from disc_train.teacher_cache.sequences import TeacherSequence

WEIGHT_FILES = (".safetensors", ".bin")
MODEL_FILES = ("config.json", "adapter_config.json")

# Fields of a description, as messages name them; what is not compared is not here.
NAMES = {
    "rows": "what is kept of a token",
    "teacher": "the teacher's weights (checksum of its files, or commit on the Hub)",
    "dtype": "the teacher's dtype",
    "tokenizer": "the tokenizer (checksum)",
    "start": "what sequences start with, --add_bos (token ids)",
    "template": "--teacher_template (token ids before and after a prefix)",
    "documents": "the documents or records (checksum of their tokens)",
    "stored": "--teacher_cache_dtype",
    "temperature": "--temperature, which summaries are made at",
    "student_head": "the student's frozen head (checksum)",
    "autocast": "mixed precision, which rounds heads (--bf16, --fp16)",
}


def check_identity(
    folder: str, found: Mapping[str, Any], expected: Mapping[str, Any], sequences: list[TeacherSequence]
) -> None:
    """Raise ValueError, naming the first field in which a cache is another than expected, and `sequences` it lacks."""
    for field, name in NAMES.items():
        if found.get(field) == expected.get(field):
            continue
        missing = ""
        if field == "documents" and sequences:
            names = [sequence.name for sequence in sequences[:3]] + ["..."] * (len(sequences) > 3)
            missing = f" (not in it: {', '.join(names)})"
        raise ValueError(
            f"--teacher_cache: {folder} was filled for another run: {name}: expected {expected.get(field)!r}, got"
            f" {found.get(field)!r}{missing}; choose another folder, or delete this one"
        )


def weights_checksum(name_or_path: str) -> str:
    """Compute a checksum of all bytes of a model's weights and config, with those of an adapter's base.

    Of a model on the Hub it is the commit, which names its content.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        commit = getattr(load_pretrained(AutoConfig, name_or_path), "_commit_hash", None)
        if not commit:
            raise ValueError(f"--teacher_cache: expected the commit of {name_or_path} on the Hub, got none")
        return f"commit {commit}"
    checksum = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_FILES or path.name in MODEL_FILES:
            with path.open("rb") as file:
                checksum.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
            if path.name == "adapter_config.json":
                base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
                checksum.update(weights_checksum(base).encode())
    return checksum.hexdigest()


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute a checksum of a tokenizer's vocabulary."""
    entries = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.sha256(entries).hexdigest()


def head_checksum(head: OutputHead) -> str:
    """Compute a checksum of a head's weight and bias, as they are in memory."""
    checksum = hashlib.sha256()
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            checksum.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            checksum.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()
