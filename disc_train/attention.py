"""Which attention the two models of a run get: by device, by what a model's layers are, and by the run's own trees."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from disc_kernels.shared_prefix import attention_implementation, automatic, can_share, flex_saving
from disc_train.causal_lm import use_attention
from disc_train.dataset import ExampleDataset, sample_batches
from disc_train.example import Example
from disc_train.packing import pack
from disc_train.rows import ONE_ROW, dense_rows


class Attention(NamedTuple):
    implementation: str  # transformers' name
    reason: str


def prepare_attention(
    student: PreTrainedModel, teacher: PreTrainedModel, attention: str, dataset: ExampleDataset, batch_size: int
) -> dict[str, Attention]:
    """Switch both models to the attention of a run and check them, see `disc_train.causal_lm.use_attention`.

    Where "auto" has a choice, on CUDA, batches of the run are laid out both ways and the operations counted.

    Args:
        student, teacher: on the device that they will run on.
        attention: "auto", "sdpa", "flex" or "varlen".
        dataset, batch_size: what a step reads at once.

    Returns:
        What each of "student" and "teacher" got.

    Raises:
        ValueError: as `use_attention`.
    """
    savings: dict[str, float] = {}
    if (
        attention == "auto"
        and student.device.type == "cuda"
        and can_share(student.config)
        and can_share(teacher.config)
    ):
        savings = flex_savings(student, teacher, sample_batches(dataset, batch_size))
    models = {"student": student, "teacher": teacher}
    return {role: _prepare(model, attention, savings.get(role)) for role, model in models.items()}


def flex_savings(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Sequence[Example]]
) -> dict[str, float]:
    """`disc_kernels.shared_prefix.flex_saving` of both models on some batches."""
    one_row = [pack(batch, student=ONE_ROW, teacher=ONE_ROW) for batch in batches]
    in_rows = [pack(batch, student=dense_rows(student), teacher=dense_rows(teacher)) for batch in batches]
    return {
        "student": flex_saving(
            student.config,
            [batch["layout"] for batch in one_row],
            [(batch["layout"], len(batch["input_ids"])) for batch in in_rows],
        ),
        "teacher": flex_saving(
            teacher.config,
            [batch["teacher_layout"] for batch in one_row],
            [(batch["teacher_layout"], len(batch["teacher_input_ids"])) for batch in in_rows],
        ),
    }


def _prepare(model: PreTrainedModel, attention: str, saving: float | None) -> Attention:
    picked = use_attention(model, attention, saving)
    if not can_share(model.config):
        return Attention(picked, "its layers do not let branches share a trunk, so every sequence has a padded row")
    if attention != "auto":
        return Attention(picked, "as asked for")
    device_type = model.device.type
    choice = automatic(model.config, device_type, saving)
    if picked != attention_implementation(model.config, attention, device_type, saving):
        return Attention(picked, f"{choice.implementation} failed its check")
    return Attention(picked, choice.reason)
