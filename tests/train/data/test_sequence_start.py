"""A sequence starts as the tokenizer starts a text, or as asked for, and never twice."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from disc_train.data.sequence_start import bos_prefix, start_sequence
from tests.train.bos_tokenizer import with_bos


def test_a_tokenizer_without_bos_puts_nothing_before_a_text(tokenizer):
    assert bos_prefix(tokenizer) == bos_prefix(tokenizer, "false") == []
    with pytest.raises(ValueError, match="--add_bos: expected a tokenizer that has a BOS token for 'true'"):
        bos_prefix(tokenizer, "true")


def test_a_tokenizer_with_bos_puts_it_before_a_text(tokenizer):
    starting = with_bos(tokenizer)
    assert bos_prefix(starting) == bos_prefix(starting, "true") == [starting.bos_token_id]
    assert bos_prefix(starting, "false") == []


def test_a_bos_token_that_the_tokenizer_does_not_use_is_added_only_when_asked_for(tokenizer):
    silent = copy.deepcopy(tokenizer)
    silent.add_special_tokens({"bos_token": "<s>"})
    assert bos_prefix(silent) == []
    assert bos_prefix(silent, "true") == [silent.bos_token_id]


def test_auto_takes_all_that_comes_before_a_text_and_nothing_that_comes_after(tokenizer):
    """As with GLM, whose texts start with [gMASK]<sop>."""
    around = copy.deepcopy(tokenizer)
    around.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["[gMASK]"]})
    ids = {token: around.convert_tokens_to_ids(token) for token in ("[gMASK]", "<s>", "</s>")}
    around.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <s> $A </s>", special_tokens=list(ids.items())
    )
    assert bos_prefix(around) == [ids["[gMASK]"], ids["<s>"]]


def test_nothing_is_added_twice_or_to_nothing(tokenizer):
    starting = with_bos(tokenizer)
    prefix = bos_prefix(starting)
    ids = starting.encode("A bridge.", add_special_tokens=False)
    assert start_sequence(prefix, ids) == starting.encode("A bridge.")
    written = starting.encode("<s>A bridge.", add_special_tokens=False)  # as chat templates write it
    assert start_sequence(prefix, written) == start_sequence(prefix, ids)
    assert start_sequence([], ids) == ids
    assert start_sequence(prefix, []) == []
