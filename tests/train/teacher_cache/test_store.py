"""A cache on disk: resumed, damaged, foreign, shared, large."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from disc_train.data.dataset import whole_documents
from disc_train.data.splits import TokenizedDocument
from disc_train.packing.collator import collator
from disc_train.teacher_cache import store as files
from disc_train.teacher_cache.sequences import TeacherSequence
from disc_train.teacher_cache.store import Store, writer


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != files.LOCK}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(Store, "shard_bytes", 20_000)  # one of the documents or two


def test_what_was_interrupted_goes_on_to_the_same_bytes(make_cache, monkeypatch):
    whole, parts = make_cache(folder="whole"), make_cache(folder="parts")
    whole.fill()
    expected = contents(whole.folder)
    assert len(expected) == 3 + 1  # shards, and what they are
    save, calls = files.save_file, []

    def stopped_or_full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"the first half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", stopped_or_full)
    with pytest.raises(OSError, match=r"--teacher_cache: .*shard-00001.* cannot be written: .*No space left on device"):
        parts.fill()
    assert contents(parts.folder).keys() < expected.keys()
    (parts.folder / "shard-00007.safetensors.unfinished").write_bytes(b"of a process that was killed")
    again = make_cache(folder="parts")
    assert 0 < len(again.cache.missing) < 3
    again.fill()
    assert contents(parts.folder) == expected
    again.fill()  # there is nothing left to do
    assert contents(parts.folder) == expected


def test_a_shard_that_was_deleted_is_written_again(make_cache):
    made = make_cache()
    made.fill()
    before = contents(made.folder)
    (made.folder / "shard-00000.safetensors").unlink()
    make_cache().fill()
    assert contents(made.folder) == before


def test_two_writers(make_cache):
    made = make_cache()
    with writer(made.folder), pytest.raises(ValueError, match="cache is being filled by another process"):
        made.fill()
    made.fill()


def test_a_folder_that_another_run_began_meanwhile(make_cache, monkeypatch):
    first, other, same = make_cache(), make_cache(temperature=5.0), make_cache()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Store, "fill", lambda *args: 1 / 0)
        first.fill()
    before = contents(first.folder)
    assert before.keys() == {files.DESCRIPTION}
    with pytest.raises(ValueError, match=r"filled for another run: --temperature.*expected 5\.0, got 2\.0"):
        other.fill()
    assert contents(first.folder) == before
    first.fill()
    before = contents(first.folder)
    same.fill()
    assert same.cache.teacher().store.rows == first.cache.teacher().store.rows
    assert contents(first.folder) == before


def _read_all(made):
    collate = collator(made.student, made.cache.teacher().reader)
    return collate([made.dataset[number] for number in range(len(made.dataset))])["teacher_rows"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "in the index", "in a name", "in the rows"])
def test_damaged_shards(damage, make_cache):
    made = make_cache()
    made.fill()
    path = made.folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-1]
    elif damage == "empty":
        data = bytearray()
    elif damage == "in a name":
        data = data.replace(b'"embedding"', b'"embeddinG"')
    else:
        size = int.from_bytes(data[:8], "little")
        name = b'"key"' if damage == "in the index" else b'"embedding"'
        offset = int(data[data.index(name) :].split(b'"data_offsets":[')[1].split(b",")[0])
        data[8 + size + offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"--teacher_cache: .*shard-00001.* cannot be read, .*is damaged.*delete it"):
        _read_all(make_cache())


def test_a_damaged_head_is_deleted_and_written_again(make_cache):
    made = make_cache(frozen=False)
    made.fill()
    assert made.cache.complete
    path = made.folder / files.HEAD
    written = path.read_bytes()
    path.write_bytes(written[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"head.safetensors cannot be read, the file is damaged.*delete it"):
        make_cache(frozen=False).cache.teacher()
    path.unlink()
    again = make_cache(frozen=False)
    assert not again.cache.complete
    again.fill()
    assert again.cache.complete and path.read_bytes() == written


def test_a_damaged_description(make_cache):
    made = make_cache()
    made.fill()
    path = made.folder / files.DESCRIPTION
    written = json.loads(path.read_text())
    without = {name: value for name, value in written.items() if name != "vocab_size"}
    for damaged in (without, without | {"vocab_size": 100}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"cache.json cannot be read, the file is damaged.*delete the folder"):
            make_cache()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": 1.0}, "--temperature, which summaries are made at: expected 1.0, got 2.0"),
        ({"stored": torch.bfloat16}, "--teacher_cache_dtype: expected 'bfloat16', got 'float32'"),
        ({"dtype": torch.float32}, "the teacher's dtype: expected 'float32', got 'float64'"),
        ({"autocast": torch.bfloat16}, "mixed precision, which rounds heads"),
        ({"start": [1]}, "what sequences start with, --add_bos"),
        ({"frozen": False}, "what is kept of a token: expected 'hidden states', got 'summaries'"),
        ({"architecture": "qwen2"}, "the teacher's weights"),
    ],
)
def test_a_cache_of_something_else(options, field, make_cache):
    made = make_cache()
    made.fill()
    before = contents(made.folder)
    with pytest.raises(ValueError, match=f"filled for another run: {field.replace('(', '.')}"):
        make_cache(**options)
    assert contents(made.folder) == before


def test_a_document_that_was_changed(make_cache, make_dataset):
    made = make_cache()
    made.fill()
    changed = make_dataset(3, num_splits=2)
    changed.documents[1].input_ids[-1] ^= 1
    with pytest.raises(ValueError, match=r"the documents or records .* \(not in it: doc1\)"):
        make_cache(changed)


def test_changed_weights_tokenizers_and_heads(make_cache, tmp_path, tokenizer, monkeypatch):
    made = make_cache()
    made.fill()
    weights = tmp_path / "llama-model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="the teacher's weights"):
        make_cache()
    weights.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "get_vocab", lambda self: {"a": 0})
        with pytest.raises(ValueError, match="the tokenizer"):
            make_cache()
    with torch.no_grad():
        made.student.lm_head.weight[0, 0] += 1
    monkeypatch.setattr("tests.train.teacher_cache.conftest.perturbed", lambda model: made.student)
    with pytest.raises(ValueError, match="the student's frozen head"):
        make_cache()


def test_folders_that_are_no_cache(make_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match=r"expected a teacher's cache or an empty folder, got .* with thesis.txt"):
        make_cache()
    made = make_cache(folder="other")
    made.fill()
    (made.folder / files.DESCRIPTION).write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"cache.json cannot be read.*expected a cache of format 1"):
        make_cache(folder="other")
    shutil.rmtree(made.folder)
    assert len(make_cache(folder="other").cache.missing) == 3


def test_places_that_cannot_be_a_folder(tmp_path):
    place = tmp_path / "a file"
    place.touch()
    for folder in ("", place):
        with pytest.raises(ValueError, match=f"--teacher_cache: expected a folder, got '{folder}'"):
            files.read_description(folder)
    with pytest.raises(OSError, match=r"--teacher_cache: .*below cannot be written to"), writer(place / "below"):
        pass
    with pytest.raises(OSError, match=r"--teacher_cache: .*cache.json cannot be written"):
        files.write_description(place / "below", {})


def test_a_reader_can_be_sent_to_another_process(make_cache):
    made = make_cache()
    made.fill()
    reader = made.cache.teacher().reader
    message = pickle.dumps(reader)
    assert len(message) < 1000  # a path, not rows
    example = made.dataset[0]
    wanted = [(example, branch) for branch in example.branches]
    (ours, index), (theirs, their_index) = reader(wanted), pickle.loads(message)(wanted)
    assert np.array_equal(index, their_index)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _anonymous_bytes():
    """What this process holds itself, without files that are mapped, which the system may drop at any time."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_rows_stay_on_disk(tmp_path, monkeypatch):
    """16 MB of rows: opened and read here and there, a process holds little more."""
    monkeypatch.setattr(Store, "shard_bytes", 4 << 20)
    length, width = 401, 20
    tokens = np.random.default_rng(0).integers(0, 1000, (1000, length), dtype=np.int32)
    sequences = [TeacherSequence(f"d{number}", ids, 0) for number, ids in enumerate(tokens)]
    with writer(tmp_path) as store:
        store.fill(sequences, lambda some: {"hidden": torch.ones(400 * len(some), width, dtype=torch.bfloat16)}, 50, 40)
    assert len(list(tmp_path.glob("shard-*"))) == 4
    before = _anonymous_bytes()
    store = Store(tmp_path)
    assert store.rows == 400_000
    for sequence in sequences[::10]:
        rows, index = store.read([(sequence, length)])
        assert rows["hidden"].shape == (400, width) and len(index) == 400
    assert _anonymous_bytes() - before < 4 << 20


def test_an_empty_shard_is_never_written(tmp_path):
    with writer(tmp_path) as store:
        store.fill([], lambda some: {}, 1, 1)
        assert not list(tmp_path.glob("shard-*"))
        sequence = TeacherSequence("d", np.arange(9, dtype=np.int32), 3)
        store.fill([sequence], lambda some: {"hidden": torch.arange(5.0)[:, None]}, 1, 4)
        assert store.has(sequence) and not store.has(sequence._replace(first=2))
        rows, index = store.read([(sequence._replace(first=5), 8), (sequence._replace(first=4), 7)])
    assert rows["hidden"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert index.tolist() == [1, 2, 0, 1]


def test_whole_documents_and_splits_of_them_are_one_sequence(make_dataset, make_cache):
    make_cache(temperature=1.0).fill()
    documents = [TokenizedDocument(document.name, document.input_ids, (0,)) for document in make_dataset(3).documents]
    assert make_cache(whole_documents(documents), temperature=1.0).cache.missing == []
