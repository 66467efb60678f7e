"""Whatever is in a file, it is read as it is or refused by an error that names the file."""

import gzip
import json
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from disc_train.data.contexts import FIELDS, load_records
from disc_train.data.documents import load_documents
from disc_train.evaluation.probes import read_questions
from tests.robustness.damage import damages

MODEL = Path(__file__).parents[2] / "examples" / "tiny" / "model"
TEXTS = ['The first, with a "quote".', "Zwei Zeilen:\nmehr.", "नमस्ते 😀", "", "x" * 300]
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def whole(suffix: str, folder: Path) -> bytes:
    """The bytes of a sound file with TEXTS."""
    path = folder / f"whole{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
        return path.read_bytes()
    if suffix.endswith(".gz"):
        return gzip.compress(whole(suffix.removesuffix(".gz"), folder), mtime=0)
    if suffix == ".csv":
        quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
        return "".join(["id,text\n", *(f"{number},{text}\n" for number, text in enumerate(quoted))]).encode()
    if suffix == ".json":
        return json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False).encode()
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def texts_or_error(path: Path) -> list[str] | None:
    """What is read from a file; None where it is refused as it should be."""
    try:
        return [document.text for document in load_documents(str(path), None)]
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return None


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz"])
def test_damaged_files(suffix, tmp_path):
    sound, path = whole(suffix, tmp_path), tmp_path / f"news{suffix}"

    @QUICK
    @given(damage=damages())
    def is_read_or_named(damage):
        path.write_bytes(damaged := damage(sound))
        texts = texts_or_error(path)
        if texts is not None:
            assert all(isinstance(text, str) for text in texts)
            assert not suffix.endswith(".gz") or texts == TEXTS  # whose checksum holds
            if suffix in (".json", ".parquet", ".jsonl.gz") and sound.startswith(damaged):
                assert damaged == sound  # nothing of a file that was cut off passes for all of it
            elif suffix == ".jsonl" and sound.startswith(damaged):
                assert texts == TEXTS[: len(texts)]

    is_read_or_named()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["\ud800", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_values_of_any_type(suffix, tmp_path):
    path = tmp_path / f"news{suffix}"

    @QUICK
    @given(record=VALUES | st.fixed_dictionaries({"text": VALUES}))
    def is_text_or_refused(record):
        records = [{"text": "sound"}, record]
        path.write_text("\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records))
        try:
            texts = [document.text for document in load_documents(str(path), None)]
        except ValueError as error:
            assert f"{path}:2: " in str(error)
            texts = None
        text = record.get("text", 0) if isinstance(record, dict) else 0
        sound = text is None or (isinstance(text, str) and text != "\ud800")
        assert (texts == ["sound", text or ""]) if sound else texts is None

    is_text_or_refused()


COLUMNS = {
    "integers": [1, 2],
    "dates": [date(1999, 1, 1), None],
    "times": [datetime(1999, 1, 1), None],
    "durations": [timedelta(1), None],
    "decimals": [Decimal("1.5"), None],
    "bytes": [b"a", b"\xff"],
    "lists": [["a"], None],
    "structs": [{"a": 1}, None],
    "times before the first year": pa.array([-(2**62), 0], pa.timestamp("us")),
    "broken UTF-8": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    ),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_columns_that_are_no_text(column, tmp_path):
    path = tmp_path / "news.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert texts_or_error(path) is None


@pytest.mark.parametrize("texts", [pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "b"], pa.large_string())])
def test_columns_of_text(texts, tmp_path):
    path = tmp_path / "news.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    assert texts_or_error(path) == ["a", "b"]


def test_a_field_that_is_there_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "news.parquet")
    (tmp_path / "news.csv").write_text("text,text\na,b\n")
    for name in ("news.parquet", "news.csv"):
        with pytest.raises(ValueError, match=rf"{name}: expected one column 'text', got 2"):
            load_documents(str(tmp_path / name), None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


ROLES = st.sampled_from(["user", "assistant", "system"]) | VALUES
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=5) | VALUES}), max_size=4)
ANYTHING = MESSAGES | st.text(max_size=9) | VALUES


def test_records_of_any_type(tokenizer, tmp_path):
    path = tmp_path / "records.jsonl"
    names = [*FIELDS.required, *FIELDS.optional, *(name for form in FIELDS.forms for name in form)]

    @QUICK
    @given(record=st.dictionaries(st.sampled_from(names), ANYTHING, min_size=2), system=st.sampled_from([None, "s"]))
    def is_read_or_named(record, system):
        path.write_text(json.dumps(record))
        try:
            (read,) = load_records(str(path), None, tokenizer, teacher_system_prompt=system)
        except ValueError as error:
            assert f"{path}:1: " in str(error)
        else:
            assert len(read.branches[0].target) > 0

    is_read_or_named()


def test_probes_of_any_type(tokenizer, tmp_path):
    path = tmp_path / "probes.jsonl"
    choices, answer = st.lists(ANYTHING, max_size=3), st.integers(-1, 3) | ANYTHING
    fields = {"question": ANYTHING, "prompt": ANYTHING, "choices": choices, "answer": answer, "context": ANYTHING}
    fields |= {"document": ANYTHING, "group": ANYTHING, "id": ANYTHING}

    @QUICK
    @given(record=st.fixed_dictionaries({}, optional=fields))
    @example(record={"prompt": "a", "choices": ["b", "c"], "answer": "b"})
    def is_read_or_named(record):
        path.write_text(json.dumps(record))
        try:
            (question,) = read_questions([str(path)], tokenizer)
        except ValueError as error:
            assert f"{path}:1: " in str(error)
        else:
            assert question.closed_book.choices

    is_read_or_named()
