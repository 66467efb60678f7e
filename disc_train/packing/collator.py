"""Pack examples: what the teacher reads, what the student reads, and which rows of the two are compared."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import SharedPrefixLayout
from disc_train.data.example import Branch, Example
from disc_train.packing.branch_inputs import BranchInput, make_branch_inputs
from disc_train.packing.rows import ONE_ROW, RowRule, arrange, row_rule


@dataclass(frozen=True)
class PackingStats:
    """Count how well batches are packed, in tokens of both models together."""

    tokens: int = 0  # read
    padded_tokens: int = 0  # read, with padding
    unshared_tokens: int = 0  # that would be read with one sequence a branch

    def __add__(self, other: "PackingStats") -> "PackingStats":
        return PackingStats(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "PackingStats") -> "PackingStats":
        return PackingStats(*map(operator.sub, astuple(self), astuple(other)))

    @property
    def efficiency(self) -> float:
        """Compute the share of tokens that are not padding."""
        return self.tokens / self.padded_tokens

    @property
    def saving(self) -> float:
        """Compute how many times fewer tokens are read than with one sequence a branch."""
        return self.unshared_tokens / self.tokens


# Reads what a teacher said of branches, once and for all: rows, each once, and which of them each predicted token has.
ReadRows = Callable[[Sequence[tuple[Example, Branch]]], tuple[dict[str, Tensor], np.ndarray]]


class PackedBatch(TypedDict):
    """Hold a batch, as a plain mapping that data loaders and trainers can move; `input_ids` is the student's.

    Row `student_index[m]` of the student's flattened hidden states predicts the token `targets[m]`. Where the teacher
    reads all examples, so does row `teacher_index[m]` of the teacher's; else its rows are those of the last, replayed
    examples. Indices may repeat: branches that attach to one token share the row before them.
    """

    input_ids: Tensor  # [rows_s, L_s] int64
    layout: SharedPrefixLayout  # rows_s * L_s tokens
    teacher_input_ids: Tensor | None  # [rows_t, L_t] int64; None: the teacher has nothing to read, or its rows are here
    teacher_layout: SharedPrefixLayout | None  # rows_t * L_t tokens
    teacher_rows: dict[str, Tensor] | None  # [U, ...] each, what a cache of `disc_train.teacher_cache` holds
    student_index: np.ndarray  # [M] int64; no tensor, so that it stays on the CPU, where the loss can see which repeat
    teacher_index: np.ndarray  # [M] int64, or fewer
    targets: Tensor  # [M] int64
    row_weight: Tensor  # [M] float32: 1 / (rows of the branch * branches of the example), so 1 in all for an example
    lengths: list[int]  # rows of each example
    num_examples: int  # that count: 0, or as many as there are
    replayed: int  # the last so many of the examples
    names: list[str]  # of the examples, for messages
    packing: PackingStats


def pack(
    examples: Sequence[Example],
    *,
    student: RowRule = ONE_ROW,
    teacher: RowRule | ReadRows = ONE_ROW,
    compare_all: bool = True,
) -> PackedBatch:
    """Lay out a batch of examples for a teacher and a student whose rows are made by the rules given.

    Trunks that are equal and contexts that begin alike are read once, whichever examples they belong to, up to the last
    token that a branch needs. Replayed examples come last; with `compare_all=False` the teacher reads those alone. Of
    examples that do not count one is read, without weight, where there are no others.
    """
    counted = sorted((example for example in examples if example.counted), key=lambda example: example.replayed)
    examples = counted or examples[:1]
    pairs = [(example, branch) for example in examples for branch in example.branches]
    compared = [(example, branch) for example, branch in pairs if compare_all or example.replayed]
    student_inputs = make_branch_inputs([(e.student_trunk, b.student, b.target) for e, b in pairs], student.share)
    student_rows = arrange(student_inputs, student)
    teacher_inputs: list[BranchInput] = []
    teacher_rows, cached, teacher_index = None, None, np.zeros(0, dtype=np.int64)
    if not isinstance(teacher, RowRule):
        if compared:
            cached, teacher_index = teacher(compared)
    elif compared:
        of_teacher = [(example.teacher_trunk, branch.teacher, branch.target) for example, branch in compared]
        teacher_inputs = make_branch_inputs(of_teacher, teacher.share)
        teacher_rows = arrange(teacher_inputs, teacher)
        teacher_index = teacher_rows.ends(branch.rows for _, branch in compared)
    weights = [
        np.full(branch.rows, example.counted / (branch.rows * len(example.branches))) for example, branch in pairs
    ]
    packed = [rows for rows in (student_rows, teacher_rows) if rows]
    return PackedBatch(
        input_ids=student_rows.input_ids,
        layout=student_rows.layout,
        teacher_input_ids=teacher_rows.input_ids if teacher_rows else None,
        teacher_layout=teacher_rows.layout if teacher_rows else None,
        teacher_rows=cached,
        student_index=student_rows.ends(branch.rows for _, branch in pairs),
        teacher_index=teacher_index,
        targets=torch.from_numpy(np.concatenate([branch.target[branch.first :] for _, branch in pairs])).long(),
        row_weight=torch.from_numpy(np.concatenate(weights)).float(),
        lengths=[sum(branch.rows for branch in example.branches) for example in examples],
        num_examples=len(counted),
        replayed=sum(example.replayed for example in examples),
        names=[example.name for example in examples],
        packing=PackingStats(
            tokens=sum(rows.tokens for rows in packed),
            padded_tokens=sum(rows.input_ids.numel() for rows in packed),
            unshared_tokens=sum(branch.length for branch in student_inputs + teacher_inputs),
        ),
    )


def collator(
    student: PreTrainedModel, teacher: PreTrainedModel | ReadRows, compare_all: bool = True
) -> Callable[[Sequence[Example]], PackedBatch]:
    """Make a collator for two models that `disc_train.models.causal_lm.use_attention` has prepared; they may be one."""
    rule_or_rows = row_rule(teacher) if isinstance(teacher, PreTrainedModel) else teacher
    return partial(pack, student=row_rule(student), teacher=rule_or_rows, compare_all=compare_all)
