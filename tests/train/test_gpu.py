"""Whole runs of `disc-train` on a GPU, against the same run on the CPU; needs no sentence splitter."""

import json
from pathlib import Path

import pytest
import torch

from disc_train.cli import main
from tests.gpu import DEVICE, needs_cuda

pytestmark = pytest.mark.gpu

TINY = Path(__file__).parents[2] / "examples" / "tiny"


def losses(output_dir: Path, *flags: str) -> list[float]:
    """Return the losses of four steps of two records: the first half of a document, and the other half behind it."""
    texts = [json.loads(line)["text"] for line in (TINY / "documents.jsonl").read_text().splitlines()[:8]]
    records = [{"teacher_context": text[: len(text) // 2], "target": text[len(text) // 2 :]} for text in texts]
    output_dir.mkdir()
    (output_dir / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status = main(
        [
            *("--method", "cd", "--temperature", "1"),
            *("--model_name_or_path", str(TINY / "model")),
            *("--train_file", str(output_dir / "records.jsonl")),
            *("--output_dir", str(output_dir / "run")),
            *("--per_device_train_batch_size", "2"),
            *("--max_steps", "4"),
            *("--logging_steps", "1"),
            *("--learning_rate", "1e-3"),
            *("--report_to", "none"),
            *flags,
        ]
    )
    assert status == 0
    state = json.loads((output_dir / "run" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# A bound of float32 runs allows TF32; the other one is for losses that are themselves a difference of 16-bit models.
@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (("--attention", "sdpa"), 0.01),
        pytest.param(("--attention", "flex"), 0.01, marks=needs_cuda("FlexAttention has no backward on the CPU")),
        (("--bf16",), 0.1),
        pytest.param(("--bf16", "--attention", "varlen"), 0.1, marks=needs_cuda("FlashAttention")),
        (("--bf16", "--gradient_checkpointing", "--lora_rank", "4", "--lora_dropout", "0"), 0.1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(tmp_path, flags, bound):
    same = [flag for flag in flags if flag not in ("--bf16", "--attention", "sdpa", "flex", "varlen")]
    expected = torch.tensor(losses(tmp_path / "cpu", "--use_cpu", "true", *same))
    got = torch.tensor(losses(tmp_path / "gpu", "--use_cpu", str(DEVICE == "cpu"), *flags))
    assert len(expected) == 4
    assert expected.min() > 0.1
    torch.testing.assert_close(got, expected, rtol=bound, atol=0)
