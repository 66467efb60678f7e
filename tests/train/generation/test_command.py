"""disc-generate: the records it writes, the same file whether interrupted or not, bad input in one clear line."""

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from disc_train.cli import generate
from disc_train.data.contexts import load_records
from disc_train.data.documents import load_documents
from disc_train.generation import decoding
from disc_train.generation.decoding import continue_batch
from tests.train.bos_tokenizer import with_bos
from tests.train.commands import error_line
from tests.train.files import read_jsonl

TEXTS = [
    "Merin is a town.",
    "The river Aral was named after the surveyor who first crossed it.",
    "It opened in the spring. Its two towers are built of red stone.",
]


@pytest.fixture
def disc_generate(tmp_path, model_folder, write_documents):
    """disc_generate(*flags, texts=TEXTS, output="out.jsonl"): the exit code."""

    def run(*flags, texts=TEXTS, output="out.jsonl"):
        return generate(
            [
                *("--model_name_or_path", str(model_folder), "--train_file", str(write_documents(texts))),
                *("--output_file", str(tmp_path / output), "--max_new_tokens", "8", "--num_generations", "3"),
                *("--batch_size", "2", "--use_cpu", "true"),
                *map(str, flags),
            ]
        )

    return run


@pytest.fixture
def fails(disc_generate, capsys):
    """fails(*flags): the exit code and the one line on stderr."""

    def run(*flags, **options):
        code = disc_generate(*flags, **options)
        return code, error_line(capsys, code)

    return run


def test_paraphrases_are_documents(disc_generate, tmp_path, capsys):
    assert disc_generate() == 0
    assert "9 texts written; 9 stopped at 8 tokens; 0 empty, left out" in capsys.readouterr().out
    records = read_jsonl(tmp_path / "out.jsonl")
    assert len({record["id"] for record in records}) == len({record["text"] for record in records}) == 9
    sources = [record["document"].rpartition(":")[2] for record in records]
    assert sorted(sources) == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert [document.text for document in load_documents(str(tmp_path / "out.jsonl"), None)] == [
        record["text"] for record in records
    ]


def test_continuations_are_records_for_cd(disc_generate, tmp_path, tokenizer):
    assert disc_generate("--mode", "cd") == 0
    records = read_jsonl(tmp_path / "out.jsonl")
    examples = load_records(str(tmp_path / "out.jsonl"), None, tokenizer)
    for record, example in zip(records, examples, strict=True):
        document = TEXTS[int(record["document"].rpartition(":")[2]) - 1]
        assert tokenizer.decode(example.teacher_trunk) == f"{document}\n\n"
        assert len(example.student_trunk) == 0
        assert tokenizer.decode(example.branches[0].target) == record["target"] == record["target"].strip()


def test_an_interrupted_run_gives_the_same_file(disc_generate, tmp_path, capsys):
    assert disc_generate(output="whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # After nothing, within the first line, between two batches, within one, before the last line end, after all.
    for kept in (0, 7, len(b"".join(lines[:4])), len(b"".join(lines[:5])) + 20, len(whole) - 1, len(whole)):
        (tmp_path / "out.jsonl").write_bytes(whole[:kept])
        assert disc_generate() == 0
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert "0 texts written, 9 were done before" in capsys.readouterr().out


def test_a_run_stopped_between_batches_goes_on(disc_generate, fails, tmp_path, monkeypatch):
    assert disc_generate(output="whole.jsonl") == 0

    calls = []

    def stopped(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return continue_batch(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "continue_batch", stopped)
        assert fails() == (130, "disc-generate: error: interrupted")
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 4
    assert disc_generate() == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(disc_generate, tmp_path):
    assert disc_generate() == 0
    assert disc_generate("--batch_size", 7, "--max_batch_tokens", 150, output="batches.jsonl") == 0
    assert disc_generate("--seed", 43, output="seed.jsonl") == 0
    first, batches, seed = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("out", "batches", "seed"))
    assert first == batches
    assert not {record["text"] for record in first} & {record["text"] for record in seed}


def test_samples_follow_the_models_distribution(disc_generate, model_folder, tmp_path):
    prompt = "{{ document }}"
    flags = ("--temperature", 1.5, "--top_p", 0.6, "--max_new_tokens", 1, "--prompt_template", prompt)
    assert disc_generate(*flags, "--num_generations", 3000, "--batch_size", 500, texts=TEXTS[1:2]) == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(TEXTS[1])])).logits[0, -1]
    probabilities, tokens = (logits / 1.5).softmax(-1).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    texts = [tokenizer.decode([token]).strip() for token in tokens[:kept]]
    written = [record["text"] for record in read_jsonl(tmp_path / "out.jsonl")]
    assert set(written) <= set(texts)
    for text, probability in zip(texts, probabilities.tolist(), strict=True):
        if text and texts.count(text) == 1:
            error = math.sqrt(probability * (1 - probability) / 3000)
            assert written.count(text) / 3000 == pytest.approx(probability, abs=4 * error)


