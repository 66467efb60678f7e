"""Turn the bytes that a call may use into rows per chunk, by the formula for peak memory that the tests hold.

Peak above the inputs <= outputs + gradients (+ the weight's and bias's once at 4 bytes an entry while they accumulate)
+ `max_workspace_bytes`. The workspace holds, at once:
    - the logits of both models for one chunk of rows; fewer of the teacher's where student rows share them;
    - the gradient of the student's logits, ready to be multiplied: in their place, or, where products take 16-bit
      operands, in a buffer of its own for a group of several chunks (see `Plan.group_rows`);
    - gathered and widened hidden rows of the chunk or group, and its hidden gradient;
    - weights that must be copied before they can be multiplied (see `products.py`): whole where that takes at most
      half of the workspace, else a tile of one at a time;
    - temporaries of the torch row functions for one block of rows;
    - a few numbers a row of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from disc_kernels.linear_kl.inputs import Problem, Projection
from disc_kernels.linear_kl.products import copy_bytes, needs_copy
from disc_kernels.linear_kl.ranks.group import VocabGroup

# On CUDA a group of about 4096 rows at V = 152k: the weight's gradient of 4096 rows took 6.8 ms in one product on an
# H200, 7.2 ms in two, 8.7 ms in three (docs/performance.md).
DEFAULT_BYTES = {"cpu": 2**28, "cuda": 2**31}

# A group has at most so many chunks. The logits of 4096 rows took 6.7 to 7.0 ms on an H200 in chunks of 256 to 2048.
MAX_CHUNKS = 8

# Logit rows start on multiples of this many entries, so that 16-bit gradients, which may overwrite them, are aligned
# for the tensor cores whatever the vocabulary's size.
ROW_ALIGNMENT = 8

# Whole-call vectors, each M accumulate-dtype numbers: divergence, 2 entropies, agreement, row scale, and 3 for indices
# and intermediates of the reduction (int64 counts as two float32). Where rows are sorted: order, inverse index, three
# sorted vectors, and the statistics once more.
_ROW_VECTORS = 10
_SHARED_ROW_VECTORS = 15

# Numbers of 8 bytes for each of a row's K + 1 outcomes: log-probabilities, ids, and intermediates of `rows/topk.py`.
_TOPK_NUMBERS = 16

# What a rank with a shard sends and receives of a row: both models' maximum and sum.
_SHARD_NUMBERS = 4
_SHARED_STATISTICS = 3  # that ranks add up after the last chunk


@dataclass(frozen=True)
class Plan:
    """Say how a call is computed: in pieces of which size, by which row functions, with which ranks."""

    chunk_rows: int  # rows whose logits exist at once
    group_rows: int  # rows whose logits' gradient exists at once, before one product each gives the two gradients
    copy_weights: bool  # whether weights that must be copied are copied once, whole
    tile_rows: int  # vocabulary rows of a weight copied at once, else, in every chunk
    block_rows: int  # rows the torch row functions treat at once
    row_stride: int  # entries from one row of logits to the next
    backend: ModuleType  # rows.torch_backend or rows.triton_backend
    group: VocabGroup | None  # the ranks that share the vocabulary


def row_stride(vocab_size: int) -> int:
    """Return the entries from one row of logits to the next."""
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def max_cached_rows(problem: Problem, max_bytes: int | None) -> int:
    """Return how many projected teacher rows may be cached through the call: half of the workspace."""
    return (max_bytes or _default_bytes(problem.device.type)) // 2 // _teacher_row_bytes(problem)


def plan_problem(problem: Problem, max_bytes: int | None, backend: ModuleType, group: VocabGroup | None) -> Plan:
    """Plan a `fused_suffix_kl` call within `max_bytes`, as `divide_workspace` does."""
    size, rows, student, teacher = problem.accumulate_dtype.itemsize, problem.rows, problem.student, problem.teacher
    # Logits; hidden rows gathered, rounded, widened, less the teacher's; the hidden gradient and its cast.
    row_bytes = size * (row_stride(problem.vocab_size) + 6 * student.hidden_size)
    group_row_bytes = 0
    if student.product_dtype.itemsize < size:
        # The gradient; hidden rows gathered and rounded; the hidden gradient and its cast.
        narrow = student.product_dtype.itemsize * row_stride(problem.vocab_size)
        group_row_bytes = narrow + 4 * size * student.hidden_size
    shared, teacher_row_bytes = problem.teacher_rows, _teacher_row_bytes(problem)
    if shared.inverse_index is None:
        fixed_bytes = size * _ROW_VECTORS * rows
        row_bytes += teacher_row_bytes
    else:
        fixed_bytes = size * _SHARED_ROW_VECTORS * rows
        if problem.one_head:
            row_bytes += 3 * size * teacher.hidden_size  # a row of the teacher's for each of the student's, to subtract
        if shared.cached:
            fixed_bytes += shared.count * teacher_row_bytes
        else:
            fixed_bytes += teacher_row_bytes  # one more: a chunk's share is rounded up
            row_bytes += -(-teacher_row_bytes * shared.count // rows)
    if group is not None:
        # Gathered, and what merges them; rows of the hidden gradient that are still being added up.
        row_bytes += size * (_SHARD_NUMBERS * (3 * group.ranks + 4) + student.hidden_size)
        group_row_bytes += group_row_bytes and size * student.hidden_size
        fixed_bytes += size * _SHARED_STATISTICS * rows
    gathered = shared.inverse_index is not None  # a block's rows of the teacher
    row = (row_bytes, group_row_bytes)
    return divide_workspace(max_bytes, rows, (student, teacher), fixed_bytes, row, backend, group, gathered)


def _teacher_row_bytes(problem: Problem) -> int:
    """Return the bytes of a projected teacher row: its logits, and what they come from.

    That is a hidden state gathered, rounded and widened, or a row of given logits gathered. Of a top k it is what its
    outcomes take; a softcap's gradient beside it.
    """
    teacher, size = problem.teacher, problem.accumulate_dtype.itemsize
    if teacher.ids is not None:
        softcapped = problem.student.transform.softcap is not None
        return 8 * _TOPK_NUMBERS * (teacher.vocab_size + 1) + softcapped * size * row_stride(problem.vocab_size)
    gathered = teacher.hidden.itemsize * problem.vocab_size if teacher.is_given else 3 * size * teacher.hidden_size
    return size * row_stride(problem.vocab_size) + gathered


def _default_bytes(device_type: str) -> int:
    return DEFAULT_BYTES.get(device_type, DEFAULT_BYTES["cpu"])


def divide_workspace(
    max_bytes: int | None,
    rows: int,  # M
    models: tuple[Projection, ...],
    fixed_bytes: int,  # whatever the chunk's size
    row_bytes: tuple[int, int],  # a row of a chunk; a row of a group, or 0: each chunk is one, and has the memory
    backend: ModuleType,
    group: VocabGroup | None,
    gathered: bool = False,  # whether the row functions gather rows of logits, a block at a time
) -> Plan:
    """Divide `max_bytes` (None: the device's default, raised to fit one row where it must) among what is needed.

    Raises:
        ValueError: not even one row fits; says how many bytes one row needs.
    """
    size, device_type = models[0].accumulate_dtype.itemsize, models[0].hidden.device.type
    vocab_size = max(models[0].vocab_size, 1)  # a rank's shard may be empty
    # A tile exists as rounded copy and as widened copy.
    tile_row_bytes = 2 * size * max((model.hidden_size for model in models if needs_copy(model)), default=0)
    temporaries = backend.BLOCK_TEMPORARIES and backend.BLOCK_TEMPORARIES + gathered
    block_row_bytes = size * models[0].vocab_size * temporaries
    needed = fixed_bytes + sum(row_bytes) + tile_row_bytes + block_row_bytes
    if max_bytes is None:
        max_bytes = max(_default_bytes(device_type), needed)
    if max_bytes < needed:
        raise ValueError(
            f"max_workspace_bytes: expected at least {needed} bytes, what one row needs at {rows} rows and "
            f"vocabulary {vocab_size}, got {max_bytes}"
        )
    spare = max_bytes - needed
    copies = sum(copy_bytes(model) for model in models)
    copy_weights = 0 < copies <= spare // 2
    # An eighth each for tiles and blocks is plenty: both only have to be large enough to amortise a call.
    tile_rows = vocab_size
    if copy_weights:
        spare -= copies
    elif tile_row_bytes:
        tile_rows = 1 + min(spare // 8 // tile_row_bytes, vocab_size - 1)
        spare -= (tile_rows - 1) * tile_row_bytes
    block_rows = 1
    if block_row_bytes:
        wanted = max(backend.BLOCK_ENTRIES.get(device_type, backend.BLOCK_ENTRIES["cpu"]) // vocab_size, 1)
        block_rows = min(1 + (max_bytes - needed) // 8 // block_row_bytes, wanted, max(rows, 1))
        spare -= (block_rows - 1) * block_row_bytes
    chunk_rows, group_rows = _chunk_and_group_rows(rows, spare, *row_bytes)
    return Plan(chunk_rows, group_rows, copy_weights, tile_rows, block_rows, row_stride(vocab_size), backend, group)


def _chunk_and_group_rows(rows: int, spare: int, chunk_row_bytes: int, group_row_bytes: int) -> tuple[int, int]:
    """Return how many rows a chunk and a group have, `spare` bytes beyond one row of each.

    The weight's gradient is summed in float32, so that every group reads and writes all of it: few groups are better
    than few chunks. Groups are of equal size, and so are a group's chunks.
    """
    # Half the rows at most: however few there are and however large the workspace, no tensor is ever [M, V].
    most = -(-max(rows, 1) // 2)
    if not group_row_bytes:
        chunk_rows = _equal_parts(rows, min(1 + spare // chunk_row_bytes, most))
        return chunk_rows, chunk_rows
    group_rows = min(1 + spare // (group_row_bytes + -(-chunk_row_bytes // MAX_CHUNKS)), most)
    group_rows = _equal_parts(rows, group_rows)
    chunk_rows = min(1 + (spare - (group_rows - 1) * group_row_bytes) // chunk_row_bytes, group_rows)
    return _equal_parts(group_rows, chunk_rows), group_rows


def _equal_parts(rows: int, most: int) -> int:
    """Divide rows into the fewest equal parts of at most `most` rows; return the rows of a part."""
    parts = max(-(-rows // most), 1)
    return max(-(-rows // parts), 1)
