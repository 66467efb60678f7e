"""A damaged cache gives the rows that were written, or an error that names the file."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disc_kernels import LogitTransform
from disc_kernels.hf import OutputHead
from disc_train.teacher_cache.identity import head_checksum
from disc_train.teacher_cache.open import read_head
from disc_train.teacher_cache.sequences import TeacherSequence
from disc_train.teacher_cache.store import (
    DESCRIPTION,
    HEAD,
    Store,
    read_description,
    write_description,
    write_tensors,
    writer,
)
from tests.robustness.damage import damages

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SEQUENCES = [TeacherSequence(f"d{n}", np.arange(n, n + 9, dtype=np.int32), n) for n in range(3)]
HEADS = OutputHead(torch.randn(7, 4), torch.randn(7), LogitTransform(scale=0.5, softcap=3.0), 6)


def summary(sequences):
    rows = sum(sequence.rows for sequence in sequences)
    return {"embedding": torch.randn(rows, 4).bfloat16(), "entropy": torch.rand(rows), "bias": torch.rand(rows)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a cache of two shards, of which the second has one sequence, a description and a head."""
    folder = tmp_path_factory.mktemp("sound")
    with writer(folder) as store:
        for some in (SEQUENCES[:2], SEQUENCES[2:]):
            store.fill(some, summary, 2, 1)
        write_tensors(folder / HEAD, {"weight": HEADS.weight, "bias": HEADS.bias}, {})
        of_head = {"scale": 0.5, "softcap": 3.0, "head": head_checksum(HEADS), "vocab_size": 6}
        write_description(folder, {"documents": ["a", 1], **of_head})
    return folder


def everything(folder):
    """All that a run reads of a cache."""
    store = Store(folder)
    rows, index = store.read([(each, len(each.tokens)) for each in SEQUENCES])
    description = read_description(folder)
    head = read_head(folder / HEAD, description)
    return [*rows.values(), torch.from_numpy(index), head.weight, head.bias], [description, *head[2:]]


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00001.safetensors", DESCRIPTION, HEAD])
def test_damaged_files(name, sound, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(sound, folder)
    data = (folder / name).read_bytes()
    tensors, others = everything(sound)
    replaced = st.sampled_from([b'"F32"', b'"BF16"', b'"I64"', b"[1]", b"[ ]", b'"shape"', b"16"])

    @QUICK
    @given(damage=damages() | st.tuples(replaced, replaced).map(lambda pair: lambda data: data.replace(*pair)))
    @example(damage=lambda data: data.replace(b"[1]", b"[ ]"))  # tensors without dimensions
    def is_whole_or_named(damage):
        (folder / name).write_bytes(damage(data))
        try:
            got, rest = everything(folder)
        except (ValueError, OSError) as error:
            assert name in str(error) and "\n" not in str(error), error
        else:
            assert rest == others and all(map(torch.equal, got, tensors))

    is_whole_or_named()


@pytest.mark.parametrize("name", ["shard-00001.safetensors", DESCRIPTION, HEAD])
def test_a_folder_in_the_place_of_a_file(name, sound, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(sound, folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises((ValueError, OSError), match=name):
        everything(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "7", '{"format": [1]}', '{"format": 1, "checksum": {}}'])
def test_descriptions_that_are_none(content, sound, tmp_path):
    (tmp_path / DESCRIPTION).write_text(content)
    with pytest.raises(ValueError, match=r"cache.json cannot be read, the file is damaged.*delete the folder"):
        read_description(tmp_path)


def test_a_shard_of_another_cache(sound, tmp_path):
    """What belongs to other sequences is not taken for these."""
    folder = tmp_path / "cache"
    shutil.copytree(sound, folder)
    shutil.copy(folder / "shard-00001.safetensors", folder / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"d0: expected its 8 rows in the teacher's cache .*, got none"):
        everything(folder)
    assert json.loads((folder / DESCRIPTION).read_text())["documents"] == ["a", 1]
