"""How many bytes a call may use, turned into rows a chunk: the formula for peak memory that the tests hold.

Peak above the inputs <= outputs + gradients (+ the weight's and bias's once at 4 bytes an entry while they accumulate)
+ `max_workspace_bytes`. The workspace holds, at once:
    - the logits of both models for one chunk of rows (the student's becomes the gradient, in place); fewer of the
      teacher's where student rows share them;
    - gathered and widened hidden rows of the chunk, and the chunk's hidden gradient;
    - a tile of a weight that must be copied before it can be multiplied (see `products.py`);
    - temporaries of the torch row functions for one block of rows;
    - a few numbers a row of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from disc_kernels.linear_kl.inputs import Problem
from disc_kernels.linear_kl.products import needs_tiles
from disc_kernels.linear_kl.teacher_rows import TeacherRows

# On CUDA about 2048 rows at V = 128k, so that the weight-gradient product stays compute-bound. Neither was tuned: see
# docs/performance.md, "Not measured".
DEFAULT_BYTES = {"cpu": 2**28, "cuda": 2**31}

# Logit rows start on multiples of this many entries, so that the 16-bit gradient that overwrites them is aligned for
# the tensor cores whatever the vocabulary's size.
ROW_ALIGNMENT = 8

# Whole-call vectors, each M accumulate-dtype numbers: divergence, 2 entropies, agreement, row scale, and 3 for indices
# and intermediates of the reduction (int64 counts as two float32). Where rows are sorted: order, slots, three sorted
# vectors, and the statistics once more.
_ROW_VECTORS = 10
_SHARED_ROW_VECTORS = 15

# What a rank with a shard sends and receives of a row: both models' maximum and sum.
_SHARD_NUMBERS = 4
_SHARED_STATISTICS = 3  # that ranks add up after the last chunk


@dataclass(frozen=True)
class Plan:
    chunk_rows: int  # rows whose logits exist at once
    tile_rows: int  # vocabulary rows of a weight copied at once
    block_rows: int  # rows the torch row functions treat at once
    row_stride: int  # entries from one row of logits to the next


class Demand(NamedTuple):
    """What a call needs bytes for."""

    rows: int  # M
    vocab_size: int
    device_type: str
    fixed_bytes: int  # whatever the chunk's size
    row_bytes: int  # a row of a chunk
    tile_row_bytes: int  # a vocabulary row of a weight that is copied, tile by tile; 0: none is
    block_row_bytes: int  # temporaries of the row function, a row; 0: it works in registers
    block_entries: int  # logits the row function should treat at once


def row_stride(vocab_size: int) -> int:
    """Entries from one row of logits to the next."""
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def workspace_bytes(max_bytes: int | None, device_type: str) -> int:
    """What was asked for, or the device's default."""
    return max_bytes or DEFAULT_BYTES.get(device_type, DEFAULT_BYTES["cpu"])


def bytes_of_teacher_row(problem: Problem) -> int:
    """A projected row of the teacher's: its logits, and its hidden state gathered, rounded, widened."""
    return problem.accumulate_dtype.itemsize * (row_stride(problem.vocab_size) + 3 * problem.teacher.hidden_size)


def most_kept_rows(problem: Problem, max_bytes: int | None) -> int:
    """How many projected teacher rows may be kept through the call: half of the workspace."""
    return workspace_bytes(max_bytes, problem.device.type) // 2 // bytes_of_teacher_row(problem)


