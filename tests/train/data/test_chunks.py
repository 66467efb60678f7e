"""Long documents as chunks: no token is lost, none is too long, and every one can be split."""

import json
import re
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_train.config import parse_arguments
from disc_train.data.chunks import chunk_document
from disc_train.data.documents import Document
from disc_train.data.splits import TokenizedDocument, tokenize_document
from disc_train.data.training_data import load_training_data
from tests.train.files import write_jsonl
from tests.train.world import COMMON

CONTEXT = 512
# Of Python's documentation: code, tables and grammars beside prose; of the newest version and of older ones.
TOPICS = [topics[name] for name in ("for", "with", "class", "lambda", "pass", "yield", "import", "operator-summary")]


def _document(*sentence_lengths):
    starts = np.cumsum([0, *sentence_lengths])
    return TokenizedDocument("a.txt", np.arange(starts[-1], dtype=np.int32), tuple(starts[:-1].tolist()))


def _shape(chunks):
    """The first token, the number of tokens and the sentence starts of each."""
    return [(int(chunk.input_ids[0]), len(chunk.input_ids), chunk.sentence_starts) for chunk in chunks]


def test_chunks_by_hand():
    chunks = chunk_document(_document(4, 3, 4, 2, 4, 4, 3), 12)  # the last two of 10 and 3, if all took what fits
    assert _shape(chunks) == [(0, 11, (0, 4, 7)), (11, 6, (0, 2)), (17, 7, (0, 4))]
    assert [chunk.name for chunk in chunks] == [f"a.txt (chunk {number} of 3)" for number in (1, 2, 3)]


def test_a_chunk_repeats_whole_sentences_of_the_one_before():
    chunks = chunk_document(_document(4, 3, 4, 2, 4, 4, 3, 4, 4, 3), 16, overlap=4)
    assert _shape(chunks) == [(0, 11, (0, 4, 7)), (7, 14, (0, 4, 6, 10)), (17, 11, (0, 4, 7)), (24, 11, (0, 4, 8))]


def test_a_sentence_of_several_chunks_is_divided():
    assert _shape(chunk_document(_document(30), 12)) == [(0, 11, (0, 3, 7)), (11, 11, (0, 4, 7)), (22, 8, (0, 4))]


def test_a_document_that_fits_stays_as_it_is():
    document = _document(4, 5, 1)
    assert chunk_document(document, 10) == [document]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([1, 2, 3, 5, 9, 30]), min_size=1, max_size=12), st.integers(3, 25), st.data())
def test_every_token_is_in_a_chunk_and_every_chunk_can_be_split(sentences, max_tokens, data):
    overlap = data.draw(st.integers(0, min(max_tokens // 2, max_tokens - 3)))
    document = _document(*sentences)
    chunks = chunk_document(document, max_tokens, overlap)
    ends = [0, *(int(chunk.input_ids[-1]) + 1 for chunk in chunks)]
    assert ends[-1] == sum(sentences)
    for chunk, (before, end) in zip(chunks, pairwise(ends), strict=True):
        first = int(chunk.input_ids[0])
        assert before - overlap <= first <= before < end
        assert chunk.input_ids.tolist() == list(range(first, end))
        assert len(chunk.input_ids) <= max_tokens
        assert len(chunks) == 1 or (len(chunk.sentence_starts) > 1 and chunk.sentence_starts[0] == 0)
        bounds = [*chunk.sentence_starts, len(chunk.input_ids)]
        assert bounds == sorted(set(bounds))


@pytest.mark.parametrize(("max_tokens", "overlap"), [(2, 0), (10, 6), (10, -1), (4, 2)])
def test_sizes_that_cannot_be(max_tokens, overlap):
    flag = "--max_document_tokens" if max_tokens < 3 else "--chunk_overlap_tokens"
    with pytest.raises(ValueError, match=f"{flag}: expected .* got {min(max_tokens, overlap) or max_tokens}"):
        chunk_document(_document(3), max_tokens, overlap)


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(*flags): the training set of Python's documentation and the summary's lines, for a context of 512 tokens."""
    config = {"model_type": "llama", **COMMON, "max_position_embeddings": CONTEXT}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "topics.jsonl", *({"text": text} for text in TOPICS))

    def run(*flags):
        required = ("--model_name_or_path", str(tmp_path), "--train_file", str(path), "--output_dir", str(tmp_path))
        data = load_training_data(*parse_arguments([*required, "--use_cpu", "true", *flags]), tokenizer)
        return data.own, dict(data.description)

    return run


def _numbers(text, pattern):
    return [int(number.replace(",", "")) for number in re.search(pattern, text).groups()]


@pytest.mark.parametrize("overlap", [0, 100])
@pytest.mark.parametrize("method", ["disc", "ft"])
def test_no_token_of_the_documentation_is_lost(load, tokenizer, method, overlap):
    whole = [tokenize_document(Document(str(i), text), tokenizer, "document", None) for i, text in enumerate(TOPICS)]
    lengths = [len(document.input_ids) for document in whole]
    dataset, lines = load("--method", method, "--chunk_overlap_tokens", str(overlap))
    trunks = [
        dataset[i].teacher_trunk if method == "disc" else dataset[i].branches[0].target for i in range(len(dataset))
    ]
    assert max(map(len, trunks)) <= CONTEXT
    if not overlap:
        assert np.concatenate(trunks).tolist() == np.concatenate([document.input_ids for document in whole]).tolist()

    read, used, long, tokens_of_long, chunks = _numbers(
        lines["documents"],
        r"([\d,]+) read, ([\d,]+) used; .* ([\d,]+) too long, of ([\d,]+) tokens, divided into ([\d,]+) chunks",
    )
    assert (read, used) == (len(whole), len(dataset))
    assert long == sum(length > CONTEXT for length in lengths)
    assert tokens_of_long == sum(length for length in lengths if length > CONTEXT)
    assert chunks == len(dataset) - len(whole) + long
    repeated = _numbers(lines["documents"], r"which repeat ([\d,]+)")[0] if overlap else 0
    total, *parts = _numbers(lines["tokens"], r"([\d,]+) in" + r".*? ([\d,]+)" * (4 if method == "disc" else 2))
    assert total == sum(parts) == sum(lengths) + repeated == sum(map(len, trunks))
    assert (repeated > 0) == (overlap > 0)
    assert "WARNING" not in lines


def test_what_is_cut_is_warned_about(load):
    dataset, lines = load("--long_documents", "cut")
    lost, total, share, cut = _numbers(lines["WARNING"], r"([\d,]+) of ([\d,]+) tokens \((\d+)%\) are lost: ([\d,]+)")
    kept = sum(len(document.input_ids) for document in dataset.documents)
    assert (lost, lost) == (cut, total - kept)
    assert share == round(100 * lost / total) > 50
