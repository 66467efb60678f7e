"""How many bytes a call may use, turned into rows a chunk: the formula for peak memory that the tests hold.

Peak above the inputs <= outputs + gradients (+ the weight's and bias's once at 4 bytes an entry while they accumulate)
+ `max_workspace_bytes`. The workspace holds, at once:
    - the logits of both models for one chunk of rows (the student's becomes the gradient, in place);
    - gathered and widened hidden rows of the chunk, and the chunk's hidden gradient;
    - a tile of a weight that must be copied before it can be multiplied (see `products.py`);
    - temporaries of the torch row functions for one block of rows;
    - a few numbers a row of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from disc_kernels.linear_kl.problem import Problem
from disc_kernels.linear_kl.products import needs_tiles

# On CUDA about 2048 rows at V = 128k, so that the weight-gradient product stays compute-bound. Neither was tuned: see
# docs/performance.md, "Not measured".
DEFAULT_BYTES = {"cpu": 2**28, "cuda": 2**31}

# Logit rows start on multiples of this many entries, so that the 16-bit gradient that overwrites them is aligned for
# the tensor cores whatever the vocabulary's size.
ROW_ALIGNMENT = 8

# Whole-call vectors, each M accumulate-dtype numbers: divergence, 2 entropies, agreement, row scale, and 3 for indices
# and intermediates of the reduction (int64 counts as two float32).
_ROW_VECTORS = 10


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


def plan(problem: Problem, max_bytes: int | None, block_entries: dict[str, int], block_temporaries: int) -> Plan:
    """Rows a chunk for `max_bytes`, as `divide` gives them.

    Args:
        block_entries: logits the backend's row function treats at once, by device type.
        block_temporaries: tensors of that many entries it holds at once; 0 when it works in registers.

    Raises:
        ValueError: not even one row fits; says how many bytes one row needs.
    """
    size = problem.accumulate_dtype.itemsize
    student, teacher = problem.student, problem.teacher
    device_type = problem.device.type
    # Per row: logits of both; hidden rows gathered, rounded, widened (both) and the hidden gradient, its cast.
    row_bytes = size * (2 * row_stride(problem.vocab_size) + 5 * student.hidden_size + 3 * teacher.hidden_size)
    # A tile exists as rounded copy and as widened copy.
    tile_row_bytes = 2 * size * max((side.hidden_size for side in (student, teacher) if needs_tiles(side)), default=0)
    demand = Demand(
        rows=problem.rows,
        vocab_size=problem.vocab_size,
        device_type=device_type,
        fixed_bytes=size * _ROW_VECTORS * problem.rows,
        row_bytes=row_bytes,
        tile_row_bytes=tile_row_bytes,
        block_row_bytes=size * problem.vocab_size * block_temporaries,
        block_entries=block_entries.get(device_type, block_entries["cpu"]),
    )
    return divide(demand, max_bytes)


def divide(demand: Demand, max_bytes: int | None) -> Plan:
    """Divide `max_bytes` (None: the device's default, raised to fit one row where it must) among what is needed.

    Raises:
        ValueError: not even one row fits; says how many bytes one row needs.
    """
    needed = demand.fixed_bytes + demand.row_bytes + demand.tile_row_bytes + demand.block_row_bytes
    if max_bytes is None:
        max_bytes = max(DEFAULT_BYTES.get(demand.device_type, DEFAULT_BYTES["cpu"]), needed)
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
