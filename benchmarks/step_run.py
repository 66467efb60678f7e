"""Let a system take training steps on a student of its own, and check what its first step gives."""

from __future__ import annotations

from functools import cached_property
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import step_peers
from benchmarks.accuracy import Wrong
from benchmarks.step_cases import LOOP, StepCase

# Relative. On the CPU, with 4 to 32 layers, the same sums in another order gave at most 2e-6 in float32 and 0.05 in
# bfloat16, most of it where the loop adds up 40 gradients; a prefix of one token too few, 0.23.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.15}


class Outcome(NamedTuple):
    loss: Tensor  # []
    head: Tensor  # [V, D], gradient of the output head
    first: Tensor  # [H * D_h, D], of the first layer's query projection, behind all other layers


class Problem:
    """Hold a case's teacher and documents, and what the loop gives in the first step."""

    def __init__(self, case: StepCase, teacher: PreTrainedModel) -> None:
        self.case, self.teacher, self.dataset = case, teacher, case.dataset()

    @cached_property
    def expected(self) -> Outcome:
        return Run(self, LOOP).forward_backward()

    def errors(self, got: Outcome) -> dict[str, float]:
        """Return the relative error of each part: the norm of its difference from the loop's over the norm.

        Raises:
            Wrong: one of them is beyond its bound.
        """
        errors = {}
        for part, value, expected in zip(Outcome._fields, got, self.expected, strict=True):
            errors[part] = ((value - expected).float().norm() / expected.float().norm()).item()
            if not errors[part] <= BOUNDS[self.case.shape.teacher_dtype]:
                raise Wrong(f"relative {'' if part == 'loss' else 'gradient '}error of {part} {errors[part]:.1e}")
        return errors


class Run:
    """Take one step after the other with a system; each step reads the next documents."""

    def __init__(self, problem: Problem, system: str) -> None:
        case, self.teacher = problem.case, problem.teacher
        self.student = case.shape.student(self.teacher)
        self.backward: step_peers.Backward = getattr(step_peers, system)(
            case, problem.dataset, self.student, self.teacher
        )
        # The Trainer's default optimizer, with the authors' settings.
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-6, weight_decay=0.01, fused=True)
        self.documents = case.documents
        self._examples = (problem.dataset[i] for i in cycle(range(len(problem.dataset))))

    def forward_backward(self, documents: int | None = None) -> Outcome:
        """Compute loss and gradients of the next documents, by default as many as a step has."""
        loss = self.backward(list(islice(self._examples, documents or self.documents)))
        head = self.student.get_output_embeddings().weight
        first = self.student.get_decoder().layers[0].self_attn.q_proj.weight
        return Outcome(loss, head.grad, first.grad)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, documents: int | None = None) -> None:
        """Take a whole step, and wait for its end on the device."""
        self.forward_backward(documents)
        self.update()
        if self.student.device.type == "cuda":
            torch.cuda.synchronize()

    def held_bytes(self) -> int:
        """Count the bytes of both models' weights and the optimizer's states, after a step."""
        states = [state for of_parameter in self.optimizer.state.values() for state in of_parameter.values()]
        return sum(tensor.nbytes for tensor in [*self.student.parameters(), *self.teacher.parameters(), *states])
