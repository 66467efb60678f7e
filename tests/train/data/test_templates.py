"""Templates: what comes before and after the prefix, and what is refused, naming the flag."""

import copy

import pytest

from disc_train.data.dataset import DocumentDataset
from disc_train.data.templates import read_templates

LLAMA3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """With a template in the manner of Llama 3's."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|user|>", "<|eot|>"]})
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.fixture
def texts(chat_tokenizer):
    """texts(teacher, student): header, footer and the student's header, decoded."""

    def read(teacher=None, student=None):
        templates = read_templates(teacher, student, chat_tokenizer)
        texts = (templates.teacher_header, templates.teacher_footer, templates.student_header)
        return tuple(chat_tokenizer.decode(ids) for ids in texts)

    return read


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (None, None, ("", "", "")),
        ("{{ prefix }}", "", ("", "", "")),
        ("{{ bos_token }}{{ prefix }}", "{{ bos_token }}", ("<s>", "", "<s>")),
        ("News:\n{{ prefix }}\n\nGo on:", "News:", ("News:\n", "\n\nGo on:", "News:")),
        ("{{ prefix | trim }}!", None, ("", "!", "")),
        (
            "{{ chat('Read: ' + prefix, system='Be brief.') }}",
            "{{ chat('Go on.') }}",
            (
                "<|system|>\n\nBe brief.<|eot|><|user|>\n\nRead: ",
                "<|eot|><|assistant|>\n\n",
                "<|user|>\n\nGo on.<|eot|><|assistant|>\n\n",
            ),
        ),
        ("{% if true %}\n  {{ prefix }}\n{% endif %}", None, ("  ", "\n", "")),
    ],
)
def test_header_and_footer(teacher, student, expected, texts):
    assert texts(teacher, student) == expected


def test_special_tokens_are_recognised(chat_tokenizer):
    templates = read_templates("{{ bos_token }}{{ chat(prefix) }}", None, chat_tokenizer)
    special = chat_tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
    assert templates.teacher_header[:2].tolist() == special
    assert templates.longest == len(templates.teacher_header) + len(templates.teacher_footer)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file(encoding, texts, tmp_path):
    path = tmp_path / "teacher.jinja"
    path.write_text("News: {{ prefix }}\nWeiter, Straße:\n", encoding=encoding)
    assert texts(str(path)) == ("News: ", "\nWeiter, Straße:", "")


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ("Read this.", None, "--teacher_template: .*drops the prefix"),
        ("", None, "--teacher_template: .*drops the prefix"),
        ("{{ prefix }} {{ prefix }}", None, "--teacher_template: .*writes the prefix 2 times"),
        *(
            (f"{{{{ prefix{change} }}}}", None, "--teacher_template: .*drops the prefix or changes it")
            for change in (
                " | upper",
                " | lower",
                " | title",
                " | truncate(5000)",
                " | replace('\\n', ' ')",
                " | e",
                " | wordwrap",
                " | indent",
                " | tojson",
                "[:100]",
                ".split() | join(' ')",
                " | urlize",
            )
        ),
        ("{{ prefix }}{{ prefix | length }}", None, "--teacher_template: .*depends on the prefix"),
        ("{{ prefix }}{% if prefix | length > 500 %}!{% endif %}", None, "--teacher_template: .*depends on the prefix"),
        ("{{ prefix }}{{ document }}", None, "--teacher_template: cannot render.*'document' is undefined"),
        ("{{ prefix ", None, "--teacher_template: cannot render"),
        ("{{ prefix }}{{ 1 / 0 }}", None, "--teacher_template: cannot render.*division by zero"),
        ("{{ prefix }}{{ chat() }}", None, "--teacher_template: cannot render.*user"),
        ("{{ prefix.__class__.__mro__ }}", None, "--teacher_template: cannot render.*unsafe"),
        (None, "{{ prefix }}", "--student_template: cannot render.*'prefix' is undefined.*the student reads no prefix"),
        (None, "{{ chat(prefix) }}", "--student_template: .*the student reads no prefix"),
        ("{{ prefix }}{{ '\\ud800' }}", None, "--teacher_template: 'rendered text' holds a lone surrogate"),
        (None, "{{ '\\ud800' }}", "--student_template: 'rendered text' holds a lone surrogate at character 0"),
        ("no/such.jinja", None, r"--teacher_template: expected a readable file.*no/such\.jinja"),
    ],
)
def test_what_is_wrong_is_named(teacher, student, message, chat_tokenizer):
    with pytest.raises(ValueError, match=message):
        read_templates(teacher, student, chat_tokenizer)


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match=r"--student_template: .*a model with a chat template"):
        read_templates(None, "{{ chat('Go on.') }}", tokenizer)


def test_a_chat_template_that_refuses(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"--teacher_template: .*System role not supported"):
        read_templates("{{ chat(prefix, system='x') }}", None, chat_tokenizer)


def test_the_examples_of_a_dataset(make_dataset, chat_tokenizer):
    """The document's tokens are those that it has alone, whatever stands around them."""
    plain = make_dataset(3)
    templates = read_templates("News: {{ prefix }} Go on:", "Say: ", chat_tokenizer)
    dataset = DocumentDataset(plain.documents, templates=templates)
    for index, document in enumerate(plain.documents):
        example = dataset[index]
        assert dataset.splits(index) == plain.splits(index)
        header = len(templates.teacher_header)
        assert example.teacher_trunk.tolist() == [*templates.teacher_header, *document.input_ids]
        assert example.student_trunk.tolist() == templates.student_header.tolist()
        for branch, (start, stop) in zip(example.branches, plain.splits(index), strict=True):
            assert branch.target.tolist() == document.input_ids[start:stop].tolist()
            assert branch.teacher.attach == header + start
            assert branch.teacher.lead.tolist() == templates.teacher_footer.tolist()
            assert branch.student.attach == len(templates.student_header)
            assert branch.first == 0
