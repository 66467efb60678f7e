"""Choose the attention of a run's models: by device, by a model's layers, and by the run's own batches."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from disc_kernels import SharedPrefixLayout
from disc_kernels.shared_prefix import attention_implementation, can_share, choose_attention, flex_saving
from disc_train.data.dataset import ExampleDataset
from disc_train.data.example import Example
from disc_train.models.causal_lm import use_attention
from disc_train.packing.collator import PackedBatch, pack
from disc_train.packing.drawing import sample_batches
from disc_train.packing.rows import ONE_ROW, dense_rows


class Attention(NamedTuple):
    """Name the attention that a model runs with, and why."""

    implementation: str  # transformers' name
    reason: str


def prepare_attention(
    student: PreTrainedModel, teacher: PreTrainedModel | None, attention: str, dataset: ExampleDataset, batch_size: int
) -> dict[str, Attention]:
    """Switch both models to the attention of a run and check them, see `disc_train.models.causal_lm.use_attention`.

    Where "auto" has a choice, on CUDA, batches of the run are laid out both ways and the operations counted.

    Args:
        student, teacher: on the device that they will run on; no teacher: whatever it would read, the student does.
        attention: "auto", "sdpa", "flex" or "varlen".
        dataset, batch_size: what a step reads at once.

    Returns:
        What each of "student" and "teacher", if there is one, got.

    Raises:
        ValueError: as `use_attention`.
    """
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    savings: dict[str, float] = {}
    if (
        attention == "auto"
        and student.device.type == "cuda"
        and all(can_share(model.config) for model in models.values())
    ):
        savings = flex_savings(student, teacher, sample_batches(dataset, batch_size))
    return {role: _prepare(model, attention, savings.get(role)) for role, model in models.items()}


def flex_savings(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Sequence[Example]]
) -> dict[str, float]:
    """Compute `disc_kernels.shared_prefix.flex_saving` of each model on some batches."""
    one_row = [pack(batch, student=ONE_ROW, teacher=ONE_ROW) for batch in batches]
    rule = dense_rows(student)
    in_rows = [pack(batch, student=rule, teacher=rule if teacher is None else dense_rows(teacher)) for batch in batches]

    def read(packed: Sequence[PackedBatch], role: str) -> list[tuple[SharedPrefixLayout, int]]:
        if role == "student":
            return [(batch["layout"], len(batch["input_ids"])) for batch in packed]
        return [(batch["teacher_layout"], len(batch["teacher_input_ids"])) for batch in packed]  # type: ignore[arg-type, misc]

    def saving(model: PreTrainedModel, *roles: str) -> float:
        layouts = [layout for role in roles for layout, _ in read(one_row, role)]
        return flex_saving(model.config, layouts, [rows for role in roles for rows in read(in_rows, role)])

    if teacher is None:
        return {"student": saving(student, "student", "teacher")}
    return {"student": saving(student, "student"), "teacher": saving(teacher, "teacher")}


def _prepare(model: PreTrainedModel, attention: str, saving: float | None) -> Attention:
    picked = use_attention(model, attention, saving)
    if not can_share(model.config):
        return Attention(picked, "its layers do not let branches share a trunk, so every sequence has a padded row")
    if attention != "auto":
        return Attention(picked, "as asked for")
    device_type = model.device.type
    choice = choose_attention(model.config, device_type, saving)
    if picked != attention_implementation(model.config, attention, device_type, saving):
        return Attention(picked, f"{choice.implementation} failed its check")
    return Attention(picked, choice.reason)