def test_other_settings_do_not_go_on_with_a_file(disc_generate, fails):
    assert disc_generate() == 0
    for flags, texts in (
        (("--temperature", 0.5), TEXTS),
        (("--top_p", 0.5), TEXTS),
        (("--mode", "cd"), TEXTS),
        (("--seed", 7), TEXTS),
        ((), [*TEXTS[:2], "Another."]),
    ):
        code, line = fails(*flags, texts=texts)
        assert (code, "is no text of this run" in line) == (1, True)


@pytest.mark.parametrize("text", ['{"text": "mine"}\n', '{"text": "mine"}', "\n", '{"id": "mine"}', "mine\nmine"])
def test_a_file_of_something_else_is_left_alone(text, fails, tmp_path):
    (tmp_path / "out.jsonl").write_text(text)
    code, line = fails()
    assert (code, "out.jsonl:1 is no text of this run" in line) == (1, True)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_documents_that_cannot_be_read_are_named(disc_generate, fails, tmp_path, capsys):
    long = "It opened in the spring. " * 60
    assert disc_generate(texts=[TEXTS[0], "", long, *[""] * 4]) == 0
    out = capsys.readouterr().out
    assert "7 read; 6 left out: " in out
    assert "documents.jsonl:2 (empty), " in out
    assert "documents.jsonl:3 (" in out and "documents.jsonl:6 (empty), ...\n" in out
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 3
    code, line = fails(texts=[long], output="none.jsonl")
    assert (code, "none of 1 documents can be used" in line) == (1, True)
    assert not (tmp_path / "none.jsonl").exists()


def test_texts_that_end_at_once_are_counted(disc_generate, fails, model_folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = list(range(0, 300, 2))  # half of all tokens
    model.save_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokenizer.convert_ids_to_tokens(range(0, 300, 2))})
    tokenizer.save_pretrained(model_folder)  # and no text is written for them
    assert disc_generate("--temperature", 3) == 0
    records = read_jsonl(tmp_path / "out.jsonl")
    assert 0 < len(records) < 9
    assert all(record["text"] for record in records)
    assert f"{9 - len(records)} empty, left out" in capsys.readouterr().out
    assert disc_generate("--temperature", 3) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == records
    assert disc_generate("--temperature", 3, "--mode", "cd", output="cd.jsonl") == 0  # of which disc-train refuses none
    records = read_jsonl(tmp_path / "cd.jsonl")
    assert min(len(tokenizer(record["target"], add_special_tokens=False).input_ids) for record in records) > 1
    out = capsys.readouterr().out
    left_out = re.search(r"(\d) texts written; .*; (\d) empty, (\d) of a single token, .*, left out", out)
    assert sum(map(int, left_out.groups())) == 9 and left_out[1] == str(len(records)) and left_out[3] != "0"
    model.generation_config.eos_token_id = list(range(300))
    model.save_pretrained(model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokenizer.convert_ids_to_tokens(range(300))})
    tokenizer.save_pretrained(model_folder)
    code, line = fails(output="none.jsonl")
    assert (code, "all 9 texts are empty" in line) == (1, True)


