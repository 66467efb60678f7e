"""Divide long documents into chunks, which are documents of their own, at sentence boundaries."""

from bisect import bisect_left
from itertools import pairwise

from disc_train.data.splits import TokenizedDocument


def chunk_document(document: TokenizedDocument, max_tokens: int, overlap: int = 0) -> list[TokenizedDocument]:
    """Divide a document into chunks of at most `max_tokens` tokens; one that is no longer stays as it is.

    Every token is in a chunk, in order. A chunk begins at a sentence and has at least two, so that it can be split; to
    this end a sentence longer than a third of a chunk is divided, and counts as several. The last two chunks are made
    about equally long.

    Args:
        overlap: a chunk begins with as many whole sentences of the one before as have no more tokens than this.

    Raises:
        ValueError: `max_tokens` below 3, or an overlap that is negative, more than half of it, or leaves less than 3.
    """
    most = min(max_tokens // 2, max_tokens - 3)
    if max_tokens < 3:
        raise ValueError(f"--max_document_tokens: expected at least 3, got {max_tokens}")
    if not 0 <= overlap <= most:
        raise ValueError(
            f"--chunk_overlap_tokens: expected 0 to {most} for chunks of {max_tokens} tokens, got {overlap}"
        )
    length = len(document.input_ids)
    if length <= max_tokens:
        return [document]
    room = max_tokens - overlap  # of a chunk, for tokens that are not in the one before
    starts = _divide_sentences(document, room // 3)
    bounds = [*_chunk_starts(starts, length, room), length]
    chunks = []
    for number, (first, stop) in enumerate(pairwise(bounds), start=1):
        begin = starts[bisect_left(starts, first - overlap)]
        inside = starts[bisect_left(starts, begin) : bisect_left(starts, stop)]
        chunks.append(
            TokenizedDocument(
                f"{document.name} (chunk {number} of {len(bounds) - 1})",
                document.input_ids[begin:stop],
                tuple(start - begin for start in inside),
            )
        )
    return chunks


def _divide_sentences(document: TokenizedDocument, longest: int) -> list[int]:
    """Return where sentences start once those longer than `longest` tokens are divided into equal parts."""
    starts = []
    for start, stop in pairwise([*document.sentence_starts, len(document.input_ids)]):
        parts = -(-(stop - start) // longest)
        starts += [start + part * (stop - start) // parts for part in range(parts)]
    return starts


def _chunk_starts(starts: list[int], length: int, room: int) -> list[int]:
    """Return where chunks start: each takes all sentences that fit, the last two share theirs evenly."""
    firsts = [0]
    for start, stop in pairwise([*starts, length]):
        if stop - firsts[-1] > room:
            firsts.append(start)
    before = firsts[-2]
    shares = {start: max(start - before, length - start) for start in starts[bisect_left(starts, before) + 2 : -1]}
    firsts[-1] = min(shares, key=lambda start: shares[start])
    return firsts
