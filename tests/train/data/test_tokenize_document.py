"""Sentences, and their first tokens under every kind of tokenizer."""

import itertools
import random
import sys
import time
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from disc_train.data.documents import Document
from disc_train.data.splits import (
    SENTENCE_STRATEGIES,
    choose_splits,
    sentence_spans,
    tokenize_document,
)

CORPUS = ["The cat sat. The dog ran! Hello there. It is new. One more."] * 3


def byte_level(trim_offsets=False, add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8)


def metaspace(split=True):
    """SentencePiece's way: a space is a character of the word after it, what is unknown is spelt in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, trimmed": byte_level(trim_offsets=True),
    "byte-level, trimmed, prefixed": byte_level(trim_offsets=True, add_prefix_space=True),
    "metaspace": metaspace(),
    "metaspace, unsplit": metaspace(split=False),
    "word-piece": word_piece(),
}
BYTE_LEVEL = TOKENIZERS["byte-level"]


class SlowTokenizer(PreTrainedTokenizer):
    """A letter a token, in Python; without offsets."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(code): code for code in range(128)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


def tokenize(text, tokenizer=BYTE_LEVEL, way="document", max_tokens=None, language="en"):
    return tokenize_document(Document("a.txt", text), tokenizer, way, max_tokens, language)


def pieces(document, tokenizer):
    """The tokens of each sentence, as text."""
    bounds = [*document.sentence_starts, len(document.input_ids)]
    return [
        "".join(tokenizer.convert_ids_to_tokens(document.input_ids[start:stop].tolist()))
        for start, stop in itertools.pairwise(bounds)
    ]


# --- sentences ---


SENTENCES = {
    "English": ("en", ["Dr. Lee met e.g. Mr. Poe at 3.5 p.m. in Washington, D.C. today.", "“Why?”", "It rained…"]),
    "Spanish": ("es", ["¿Qué pasa?", "¡Hola!", "La Sra. Pérez llegó el 3 de mayo."]),
    "Japanese": ("ja", ["今日は良い天気です。", "明日は雨でしょう。", "終わり"]),
    "Hindi": ("hi", ["यह पहला वाक्य है।", "यह दूसरा है।", "क्या?"]),
    "Arabic": ("ar", ["هذه جملة أولى.", "هل هذا سؤال؟", "نعم."]),
    "beyond the BMP": ("en", ["Hello 😀 there.", "Family 👨‍👩‍👧 here!", "e\u0301te\u0301 𐍈𐍈.", "Done."]),
}


@pytest.mark.parametrize("between", [" ", "\n\n", "\r\n\r\n", " \n\n\n \t\n", "\u00a0\u2028", "\u3000 "])
@pytest.mark.parametrize("case", SENTENCES)
def test_sentences_of_many_languages(case, between):
    language, sentences = SENTENCES[case]
    text = between + between.join(sentences) + between
    assert [text[start:stop] for start, stop in sentence_spans(text, language)] == sentences


@pytest.mark.parametrize("text", ["", " ", "\n\n \t\r\n", "\u3000\u00a0"])
def test_no_sentences(text):
    assert sentence_spans(text) == []


def test_the_language_matters():
    text = "Am 5. Januar kam Frau Dr. Kunz. Sie ging."
    assert len(sentence_spans(text, "de")) == 2
    assert len(sentence_spans(text, "en")) == 3
    assert sentence_spans(text, "xx") == sentence_spans(text, "en")


@pytest.mark.parametrize("language", ["english", "EN", "pt-BR", "", "e"])
def test_what_is_no_language_code(language):
    with pytest.raises(ValueError, match=f"language: expected an ISO 639 code such as 'en' or 'ja', got '{language}'"):
        tokenize("One. Two.", language=language)


@given(
    st.text(st.sampled_from("aB.?!。।؟ \t\n\r\u0085\u00a0\u2003\u2028\u3000é\u0301😀𐍈'\"()«»")),
    st.sampled_from(["en", "fr", "ja"]),
)
@settings(deadline=None, max_examples=500)
def test_spans_leave_out_white_space_only(text, language):
    spans = sentence_spans(text, language)
    flat = [0, *(offset for span in spans for offset in span), len(text)]
    assert sorted(flat) == flat
    assert all(text[start:stop] and text[start:stop] == text[start:stop].strip() for start, stop in spans)
    assert not "".join(text[start:stop] for start, stop in zip(flat[::2], flat[1::2], strict=True)).strip()


