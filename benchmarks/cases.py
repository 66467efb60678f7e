"""List every problem that is measured: what is compared, and by which systems of `peers.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

# "products" is the limit every other system is divided by, so it comes first.
CHUNKED_PEERS = ("liger_fused", "liger_kl_div", "liger_chunked", "trl_chunked", "fla_fused", "orda")
EVERYONE = ("products", "ours", "eager", *CHUNKED_PEERS, "eager_compiled")
UNCOMPILED = ("products", "ours", "eager", "liger_fused", "liger_kl_div", "trl_chunked", "fla_fused", "orda")
FEW = ("products", "ours", "eager")
CROSS_ENTROPIES = (
    "products",
    "ours_cross_entropy",
    "eager_cross_entropy",
    "torch_linear_cross_entropy",
    "liger_cross_entropy",
)


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int  # N
    hidden: int  # D
    vocab: int  # V
    dtype: torch.dtype
    systems: tuple[str, ...] = FEW
    frozen_head: bool = False  # no gradient of the weight
    backward: bool = True
    valid_percent: int = 100  # how much of the tokens is compared
    shared: int = 1  # student rows that are compared with one teacher row
    summarised: bool = False  # the teacher is a summary that was made before
    labelled: bool = False  # cross-entropy: the teacher is certain of one entry a row
    divergence: float | None = None  # nats a row from a teacher with the same head; None: a model of its own
    rank: int = 0  # cases of a lower rank are measured first
    rehearsal: bool = False  # on the CPU, everybody's Triton kernels by its interpreter, one round

    @property
    def rows(self) -> int:
        """Return how many student rows are compared, M."""
        return self.tokens * self.valid_percent // 100

    @property
    def teacher_rows(self) -> int:
        """Count the teacher rows that have to be projected."""
        return 0 if self.summarised or self.labelled else self.rows // self.shared

    @property
    def units(self) -> float:
        """Count matrix products of 2 M V D operations: both logits, and the gradients of hidden states and weight."""
        return 1 + self.teacher_rows / self.rows + self.backward + (self.backward and not self.frozen_head)

    @property
    def gradient_bytes(self) -> int:
        """Count the bytes of the gradients that are asked for."""
        rows = self.backward * self.tokens + (self.backward and not self.frozen_head) * self.vocab
        return rows * self.hidden * self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """Return what a row of results says of the case."""
        fields = asdict(self) | {"case": self.name, "dtype": str(self.dtype).removeprefix("torch.")}
        del fields["name"], fields["systems"], fields["rank"], fields["rehearsal"]
        return fields | {"rows": self.rows, "units": self.units, "gradient_bytes": self.gradient_bytes}

    def rehearsed(self) -> Case:
        """Return the case at a size that Triton's interpreter computes in a second."""
        return replace(self, tokens=32, hidden=32, vocab=500, rehearsal=True)

    def inputs(self, device: str) -> Inputs:
        """Draw random tensors, the same at every call; logits have a standard deviation of about 2."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(self.dtype)

        student_index = teacher_index = None
        if self.valid_percent < 100:
            shuffled = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(0))
            student_index = teacher_index = shuffled[: self.rows].sort().values
        if self.shared > 1:  # one branch after the other, each over all teacher rows
            teacher_index = torch.arange(self.rows) % (self.rows // self.shared)
        scale = 2 / self.hidden**0.5
        student, weight = normal(self.tokens, self.hidden), normal(self.vocab, self.hidden, scale=scale)
        teacher = normal(self.tokens // self.shared, self.hidden)
        if self.divergence is None:
            teacher_weight = normal(self.vocab, self.hidden, scale=scale)
        else:
            teacher, teacher_weight = moved(student, weight, teacher, self.divergence), weight.clone()
        weight.requires_grad_(not self.frozen_head)
        labels = None
        if self.labelled:
            labels = torch.randint(self.vocab, (self.tokens,), generator=generator, device=device)
        indices = student_index, teacher_index
        return Inputs(self, student.requires_grad_(), weight, teacher, teacher_weight, *indices, labels)


def moved(hidden: Tensor, weight: Tensor, direction: Tensor, divergence: float) -> Tensor:
    """Return hidden states `[M, D]` moved along a direction until KL(moved || hidden) is `divergence` in the mean."""
    log_q = (hidden.float() @ weight.float().T).log_softmax(-1)
    step = divergence**0.5
    for _ in range(8):  # the divergence grows with the square of a small step, so this converges at once
        log_p = ((hidden + step * direction).float() @ weight.float().T).log_softmax(-1)
        step *= (divergence / (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()) ** 0.5
    return (hidden + step * direction).to(hidden.dtype)


@dataclass(frozen=True)
class Inputs:
    case: Case
    student: Tensor  # [N, D]
    student_weight: Tensor  # [V, D]
    teacher: Tensor  # [N / shared, D]
    teacher_weight: Tensor  # [V, D]
    student_index: Tensor | None  # [M] int64, on the CPU, where a collator makes it; None: all rows
    teacher_index: Tensor | None  # the same
    labels: Tensor | None  # [N] int64, in place of a teacher

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return student rows [M, D] and weight, teacher rows [M, D] and weight, for systems that take no indices."""
        student = self.student if self.student_index is None else self.student[self.student_index]
        teacher = self.teacher if self.teacher_index is None else self.teacher[self.teacher_index]
        return student, self.student_weight, teacher, self.teacher_weight