def plan(
    problem: Problem,
    teacher_rows: TeacherRows,
    max_bytes: int | None,
    block_entries: dict[str, int],
    block_temporaries: int,
    ranks: int = 1,
) -> Plan:
    """Rows a chunk for `max_bytes`, as `divide` gives them.

    Args:
        block_entries: logits the backend's row function treats at once, by device type.
        block_temporaries: tensors of that many entries it holds at once; 0 when it works in registers.
        ranks: how many share the vocabulary.

    Raises:
        ValueError: not even one row fits; says how many bytes one row needs.
    """
    size = problem.accumulate_dtype.itemsize
    fixed_bytes, row_bytes = _fixed_and_row_bytes(problem, teacher_rows)
    if problem.sharded:
        # Gathered, and what merges them; rows of the hidden gradient that are still being added up.
        row_bytes += size * (_SHARD_NUMBERS * (3 * ranks + 4) + problem.student.hidden_size)
        fixed_bytes += size * _SHARED_STATISTICS * problem.rows
    sides = (problem.student, problem.teacher)
    # A tile exists as rounded copy and as widened copy.
    tile_row_bytes = 2 * size * max((side.hidden_size for side in sides if needs_tiles(side)), default=0)
    if block_temporaries and teacher_rows.slot is not None:
        block_temporaries += 1  # a block's rows of the teacher, gathered
    device_type = problem.device.type
    demand = Demand(
        rows=problem.rows,
        vocab_size=max(problem.vocab_size, 1),  # a rank's shard may be empty
        device_type=device_type,
        fixed_bytes=fixed_bytes,
        row_bytes=row_bytes,
        tile_row_bytes=tile_row_bytes,
        block_row_bytes=size * problem.vocab_size * block_temporaries,
        block_entries=block_entries.get(device_type, block_entries["cpu"]),
    )
    return divide(demand, max_bytes)


def _fixed_and_row_bytes(problem: Problem, teacher_rows: TeacherRows) -> tuple[int, int]:
    """Bytes whatever the chunk's size, and bytes a student row of a chunk with its share of teacher rows."""
    size, student, teacher = problem.accumulate_dtype.itemsize, problem.student, problem.teacher
    # Logits; hidden rows gathered, rounded, widened, less the teacher's; the hidden gradient and its cast.
    row_bytes = size * (row_stride(problem.vocab_size) + 6 * student.hidden_size)
    teacher_row_bytes = bytes_of_teacher_row(problem)
    if teacher_rows.slot is None:
        return size * _ROW_VECTORS * problem.rows, row_bytes + teacher_row_bytes
    fixed_bytes = size * _SHARED_ROW_VECTORS * problem.rows
    if problem.one_head:
        row_bytes += 3 * size * teacher.hidden_size  # a row of the teacher's for each of the student's, to subtract
    if teacher_rows.kept:
        return fixed_bytes + teacher_rows.count * teacher_row_bytes, row_bytes
    share = -(-teacher_row_bytes * teacher_rows.count // problem.rows)
    return fixed_bytes + teacher_row_bytes, row_bytes + share  # one more: a chunk's share is rounded up


def divide(demand: Demand, max_bytes: int | None) -> Plan:
    """Divide `max_bytes` (None: the device's default, raised to fit one row where it must) among what is needed.

    Raises:
        ValueError: not even one row fits; says how many bytes one row needs.
    """
    needed = demand.fixed_bytes + demand.row_bytes + demand.tile_row_bytes + demand.block_row_bytes
    if max_bytes is None:
        max_bytes = max(workspace_bytes(None, demand.device_type), needed)
    if max_bytes < needed:
        raise ValueError(
            f"max_workspace_bytes: expected at least {needed} bytes, what one row needs at {demand.rows} rows and "
            f"vocabulary {demand.vocab_size}, got {max_bytes}"
        )
    spare = max_bytes - needed
    rows = max(demand.rows, 1)
    # An eighth each for tiles and blocks is plenty: both only have to be large enough to amortise a call.
    tile_rows = demand.vocab_size
    if demand.tile_row_bytes:
        tile_rows = 1 + min(spare // 8 // demand.tile_row_bytes, demand.vocab_size - 1)
        spare -= (tile_rows - 1) * demand.tile_row_bytes
    block_rows = 1
    if demand.block_row_bytes:
        wanted = max(demand.block_entries // demand.vocab_size, 1)
        block_rows = min(1 + (max_bytes - needed) // 8 // demand.block_row_bytes, wanted, rows)
        spare -= (block_rows - 1) * demand.block_row_bytes
    # Half the rows at most: however few there are and however large the workspace, no tensor is ever [M, V].
    chunk_rows = min(1 + spare // demand.row_bytes, -(-rows // 2))
    return Plan(chunk_rows, tile_rows, block_rows, row_stride(demand.vocab_size))
