"""Read what stands around a document: a template for the teacher, which reads prefixes, and one for the student.

A template is Jinja. What it writes before the prefix is the header, what it writes after it the footer. The two and the
document are tokenised each on its own and joined: then the document's tokens are the same whatever stands around them,
and the prefixes of all its split points are first parts of one another, so that one reading serves all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import chat_text, encode
from disc_train.data.example import NO_IDS, Ids
from disc_train.data.records import check_text
from disc_train.data.sequence_start import start_context

# Rendered in the prefix's place. Two, of different length and wording, with what filters change: a template that writes
# both unchanged, and the same around them, is taken to do so for every prefix, which one that asks for lengths beyond
# these may not. (White space at either end is not tried, because many chat templates strip it; a document keeps its
# own.)
_PROBES = ("A probe\twith  <Spaces> & Straße.", '\'Another "PROBE",\n\n- of {many} lines.\r\n' * 1_000 + "end")


class Templates(NamedTuple):
    """Hold the tokens around a document's prefix for the teacher, and before a suffix for the student."""

    teacher_header: Ids = NO_IDS
    teacher_footer: Ids = NO_IDS
    student_header: Ids = NO_IDS
    start: int = 0  # tokens that both headers have without any template, such as BOS

    @property
    def longest(self) -> int:
        """Count the tokens that either model reads beside the document, at most."""
        return max(len(self.teacher_header) + len(self.teacher_footer), len(self.student_header))


NO_TEMPLATES = Templates()


def read_templates(
    teacher: str | None, student: str | None, tokenizer: PreTrainedTokenizerBase, start: Sequence[int] = ()
) -> Templates:
    """Read both templates: Jinja, or the path of a .jinja file; None: the teacher reads the prefix alone, the student
    nothing before a suffix. Both headers start with the tokens `start`.

    Variables: `prefix`, the document before the split (the teacher's only, which has to write it once, as it is);
    `bos_token` and `eos_token`; `chat(user, system=None)`, those messages in the tokenizer's chat template, up to where
    the assistant's answer begins.

    Raises:
        ValueError: naming the flag: an unreadable file, an error in the template, a prefix that is missing, repeated,
            changed, or that decides what is written around it; a student's template that uses the prefix.
    """
    header, footer = _around_prefix("--teacher_template", teacher, tokenizer)
    student_header = "" if student is None else render("--student_template", student, tokenizer)
    header_ids, student_ids = (start_context(start, encode(tokenizer, text)) for text in (header, student_header))
    return Templates(header_ids, encode(tokenizer, footer), student_ids, len(start))


def _around_prefix(flag: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if template is None:
        return "", ""
    pieces = []
    for probe in _PROBES:
        pieces.append(render(flag, template, tokenizer, prefix=probe).split(probe))
        found = len(pieces[-1]) - 1
        if found != 1:
            wrong = "drops the prefix or changes it" if found == 0 else f"writes the prefix {found} times"
            raise ValueError(
                f"{flag}: expected a template that writes {{{{ prefix }}}} once, unchanged; this one {wrong}"
            )
    if pieces[0] != pieces[1]:
        raise ValueError(f"{flag}: expected the same text around every prefix, got one that depends on the prefix")
    header, footer = pieces[0]
    return header, footer


def render(flag: str, template: str, tokenizer: PreTrainedTokenizerBase, **variables: str) -> str:
    """Render a template, or a .jinja file, with `bos_token`, `eos_token`, `chat` and some variables.

    Raises:
        ValueError: naming the flag, an unreadable file or an error in the template.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def chat(user: str, system: str | None = None) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        return chat_text(tokenizer, [*messages, {"role": "user", "content": user}])

    if template.endswith(".jinja"):
        try:
            template = Path(template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{flag}: expected a readable file, got: {error}") from error
    # As transformers renders chat templates, so that one way of writing them serves both.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        text = environment.from_string(template).render(
            chat=chat, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "", **variables
        )
    except Exception as error:  # of whatever kind a template's own expressions raise
        hint = "" if variables else " (variables: bos_token, eos_token, chat; the student reads no prefix)"
        raise ValueError(f"{flag}: cannot render this template: {error}{hint}") from error
    return check_text(flag, "rendered text", text)
