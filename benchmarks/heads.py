"""Compare the output head that `disc_kernels.hf` reads of every family with the model's logits; write docs/heads.md.

`python -m benchmarks.heads` runs it. A model is tiny and random, as in `families.py`; what its config says of a factor
on the logits or of a soft cap is given a value that changes them, and biases are random.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoModelForImageTextToText

from benchmarks.families import FAMILIES, LONG, VOCABULARY, make_model, tiny_config
from disc_kernels.hf import OutputHead, last_hidden_states, output_head
from disc_kernels.hf.head import DIVISORS, FACTORS, SOFTCAPS, logits_of

PAGE = Path(__file__).parent.parent / "docs" / "heads.md"
RESULTS = Path(__file__).parent / "results" / "cpu" / "heads.json"
TOLERANCE = 1e-5
# Models of more than text whose heads have factors that models of text have not.
BESIDES = {"hyperclovax_vision_v2", "muse_glimmer"}
LARGEST = 50_000_000  # parameters that these may have


class Outcome(NamedTuple):
    """Say how a family's head was read, and how far its logits are off, relative to the largest; or why not."""

    family: str
    result: str  # "equal", "WRONG", "refused" or "not run"
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    error: float = 0.0
    message: str = ""


@torch.no_grad()
def examine(family: str) -> Outcome:
    """Compare one family's head with its logits."""
    try:
        config = tiny_config(family, LONG)
        for names, value in ((FACTORS, 1.7), (DIVISORS, 3.0), (SOFTCAPS, 2.0)):
            for name in names:
                if name in vars(config.get_text_config()):  # MiniCPM3 computes it
                    setattr(config.get_text_config(), name, value)
        model = make_model(config, AutoModelForImageTextToText, LARGEST) if family in BESIDES else make_model(config)
        inputs = {"input_ids": torch.arange(3, min(VOCABULARY, 19))[None], "use_cache": False}
        logits = model(**inputs).logits
    except Exception as error:
        return Outcome(family, "not run", message=_one_line(error))
    try:
        head: OutputHead = output_head(model)
        ours = logits_of(head, last_hidden_states(model, **inputs))
    except ValueError as error:
        return Outcome(family, "refused", message=_one_line(error))
    if ours.shape != logits.shape:
        return Outcome(family, "refused", message=f"check_output_head: logits of shape {list(logits.shape)}")
    difference = float((ours - logits).abs().max() / logits.abs().max())
    result = "equal" if difference < TOLERANCE else "WRONG"
    return Outcome(family, result, head.transform.scale, head.transform.softcap, head.bias is not None, difference)


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else text[:200] + " ..."


def render(outcomes: Sequence[Outcome]) -> str:
    """Write the page."""
    equal = sum(outcome.result == "equal" for outcome in outcomes)
    lines = [
        "# Output heads of families of models",
        "",
        f"`python -m benchmarks.heads`, transformers {transformers.__version__}, PyTorch {torch.__version__}; the"
        f" figures are those of [{RESULTS.name}](../benchmarks/results/cpu/{RESULTS.name}).",
        "",
        "Every family of `AutoModelForCausalLM`, and two models of images and text, made tiny and random, in float32"
        " on the CPU. Factors on the logits and soft caps that a config has are given values that change them, and"
        " biases are random. What `disc_kernels.hf` makes of `last_hidden_states` and `output_head` is compared with"
        f" the model's own logits: the error is the largest difference, relative to the largest logit. {equal} of"
        f" {len(outcomes)} are equal.",
        "",
        "Float32 LoRA adapters on a bfloat16 head are merged into bfloat16, which rounds: of an update of a 16th of the"
        " weight's norm 3 % of the effect on the logits is off, of a 256th 40 %, and of a 4096th nearly all is lost."
        " peft's own forward, which adds them to logits of 16 bits, is further off: 4 %, 59 %, and 7 times the update"
        " (random weights, `tests/hf/test_wrappers.py`). Gradients reach the adapters in float32, so they grow past it;"
        " where small updates count, keep the head in float32, or adapters away from it.",
        "",
        "| family | result | scale | soft cap | bias | error | message |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        read = [f"{outcome.scale:.3g}", f"{outcome.softcap or ''}", "yes" if outcome.bias else ""]
        cells = [outcome.family, outcome.result, *(read if outcome.result in ("equal", "WRONG") else [""] * 3)]
        cells += [f"{outcome.error:.0e}" if outcome.result in ("equal", "WRONG") else ""]
        lines.append(f"| {' | '.join([*cells, outcome.message.replace('|', chr(92) + '|')])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    # Families that are named on the command line are examined anew, and the others kept.
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if sys.argv[1:] else {}
    for family in sys.argv[1:] or sorted({*FAMILIES, *BESIDES}):
        outcome = examine(family)
        print(*outcome, flush=True)
        found[family] = outcome._asdict()
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    outcomes = [Outcome(**found[family]) for family in sorted(found)]
    PAGE.write_text(render(outcomes), encoding="utf-8")
    sys.exit(any(outcome.result == "WRONG" for outcome in outcomes))