def test_models_that_cannot_read_or_write(fails, model_folder, make_model, tmp_path):
    make_model(vocab_size=260).save_pretrained(model_folder)
    assert "got a vocabulary of 260: the tokenizer is another model's" in fails()[1]
    assert not (tmp_path / "out.jsonl").exists()
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(model_folder)
    assert "expected logits that are numbers from the model, got NaN" in fails()[1]


def test_a_template_of_ones_own(disc_generate, fails, chat_tokenizer, model_folder, prompts):
    chat_tokenizer.save_pretrained(model_folder)
    template = '{{ chat("Say it again: " ~ document, system="Briefly.") }}'
    assert disc_generate("--prompt_template", template, "--num_generations", 1) == 0
    expected = [f"<system>Briefly.</>\n<user>Say it again: {text}</>\n<assistant>" for text in TEXTS]
    assert sorted(map(chat_tokenizer.decode, prompts)) == sorted(expected)
    prompts.clear()
    assert disc_generate("--num_generations", 1, output="default.jsonl") == 0
    read = map(chat_tokenizer.decode, prompts)
    assert all(prompt.startswith("<user>Write the following text again") for prompt in read)
    assert "expected a template that writes {{ document }}" in fails("--prompt_template", "Write.", output="x.jsonl")[1]
    line = fails("--prompt_template", "{{ prefix }}", output="x.jsonl")[1]
    assert "--prompt_template: cannot render this template: 'prefix' is undefined" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "0"), "--temperature: expected a positive, finite number, got 0.0"),
        (("--top_p", "1.5"), "--top_p: expected more than 0 and at most 1"),
        (("--num_generations", "0"), "--num_generations: expected at least 1"),
        (("--output_file", "out.txt"), "--output_file: expected a .jsonl file"),
        (("--train_file", ""), "--train_file: expected a name or a path, got an empty text"),
        (("--dataset_name", "x"), "expected one of --train_file and --dataset_name, got both"),
        (("--top_k", "3"), "unknown argument --top_k"),
    ],
)
def test_wrong_usage_is_code_2(flags, message, fails):
    code, line = fails(*flags)
    assert (code, message in line) == (2, True)


def test_what_is_missing_is_named_by_its_flag(fails, tmp_path):
    for flag in ("--train_file", "--model_name_or_path"):
        assert f"disc-generate: error: {flag}: " in fails(flag, tmp_path / "none")[1]
    (tmp_path / "file").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "folder.jsonl", tmp_path / "file" / "out.jsonl"):
        assert "disc-generate: error: --output_file: expected a f" in fails("--output_file", path)[1]


def test_a_model_that_needs_eager_attention_writes(disc_generate, model_folder, make_model):
    make_model("gemma2").save_pretrained(model_folder)
    assert disc_generate("--num_generations", 1) == 0


def test_prompts_start_as_the_tokenizer_starts_them(disc_generate, model_folder, make_model, tokenizer, prompts):
    make_model(vocab_size=301).save_pretrained(model_folder)
    starting = with_bos(tokenizer)
    starting.save_pretrained(model_folder)
    for number, (template, add_bos, start) in enumerate(
        [
            ("{{ document }}", "auto", "<s>"),
            ("{{ bos_token }}{{ document }}", "true", "<s>"),
            ("{{ document }}", "false", ""),
        ]
    ):
        prompts.clear()
        flags = ("--num_generations", 1, "--prompt_template", template, "--add_bos", add_bos)
        assert disc_generate(*flags, output=f"{number}.jsonl") == 0
        assert sorted(map(starting.decode, prompts)) == sorted(start + text for text in TEXTS)


def test_a_file_is_not_gone_on_with_where_sequences_start_otherwise(
    disc_generate, fails, model_folder, make_model, tokenizer
):
    make_model(vocab_size=301).save_pretrained(model_folder)
    with_bos(tokenizer).save_pretrained(model_folder)
    assert disc_generate("--num_generations", 1) == 0
    assert "is no text of this run" in fails("--num_generations", 1, "--add_bos", "false")[1]
