"""Describe what every method trains on: targets, each after a context for the teacher and another for the student."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]  # token ids, [n]
NO_IDS: Ids = np.zeros(0, dtype=np.int32)


class Context(NamedTuple):
    """Say what one model reads before a target: the first `attach` tokens of its trunk, then `lead`."""

    attach: int
    lead: Ids = NO_IDS


class Branch(NamedTuple):
    """Hold a target, and what stands before it for either model."""

    target: Ids
    teacher: Context
    student: Context

    @property
    def first(self) -> int:
        """Return the first token of the target that is predicted: 1 where a model has nothing before token 0."""
        return 0 if all(context.attach or len(context.lead) for context in (self.teacher, self.student)) else 1

    @property
    def rows(self) -> int:
        """Count the tokens of the target that are predicted."""
        return len(self.target) - self.first


@dataclass(frozen=True, eq=False)
class Example:
    """Hold what a batch is counted in: a document with its suffixes, or a record with its target.

    Args:
        name: for messages.
        teacher_trunk: what the branches have in common before their targets for the teacher, read once for all.
        student_trunk: the same for the student.
        branches: at least one; all weigh the same.
        replayed: not taught by the method: the student is held to what the teacher says of it.
        counted: False where it stands in for an example that a process lacks: it is no part of the loss.

    Raises:
        ValueError: naming the example: no branch, a target without a token that can be predicted, or a branch that
            attaches beyond its trunk.
    """

    name: str
    teacher_trunk: Ids
    student_trunk: Ids
    branches: Sequence[Branch]
    replayed: bool = False
    counted: bool = True

    def __post_init__(self) -> None:
        if not self.branches:
            raise ValueError(f"{self.name}: expected at least one target, got none")
        for number, branch in enumerate(self.branches, start=1):
            if branch.rows < 1:
                nothing_before = " after an empty context, where its first token is never predicted"
                raise ValueError(
                    f"{self.name}: target {number}: expected at least {branch.first + 1} tokens"
                    f"{nothing_before if branch.first else ''}, got {len(branch.target)}"
                )
            for role, trunk, context in (
                ("teacher", self.teacher_trunk, branch.teacher),
                ("student", self.student_trunk, branch.student),
            ):
                if not 0 <= context.attach <= len(trunk):
                    raise ValueError(
                        f"{self.name}: target {number}: expected {role}.attach from 0 to {len(trunk)}, the length of"
                        f" its trunk, got {context.attach}"
                    )

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence that a model reads; a target's last token is not read."""
        return max(
            context.attach + len(context.lead) + len(branch.target) - 1
            for branch in self.branches
            for context in (branch.teacher, branch.student)
        )

    def pieces(self) -> list[Ids]:
        """Return all tokens of the example, in the pieces that it holds them in."""
        pieces = [self.teacher_trunk, self.student_trunk]
        for branch in self.branches:
            pieces += [branch.target, branch.teacher.lead, branch.student.lead]
        return pieces