def test_a_white_space_that_the_splitter_cannot_take():
    assert sentence_spans("Take vitamin B\u00a0. Next one.") == [(0, 16), (17, 26)]


def test_a_megabyte_of_text():
    text = "The quick brown fox jumps over 😀 the dog. " * 25_000
    start = time.perf_counter()
    assert len(sentence_spans(text)) == 25_000
    assert time.perf_counter() - start < 10  # 0.2 s on an idle core


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n\n\n \t\n", "\n\u00a0\n"])
def test_long_texts_of_paragraphs(between):
    """The splitter works through long texts in parts, and leaves out the white space between two parts."""
    sentences = [f"Sentence {number}, of Mr. Poe, is 🦊 {'very ' * (number % 50)}long." for number in range(2000)]
    text = between.join(f"{first} {second}" for first, second in zip(sentences[::2], sentences[1::2], strict=True))
    assert [text[start:stop] for start, stop in sentence_spans(text)] == sentences


def test_real_documents():
    for text in topics.values():
        spans = sentence_spans(text)
        flat = [0, *itertools.chain(*spans), len(text)]
        assert flat == sorted(flat)
        assert not "".join(text[start:stop] for start, stop in zip(flat[::2], flat[1::2], strict=True)).strip()


def test_an_absent_splitter(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ImportError, match=r"pip install 'disc-kernels\[train\]'"):
        sentence_spans("One. Two.")


# --- tokens ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("byte-level", ["The\u0120cat\u0120sat.", "\u0120The\u0120dog\u0120ran!", "\u0120Hello\u0120there."]),
        ("byte-level, trimmed", ["The\u0120cat\u0120sat.", "\u0120The\u0120dog\u0120ran!", "\u0120Hello\u0120there."]),
        ("metaspace", ["▁The▁cat▁sat.", "▁The▁dog▁ran!", "▁Hello▁there."]),
        ("word-piece", ["thecatsat.", "thedogran!", "hellothere."]),
    ],
)
def test_a_sentence_begins_with_the_space_before_it(name, expected):
    tokenizer = TOKENIZERS[name]
    document = tokenize("The cat sat. The dog ran! Hello there.", tokenizer)
    assert [piece.replace("##", "") for piece in pieces(document, tokenizer)] == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sentence_starts_under_every_tokenizer(name):
    """Held to a slow search: the first token whose characters, without the space around them, reach the sentence."""
    tokenizer = TOKENIZERS[name]
    text = "\n 😀 Hi the cat.  東京 is new. \n\n🦊🦊 The dog ran!\r\n\r\nÉté. The\u00a0cat. e\u0301 One more. 𐍈"
    document = tokenize(text, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert document.input_ids.tolist() == encoding["input_ids"]
    starts = []
    for sentence, _ in sentence_spans(text):
        holds = [i for i, (start, stop) in enumerate(encoding["offset_mapping"]) if start <= sentence < stop]
        starts.append(holds[0])
    assert len(starts) == 7
    assert document.sentence_starts == (0, *starts[1:])


@pytest.mark.parametrize("name", ["byte-level", "byte-level, trimmed", "metaspace"])
def test_a_character_of_several_tokens_belongs_to_its_sentence(name):
    tokenizer = TOKENIZERS[name]
    document = tokenize("It is new.\n🦊 ran.", tokenizer)
    start = document.sentence_starts[1]
    assert len(tokenizer("🦊", add_special_tokens=False)["input_ids"]) >= 4
    assert tokenizer.decode(document.input_ids[start:]) == "🦊 ran."
    assert tokenizer.decode(document.input_ids[:start]) == "It is new.\n"


def test_sentences_that_begin_in_one_token_are_one():
    tokenizer = Tokenizer(models.WordLevel({"一": 0, "。二。三": 1, "。四": 2}, unk_token="一"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("一|。二。三|。四"), "isolated")
    assert len(sentence_spans("一。二。三。四", "ja")) == 4
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    document = tokenize("一。二。三。四", fast, language="ja")
    assert document.input_ids.tolist() == [0, 1, 2]
    assert document.sentence_starts == (0, 1, 2)
    assert tokenize("。二。三", fast, language="ja").sentence_starts == (0,)


def test_characters_that_a_tokenizer_drops_begin_no_sentence():
    tokenizer = word_piece()
    document = tokenize("The cat sat. The dog ran.\n\n\u200b", tokenizer)
    assert len(document.sentence_starts) == 2
    assert tokenize("\u200b", tokenizer).sentence_starts == ()
    document = tokenize("The cat sat.\n\n\u200b\n\nThe dog ran.", tokenizer, "sentence")
    assert document.sentence_starts == (0, 4)


@given(st.text(st.sampled_from("The cat sat. 東é🦊\n\r\t!?。\u00a0\u0301\u200d")))
@settings(deadline=None)
def test_document_tokens_are_the_text(text):
    document = tokenize(text)
    assert BYTE_LEVEL.decode(document.input_ids, clean_up_tokenization_spaces=False) == text
    assert document.sentence_starts[:1] == ((0,) if text else ())
    assert list(document.sentence_starts) == sorted(set(document.sentence_starts))


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SlowTokenizer()], ids=["fast", "slow"])
def test_sentences_tokenized_on_their_own(tokenizer):
    document = tokenize("  The cat sat.\n\n The dog ran! \t Hello there.\n", tokenizer, "sentence")
    sentences = ["The cat sat.", "The dog ran!", "Hello there."]
    alone = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
    assert document.input_ids.tolist() == list(itertools.chain(*alone))
    assert document.sentence_starts == (0, len(alone[0]), len(alone[0]) + len(alone[1]))


