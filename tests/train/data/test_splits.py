"""The split points that each strategy chooses."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disc_train.data.splits import (
    SENTENCE_STRATEGIES,
    SPLIT_STRATEGIES,
    Split,
    TokenizedDocument,
    check_split_options,
    choose_splits,
)


def hand_made(starts, length):
    return TokenizedDocument("a.txt", np.arange(length, dtype=np.int32), tuple(starts))


TEN = hand_made(range(0, 50, 5), 50)  # ten sentences of five tokens


def spans(*sentences):
    return [Split(5 * i, 5 * i + 5) for i in sentences]


@pytest.mark.parametrize(
    ("strategy", "num_splits", "suffix_tokens", "expected"),
    [
        ("sentence_boundary", 1, 0, spans(9)),
        ("sentence_boundary", 10, 0, spans(*range(1, 10))),
        ("sentence_boundary", 99, 0, spans(*range(1, 10))),
        ("middle_sentence", 1, 0, spans(5)),
        ("middle_sentence", 5, 0, spans(5)),
        ("uniform_sentence", 1, 0, spans(9)),
        ("uniform_sentence", 3, 0, spans(3, 6, 9)),
        ("uniform_sentence", 5, 0, spans(2, 4, 6, 8, 9)),
        ("uniform_sentence", 9, 0, spans(*range(1, 10))),
        ("uniform_sentence", 20, 0, spans(*range(1, 10))),
        ("uniform_token", 1, 0, [(25, 50)]),
        ("uniform_token", 4, 0, [(10, 20), (20, 30), (30, 40), (40, 50)]),
        ("uniform_token", 6, 0, [(7, 14), (14, 21), (21, 28), (28, 35), (35, 42), (42, 50)]),
        ("random_token_fixed", 49, 0, [(i, 50) for i in range(1, 49)]),
        ("random_token_fixed", 99, 3, [(i, min(i + 3, 50)) for i in range(1, 49)]),
    ],
)
def test_splits_without_chance(strategy, num_splits, suffix_tokens, expected):
    assert choose_splits(TEN, strategy, num_splits, suffix_tokens, random.Random(0)) == expected


@pytest.mark.parametrize(
    ("strategy", "suffix_tokens", "expected"),
    [
        ("sentence_boundary", 0, [(5, 10), (10, 15), (35, 40), (40, 45), (45, 50)]),
        ("random_token", 0, [(1, 6), (6, 8), (8, 29), (29, 38), (38, 50)]),
        ("random_token_fixed", 4, [(1, 5), (6, 10), (8, 12), (29, 33), (38, 42)]),
    ],
)
def test_draws_are_the_same_everywhere(strategy, suffix_tokens, expected):
    """Values, not a second call: they hold on every platform and version of Python, so that results can be repeated."""
    assert choose_splits(TEN, strategy, 5, suffix_tokens, random.Random(1234)) == expected


def test_middle_sentences():
    middles = [
        choose_splits(hand_made(range(0, 2 * n, 2), 2 * n), "middle_sentence", 1, 0, random.Random(0))
        for n in range(2, 7)
    ]
    assert middles == [[(2, 4)], [(2, 4)], [(4, 6)], [(4, 6)], [(6, 8)]]


def test_suffixes_below_two_tokens_are_dropped_after_the_draw():
    document = hand_made([0, 3, 4, 8, 9], 10)  # sentences of 3, 1, 4, 1, 1 tokens
    assert choose_splits(document, "sentence_boundary", 5, 0, random.Random(0)) == [(4, 8)]
    assert choose_splits(document, "sentence_boundary", 1, 0, random.Random(0)) == []
    assert choose_splits(document, "middle_sentence", 1, 0, random.Random(0)) == [(4, 8)]
    assert choose_splits(document, "random_token", 9, 0, random.Random(0)) == []
    assert choose_splits(document, "uniform_token", 9, 0, random.Random(0)) == []


@pytest.mark.parametrize("strategy", SPLIT_STRATEGIES)
@pytest.mark.parametrize(("starts", "length"), [((), 0), ((0,), 1), ((0,), 2), ((0, 1), 2)])
def test_documents_too_short_to_split(strategy, starts, length):
    assert all(choose_splits(hand_made(starts, length), strategy, n, 0, random.Random(0)) == [] for n in (1, 2, 5))


def test_one_sentence_can_be_split_between_tokens_only():
    document = hand_made([0], 20)
    splittable = [s for s in SPLIT_STRATEGIES if choose_splits(document, s, 3, 0, random.Random(0))]
    assert splittable == ["random_token", "uniform_token", "random_token_fixed"]


def chi_square(counts, cells):
    expected = sum(counts.values()) / len(cells)
    assert set(counts) <= set(cells)
    return sum((counts[cell] - expected) ** 2 / expected for cell in cells)


def test_sentences_are_drawn_uniformly_without_replacement():
    rng = random.Random(0)
    document = hand_made(range(0, 14, 2), 14)  # seven sentences: 1..6 may be drawn, two of them, and 6 is always there
    draws = Counter(
        tuple(split.start // 2 for split in choose_splits(document, "sentence_boundary", 3, 0, rng))
        for _ in range(9000)
    )
    # 15 pairs out of six; with 6 among the pair the duplicate is merged, which leaves (i, 6).
    pairs = [(i, j, 6) for i, j in itertools.combinations(range(1, 6), 2)] + [(i, 6) for i in range(1, 6)]
    assert chi_square(draws, pairs) < 36.1  # 14 degrees of freedom, p = 0.001


def test_tokens_are_drawn_uniformly_without_replacement():
    rng = random.Random(0)
    document = hand_made([0], 8)
    # Every suffix to the end of the document: positions 1 to 7, of which 7 leaves one token and is dropped.
    draws = Counter(
        tuple(split.start for split in choose_splits(document, "random_token_fixed", 2, 0, rng)) for _ in range(9000)
    )
    pairs = [pair if pair[1] < 7 else pair[:1] for pair in itertools.combinations(range(1, 8), 2)]
    assert chi_square(draws, pairs) < 45.3  # 20 degrees of freedom, p = 0.001


@given(
    sentences=st.lists(st.integers(1, 6), max_size=12),
    strategy=st.sampled_from(SPLIT_STRATEGIES),
    num_splits=st.integers(1, 15),
    seed=st.integers(0, 99),
)
def test_what_holds_for_all_splits(sentences, strategy, num_splits, seed):
    length = sum(sentences)
    document = hand_made([0, *itertools.accumulate(sentences)][: len(sentences)], length)
    splits = choose_splits(document, strategy, num_splits, 0, random.Random(seed))
    assert splits == choose_splits(document, strategy, num_splits, 0, random.Random(seed))
    assert splits == sorted(set(splits))
    assert len(splits) <= num_splits
    assert all(1 <= split.start <= split.stop - 2 <= length - 2 for split in splits)
    if strategy in SENTENCE_STRATEGIES:
        bounds = [*document.sentence_starts, length]
        assert all(split in list(itertools.pairwise(bounds)) for split in splits)
    if strategy == "random_token_fixed":
        assert all(split.stop == length for split in splits)


@given(length=st.integers(3, 60), num_splits=st.integers(1, 20), seed=st.integers(0, 99))
def test_suffixes_to_the_next_split_lose_no_token(length, num_splits, seed):
    """The first prefix and all suffixes, joined, are the document, less one token for each suffix that was dropped."""
    document = hand_made([0], length)
    for strategy in ("random_token", "uniform_token"):
        splits = choose_splits(document, strategy, num_splits, 0, random.Random(seed))
        if not splits:
            continue
        joined = [token for split in splits for token in document.input_ids[split.start : split.stop].tolist()]
        assert joined == sorted(set(joined))
        lost = set(range(splits[0].start, length)) - set(joined)
        assert len(lost) <= num_splits - len(splits)
        if strategy == "uniform_token" and num_splits + 1 <= length // 2:
            assert len(splits) == num_splits
            sizes = {splits[0].start} | {split.stop - split.start for split in splits}
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("strategy", "num_splits", "suffix_tokens", "message"),
    [
        (
            "sentences",
            5,
            0,
            r"split_strategy: expected one of sentence_boundary, .*random_token_fixed, got 'sentences'",
        ),
        ("sentence_boundary", 0, 0, r"num_splits: expected at least 1, got 0"),
        ("random_token", 5, 8, r"--suffix_tokens is for --split_strategy random_token_fixed; got 8 with random_token"),
        ("random_token_fixed", 5, -1, r"suffix_tokens: expected 0 \(to the document's end\) or at least 2, got -1"),
        ("random_token_fixed", 5, 1, r"suffix_tokens: expected 0 \(to the document's end\) or at least 2, got 1"),
    ],
)
def test_bad_split_options(strategy, num_splits, suffix_tokens, message):
    with pytest.raises(ValueError, match=message):
        check_split_options(strategy, num_splits, suffix_tokens)
    with pytest.raises(ValueError, match=message):
        choose_splits(TEN, strategy, num_splits, suffix_tokens, random.Random(0))
