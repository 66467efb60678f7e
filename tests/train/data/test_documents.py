"""Every kind of input gives its documents, with names; every kind of bad input an error that names file and record."""

import csv
import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError

from disc_train.data.documents import Document, load_documents
from disc_train.data.files import find_files

# White space of every kind, non-BMP characters and JSON's unusual line breaks: all to be kept as written.
TEXTS = ["One.\r\nTwo.\t😀", 'A "quoted" comma, and\nlines.', "नमस्ते\u2028世界\u0085\u00a0", "  "]


def write(path, content):
    """Write str as UTF-8 with line ends as they are, bytes as they are; return the path as a user gives it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_texts(path, texts=TEXTS, column="text"):
    records = [{"id": number, column: text} for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if path.suffix == ".json":
        return write(path, json.dumps(records, indent=1))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
        return str(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", column])
        writer.writeheader()
        writer.writerows(records)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".CSV"])
def test_files_of_records(tmp_path, suffix):
    file = write_texts(tmp_path / f"news{suffix}")
    assert load_documents(file, None) == [Document(f"{file}:{i}", text) for i, text in enumerate(TEXTS, start=1)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_text_column(tmp_path, suffix):
    file = write_texts(tmp_path / f"news{suffix}", column="body text")
    assert [document.text for document in load_documents(file, None, "body text")] == TEXTS
    with pytest.raises(ValueError, match=r"news.*'text'; there is: id, body text"):
        load_documents(file, None)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    file = write(tmp_path / f"a{suffix}", TEXTS[0])
    assert load_documents(file, None) == load_documents(Path(file), None) == [Document(file, TEXTS[0])]


def test_a_folder_is_read_in_sorted_order(tmp_path):
    for name in ["b/2.txt", "b/10.txt", "a.TXT", "c.txt", ".cache/old.txt", "._a.txt", "notes.pdf", "README"]:
        write(tmp_path / name, name)
    write(tmp_path / "b.jsonl", '{"text": "first"}\n{"text": "second"}')
    documents = load_documents(str(tmp_path), None)
    assert [document.text for document in documents] == ["a.TXT", "b/10.txt", "b/2.txt", "first", "second", "c.txt"]
    assert [document.name for document in documents][1::2] == [
        str(tmp_path / "b" / "10.txt"),
        f"{tmp_path / 'b.jsonl'}:1",
        str(tmp_path / "c.txt"),
    ]


def test_a_json_file_may_hold_a_record_a_line(tmp_path):
    file = write(tmp_path / "a.json", '{"text": "x"}\n\n{"text": "y"}\n')
    assert load_documents(file, None) == [Document(f"{file}:1", "x"), Document(f"{file}:3", "y")]
    file = write(tmp_path / "shard.json", '{"text": "z"}\n')
    assert load_documents(file, None) == [Document(f"{file}:1", "z")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".md", ".RST"])
def test_gzipped_text(tmp_path, suffix):
    content = {".jsonl": '{"text": "é"}', ".json": '[{"text": "é"}]', ".csv": "text\né\n"}.get(suffix, "é")
    write(tmp_path / f"a{suffix}.gz", gzip.compress(content.encode()))
    assert [document.text for document in load_documents(str(tmp_path), None)] == ["é"]


def test_several_files_folders_and_patterns_are_each_read_once(tmp_path):
    for name in ("b/1.txt", "b/c/2.txt", "b/c/3.md", "a.jsonl", "[x].txt"):
        write(tmp_path / name, json.dumps({"text": name}) if name == "a.jsonl" else name)

    def read(*sources):
        return [document.text for document in load_documents([str(tmp_path / source) for source in sources], None)]

    assert read("a.jsonl", "b") == ["a.jsonl", "b/1.txt", "b/c/2.txt", "b/c/3.md"]
    assert read("b/**/*.txt", "b/c") == ["b/1.txt", "b/c/2.txt", "b/c/3.md"]
    assert read("[x].txt", "*.txt") == ["[x].txt"]
    with pytest.raises(ValueError, match=r"--train_file: '.*\*\.csv' does not exist"):
        read("a.jsonl", "*.csv")


def test_other_kinds_of_files_are_listed_where_not_named(tmp_path):
    for name in ("a.txt", "b.pdf", "c/d.html", "c/.hidden.pdf", "e"):
        write(tmp_path / name, "x")
    assert find_files(str(tmp_path), "--train_file").others == [tmp_path / name for name in ("b.pdf", "c/d.html", "e")]
    assert find_files(str(tmp_path / "*.*"), "--train_file").others == [tmp_path / "b.pdf"]
    with pytest.raises(ValueError, match=r"--replay_file: .*b\.pdf: unsupported suffix '\.pdf'"):
        find_files([str(tmp_path), str(tmp_path / "b.pdf")], "--replay_file")


def test_records_of_another_method_are_recognised(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"teacher_context": "x", "target": "y"}')
    with pytest.raises(ValueError, match=r"there is: teacher_context, target; did you mean --method cd\?$"):
        load_documents(file, None, meant={"target": "--method cd"})
    with pytest.raises(ValueError, match=r"there is: teacher_context, target$"):
        load_documents(file, None)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_byte_order_mark_is_not_text(tmp_path, suffix):
    content = {".jsonl": '{"text": "é"}', ".json": '[{"text": "é"}]', ".csv": "text\né\n", ".txt": "é"}[suffix]
    file = write(tmp_path / f"a{suffix}", b"\xef\xbb\xbf" + content.encode())
    assert [document.text for document in load_documents(file, None)] == ["é"]


def test_jsonl_names_count_blank_lines(tmp_path):
    file = write(tmp_path / "a.jsonl", '\n{"text": "x"}\r\n  \n{"text": "y"}')
    assert load_documents(file, None) == [Document(f"{file}:2", "x"), Document(f"{file}:4", "y")]


def test_csv_with_any_line_end(tmp_path):
    for end in ["\n", "\r\n", "\r"]:
        file = write(tmp_path / "a.csv", end.join(["text,id", '"x\r\ny",1', "", "z,2"]))
        assert load_documents(file, None) == [Document(f"{file}:1", "x\r\ny"), Document(f"{file}:2", "z")]


def test_empty_texts_are_kept_to_be_counted(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        file = write_texts(tmp_path / f"a{suffix}", ["", "x", " \n", None])
        assert [document.text for document in load_documents(file, None)] == ["", "x", " \n", ""]


def test_long_csv_fields_leave_the_process_limit_alone(tmp_path):
    limit = csv.field_size_limit()
    long = "long text, " * 100_000
    assert [document.text for document in load_documents(write_texts(tmp_path / "a.csv", [long]), None)] == [long]
    assert csv.field_size_limit() == limit
    with pytest.raises(ValueError):
        load_documents(write(tmp_path / "b.csv", 'text\n"unterminated'), None)
    assert csv.field_size_limit() == limit


def test_a_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    name = str(tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    write_texts(tmp_path / "hub" / "train.jsonl", ["x", "y"])
    assert load_documents(None, name) == [Document(f"{name}[train]:1", "x"), Document(f"{name}[train]:2", "y")]
    with pytest.raises(ValueError, match=r"hub\[train\]: no --text_column 'body'; there is: id, text"):
        load_documents(None, name, "body")
    with pytest.raises(ValueError, match=r"--dataset_name: cannot load .*nothing\[train\]"):
        load_documents(None, str(tmp_path / "nothing"))
    write(tmp_path / "broken" / "train.jsonl", '{"text": ')
    with pytest.raises(ValueError, match=r"cannot load .*broken\[train\]"):
        load_documents(None, str(tmp_path / "broken"))


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(answers, monkeypatch):
    """What was downloaded is read all the same, so it is left to `datasets` to refuse the name, which then is quick."""
    datasets = pytest.importorskip("datasets")

    def dataset_info(self, name, timeout):
        raise HfHubHTTPError.__new__(HfHubHTTPError) if answers else ConnectionError("no such host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"--dataset_name: cannot load nobody/nothing\[train\]: Couldn't reach"):
        load_documents(None, "nobody/nothing")
    assert datasets.config.HF_HUB_OFFLINE is not answers


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def read_bytes(path):
        raise PermissionError(f"no access to {path}")

    file = write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(ValueError, match=f"--eval_file: no access to {file}"):
        load_documents(file, None, flag="--eval_file")


@pytest.mark.parametrize(
    ("library", "train_file", "dataset_name"), [("pyarrow", "a.parquet", None), ("datasets", None, "org/name")]
)
def test_an_absent_library(tmp_path, monkeypatch, library, train_file, dataset_name):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}.*pip install 'disc-kernels\[train\]'"):
        load_documents(train_file and write(tmp_path / train_file, ""), dataset_name)


@pytest.mark.parametrize(("train_file", "dataset_name"), [(None, None), ("a.txt", "org/name"), ("", "")])
def test_exactly_one_source(train_file, dataset_name):
    with pytest.raises(ValueError, match="give either --train_file or --dataset_name, got"):
        load_documents(train_file, dataset_name)


def test_missing_file_and_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"--train_file: '.*missing\.jsonl' does not exist"):
        load_documents(str(tmp_path / "missing.jsonl"), None)
    with pytest.raises(ValueError, match=r"no supported file; supported: \.jsonl, \.json, \.parquet"):
        load_documents(str(tmp_path), None)


BAD_FILES = {
    "unsupported": ("a.pdf", "x", r"a\.pdf: unsupported suffix '\.pdf'; supported: .*\.jsonl.*\.txt"),
    "no suffix": ("a", "x", r"a: unsupported suffix ''"),
    "empty txt": ("a.txt", "", r"a\.txt: no text in any of its 1 documents"),
    "blank records": ("a.jsonl", '{"text": " "}\n{"text": ""}', r"a\.jsonl: no text in any of its 2 documents"),
    "empty jsonl": ("a.jsonl", "\n\n", r"a\.jsonl: no documents in this file"),
    "empty json": ("a.json", "", r"a\.json: no documents"),
    "empty list": ("a.json", "[]", r"a\.json: no documents"),
    "empty csv": ("a.csv", "", r"a\.csv: no documents"),
    "csv header only": ("a.csv", "text\n", r"a\.csv: no documents"),
    "empty parquet": ("a.parquet", b"", r"a\.parquet: not a readable Parquet file"),
    "not parquet": ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet: not a readable Parquet file"),
    "malformed line": ("a.jsonl", '{"text": "x"}\n{"text": "y', r"a\.jsonl:2: malformed JSON: .* \(column 10\)"),
    "malformed json": (
        "a.json",
        '[\n{"text": "x"},\n{"text" "y"}]',
        r"a\.json: malformed JSON: .* \(line 3 column 9\)",
    ),
    "too deep": ("a.jsonl", "[" * 200_000, r"a\.jsonl:1: JSON that Python cannot read"),
    "not a list": ("a.json", "5", r"a\.json: expected a list of records, or one record a line, got int"),
    "malformed line of json": ("a.json", '{"text": "x"}\n{"text"', r"a\.json:2: malformed JSON: .* \(column 8\)"),
    "key twice": (
        "a.jsonl",
        '{"text": "x"}\n{"text": "y", "text": "z"}',
        r"a\.jsonl:2: JSON that Python cannot read: expected every key once, got 'text' twice in \{'text': 'z'\}",
    ),
    "key twice in json": (
        "a.json",
        '[{"text": "x"}, {"text": "x", "messages": [{"role": "user", "role": "tool"}]}]',
        r"a\.json: .* expected every key once, got 'role' twice in \{'role': 'tool'\}",
    ),
    "key twice and deep": ("a.jsonl", "[" * 200 + '{"b": 1, "b": 2}' + "]" * 200, r"a\.jsonl:1: .* got 'b' twice"),
    "key twice in lines of json": (
        "a.json",
        '{"text": "x"}\n{"text": "y", "text": ""}',
        r"a\.json:2: .* expected every key",
    ),
    "not gzip": ("a.txt.gz", b"\x1f\x8b", r"a\.txt\.gz: not a readable gzip file"),
    "not gzip either": ("a.jsonl.gz", "{}", r"a\.jsonl\.gz: not a readable gzip file"),
    "gzipped Parquet": ("a.parquet.gz", "", r"unsupported suffix '\.gz'; supported: .* all but \.parquet gzipped"),
    "not an object": ("a.jsonl", '{"text": "x"}\n"y"', r"a\.jsonl:2: expected a record with a field 'text', got str"),
    "column missing in one": (
        "a.jsonl",
        '{"text": "x"}\n{"t": "y"}',
        r"--train_file: .*a\.jsonl:2: no --text_column 'text'; there is: t$",
    ),
    "no columns": ("a.jsonl", "{}", r"a\.jsonl:1: .*there is: none at all"),
    "nulls": ("a.json", '[{"text": null}, {"text": null}]', r"a\.json: no text in any of its 2 documents"),
    "number": ("a.jsonl", '{"text": 5}', r"a\.jsonl:1: 'text' must be a string, got int"),
    "lone surrogate": ("a.jsonl", '{"text": "ab\\ud800"}', r"a\.jsonl:1: 'text' holds a lone surrogate at character 2"),
    "short csv row": ("a.csv", "id,text\n1,x\n2\n", r"a\.csv:2: fewer fields than the header's 2"),
    "long csv row": ("a.csv", "id,text\n1,Hello, world\n", r"a\.csv:1: more fields than the header's 2"),
    "unterminated quote": ("a.csv", 'text\n"x', r"a\.csv: malformed CSV after line 1"),
    "not utf-8": ("a.txt", b"ab\ncd\xff", r"a\.txt: not UTF-8: byte 0xff at offset 5 \(line 2\)"),
    "not utf-8 after a mark": (
        "a.csv",
        b"\xef\xbb\xbftext\n\xe9\n",
        r"a\.csv: not UTF-8: byte 0xe9 at offset 8 \(line 2\)",
    ),
    "utf-16": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl: not UTF-8: byte 0xff at offset 0 \(line 1\)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, message = BAD_FILES[case]
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_documents(file, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([None, None], pa.string()), r"a\.parquet: no text in any of its 2 documents"),
        (pa.array([1, 2]), r"a\.parquet:1: 'text' must be a string, got int"),
        (pa.array([], pa.string()), r"a\.parquet: no documents"),
        (
            pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")),
            r"a\.parquet: column 'text' is not UTF-8",
        ),
    ],
    ids=["null", "number", "no rows", "not UTF-8"],
)
def test_bad_parquet_columns(tmp_path, values, message):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / "a.parquet"), None)


def test_a_bad_file_in_a_folder_is_named(tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b" / "c.jsonl", "")
    with pytest.raises(ValueError, match=r"c\.jsonl: no documents in this file"):
        load_documents(str(tmp_path), None)