def test_a_slow_tokenizer_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"SlowTokenizer .* use --sentence_tokenization sentence"):
        tokenize("One. Two.", SlowTokenizer())


@pytest.mark.parametrize("way", ["document", "sentence"])
def test_no_special_tokens(way):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    document = tokenize("The cat sat. The dog ran!", tokenizer, way)
    assert tokenizer.bos_token_id not in document.input_ids
    assert document.sentence_starts == tokenize("The cat sat. The dog ran!", BYTE_LEVEL, way).sentence_starts


@pytest.mark.parametrize("way", ["document", "sentence"])
@pytest.mark.parametrize("text", ["", " \n\n ", "\u00a0"])
def test_empty_documents_have_no_sentence_to_split(text, way):
    document = tokenize(text, way=way)
    assert document.input_ids.dtype == np.int32
    assert len(document.sentence_starts) <= 1
    assert all(not choose_splits(document, s, 5, 0, random.Random(0)) for s in SENTENCE_STRATEGIES)


@pytest.mark.parametrize("way", ["document", "sentence"])
def test_max_tokens(way):
    text = "The cat sat. The dog ran! Hello there."
    whole = tokenize(text, way=way)
    second, third = whole.sentence_starts[1:]
    for limit, starts in [
        (len(whole.input_ids), (0, second, third)),
        (third + 1, (0, second, third)),
        (third, (0, second)),
        (second + 1, (0, second)),
        (1, (0,)),
    ]:
        document = tokenize(text, way=way, max_tokens=limit)
        assert document.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert document.sentence_starts == starts
        assert document.cut == len(whole.input_ids) - limit
    assert whole.cut == 0
    with pytest.raises(ValueError, match="max_document_tokens: expected at least 1, got 0"):
        tokenize(text, way=way, max_tokens=0)


@pytest.mark.parametrize("way", ["document", "sentence"])
def test_long_text_is_neither_truncated_nor_warned_about(way, caplog):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    text = "The cat sat. " * 50 + "The " * 50
    assert tokenizer.model_max_length == 8
    assert len(tokenize(text, tokenizer, way).input_ids) > 200
    assert not caplog.records


def test_an_unknown_way():
    with pytest.raises(ValueError, match="sentence_tokenization: expected document or sentence, got 'word'"):
        tokenize("One. Two.", way="word")


def test_sentence_suffixes_and_the_first_sentence_are_the_document():
    text = "The cat sat. 東京 is new. \n\n🦊 The dog ran! One more."
    document = tokenize(text)
    splits = choose_splits(document, "sentence_boundary", 99, 0, random.Random(0))
    joined = document.input_ids[: splits[0].start].tolist()
    for start, stop in splits:
        joined += document.input_ids[start:stop].tolist()
    assert len(splits) == 3
    assert BYTE_LEVEL.decode(joined) == text
