"""Turn the bytes a call may use into rows a chunk, by the formula for peak memory that the tests hold.

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
from types import ModuleType

from disc_kernels.linear_kl.inputs import Problem, Projection
from disc_kernels.linear_kl.products import needs_tiles
from disc_kernels.linear_kl.ranks.group import VocabGroup

# On CUDA about 2048 rows at V = 128k, so that the weight-gradient product stays compute-bound. Neither was tuned: see
# docs/performance.md, "Not measured".
DEFAULT_BYTES = {"cpu": 2**28, "cuda": 2**31}

# Logit rows start on multiples of this many entries, so that the 16-bit gradient that overwrites them is aligned for
# the tensor cores whatever the vocabulary's size.
ROW_ALIGNMENT = 8

# Whole-call vectors, each M accumulate-dtype numbers: divergence, 2 entropies, agreement, row scale, and 3 for indices
# and intermediates of the reduction (int64 counts as two float32). Where rows are sorted: order, inverse index, three
# sorted vectors, and the statistics once more.
_ROW_VECTORS = 10
_SHARED_ROW_VECTORS = 15

# What a rank with a shard sends and receives of a row: both models' maximum and sum.
_SHARD_NUMBERS = 4
_SHARED_STATISTICS = 3  # that ranks add up after the last chunk


@dataclass(frozen=True)
class Plan:
    """Say how a call is computed: in pieces of which size, by which row functions, with which ranks."""

    chunk_rows: int  # rows whose logits exist at once
    tile_rows: int  # vocabulary rows of a weight copied at once
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
        fixed_bytes += size * _SHARED_STATISTICS * rows
    gathered = shared.inverse_index is not None  # a block's rows of the teacher
    return divide_workspace(max_bytes, rows, (student, teacher), fixed_bytes, row_bytes, backend, group, gathered)


def _teacher_row_bytes(problem: Problem) -> int:
    """Return the bytes of a projected teacher row: its logits, and its hidden state gathered, rounded, widened."""
    return problem.accumulate_dtype.itemsize * (row_stride(problem.vocab_size) + 3 * problem.teacher.hidden_size)


def _default_bytes(device_type: str) -> int:
    return DEFAULT_BYTES.get(device_type, DEFAULT_BYTES["cpu"])


def divide_workspace(
    max_bytes: int | None,
    rows: int,  # M
    models: tuple[Projection, ...],
    fixed_bytes: int,  # whatever the chunk's size
    row_bytes: int,  # a row of a chunk
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
    tile_row_bytes = 2 * size * max((model.hidden_size for model in models if needs_tiles(model)), default=0)
    temporaries = backend.BLOCK_TEMPORARIES and backend.BLOCK_TEMPORARIES + gathered
    block_row_bytes = size * models[0].vocab_size * temporaries
    needed = fixed_bytes + row_bytes + tile_row_bytes + block_row_bytes
    if max_bytes is None:
        max_bytes = max(_default_bytes(device_type), needed)
    if max_bytes < needed:
        raise ValueError(
            f"max_workspace_bytes: expected at least {needed} bytes, what one row needs at {rows} rows and "
            f"vocabulary {vocab_size}, got {max_bytes}"
        )
    spare = max_bytes - needed
    # An eighth each for tiles and blocks is plenty: both only have to be large enough to amortise a call.
    tile_rows = vocab_size
    if tile_row_bytes:
        tile_rows = 1 + min(spare // 8 // tile_row_bytes, vocab_size - 1)
        spare -= (tile_rows - 1) * tile_row_bytes
    block_rows = 1
    if block_row_bytes:
        wanted = max(backend.BLOCK_ENTRIES.get(device_type, backend.BLOCK_ENTRIES["cpu"]) // vocab_size, 1)
        block_rows = min(1 + (max_bytes - needed) // 8 // block_row_bytes, wanted, max(rows, 1))
        spare -= (block_rows - 1) * block_row_bytes
    # Half the rows at most: however few there are and however large the workspace, no tensor is ever [M, V].
    chunk_rows = min(1 + spare // row_bytes, -(-max(rows, 1) // 2))
    return Plan(chunk_rows, tile_rows, block_rows, row_stride(vocab_size), backend, group)