Changes = dict[str, dict[str, Any]]  # fields of a case that differ, by the suffix of its name


def variants(case: Case, systems: tuple[str, ...], changes: Changes) -> tuple[Case, ...]:
    return tuple(
        replace(case, name=f"{case.name}-{suffix}", systems=systems, **fields) for suffix, fields in changes.items()
    )


def tokens(*counts: int) -> Changes:
    return {f"n{count}": {"tokens": count} for count in counts}


def divergences(dtype: torch.dtype, systems: tuple[str, ...]) -> tuple[Case, ...]:
    case = Case(f"kl-{str(dtype).removeprefix('torch.')}", 256, 256, 32000, dtype, rank=1)
    return variants(case, systems, {f"{kl:g}": {"divergence": kl} for kl in (1.0, 0.1, 0.01, 0.001)})


FROZEN: Changes = {"frozen": {"frozen_head": True}}
FORWARD: Changes = {"forward": {"backward": False}}
VALID: Changes = {"valid50": {"valid_percent": 50}, "valid10": {"valid_percent": 10}}
SHARED: Changes = {"shared4": {"shared": 4}, "shared16": {"shared": 16}}
EXPECTED: Changes = {"expected": {"frozen_head": True, "summarised": True}}
SUMMARISED = ("products", "ours_expected_embedding")
LABELLED: Changes = {"cross-entropy": {"labelled": True}}

GPT2 = Case("gpt2-fp32", 512, 896, 50257, torch.float32, EVERYONE)
SMALL = Case("small-fp32", 512, 256, 32000, torch.float32)
CPU_CASES = (
    GPT2,
    *variants(GPT2, EVERYONE, FROZEN),
    SMALL,
    *variants(SMALL, FEW, tokens(128, 1024, 2048) | VALID | SHARED | FORWARD),
    *variants(SMALL, SUMMARISED, EXPECTED),
    *variants(SMALL, CROSS_ENTROPIES, LABELLED),
    Case("small-bf16", 256, 256, 32000, torch.bfloat16),
    Case("gemma-vocabulary-fp32", 64, 128, 262144, torch.float32),
)

# Every shape and every compiled peer costs seconds of compilation, and minutes of a GPU are dear: the two large
# vocabularies are measured with everyone first, then what else a user may ask, the most important first.
QWEN_7B = Case("A-bf16", 8192, 3584, 152064, torch.bfloat16, EVERYONE)
LLAMA_8B = Case("B-bf16", 4096, 4096, 128256, torch.bfloat16, EVERYONE)
QWEN_HALF_B = Case("qwen2.5-0.5b-bf16", 8192, 896, 151936, torch.bfloat16, UNCOMPILED, rank=2)
GPU_CASES = (
    QWEN_7B,
    *variants(QWEN_7B, UNCOMPILED, FROZEN),
    *variants(QWEN_7B, SUMMARISED, EXPECTED),
    *variants(QWEN_7B, FEW, SHARED),
    LLAMA_8B,
    *variants(LLAMA_8B, UNCOMPILED, FROZEN),
    *variants(LLAMA_8B, SUMMARISED, EXPECTED),
    *(replace(case, rank=2) for case in variants(QWEN_7B, FEW, VALID | FORWARD)),
    *(replace(case, rank=2) for case in variants(QWEN_7B, CROSS_ENTROPIES, LABELLED)),
    QWEN_HALF_B,
    *variants(QWEN_HALF_B, UNCOMPILED, tokens(512, 2048, 32768, 65536)),
    Case("gemma-bf16", 4096, 2304, 262144, torch.bfloat16, UNCOMPILED, rank=2),
    Case("qwen2.5-0.5b-fp32", 2048, 896, 151936, torch.float32, rank=2),
)

# How accurate everyone is the closer the student comes to its teacher.
PRECISION_SYSTEMS = ("ours", "ours_one_head", "eager", *CHUNKED_PEERS, "eager_compiled")
PRECISION_CASES = tuple(
    case for dtype in (torch.float32, torch.bfloat16) for case in divergences(dtype, PRECISION_SYSTEMS)
)
