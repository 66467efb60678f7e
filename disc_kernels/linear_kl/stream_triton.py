"""Divergences and statistics without any logits in memory, in Triton; forward only.

One program takes a block of rows and a range of the vocabulary. Tile by tile it multiplies the rows with both heads,
describes the tile while its logits are in registers, and adds it to what it has by the chain rule that
`vocab_parallel.py` states; that file then merges the ranges. No shape is a constant of the kernel: another number of
rows compiles nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disc_kernels.linear_kl.math_triton import tanh
from disc_kernels.linear_kl.problem import Problem, Side, SuffixKLStats
from disc_kernels.linear_kl.vocab_parallel import MERGEABLE, VocabPart, finish, merge


class Blocks(NamedTuple):
    rows: int
    entries: int  # of the vocabulary
    depth: int  # hidden entries multiplied at once
    warps: int
    stages: int  # loads in flight


# Both models' tiles of float32 logits live in registers at once, 32 numbers of each a thread, and as many again while
# the tile is described. These are the largest blocks that compile without a spilled register, with everything asked
# for, for sm_80, sm_90 and sm_100; twice the entries, which a product of 16-bit operands would like better, do so only
# on sm_90 and sm_100 and without statistics. (Hidden sizes or strides that are no multiples of 16 spill a few.)
# By bytes of an operand's entry in memory; speed was not measured.
BLOCKS = {2: Blocks(128, 64, 32, 8, 4), 4: Blocks(64, 64, 32, 8, 2)}

# Ranges that are in work at the same time, at least. The programs that run at once then cover a patch of the logits
# that is about as wide as high, so that each tile of hidden states and weights is read from memory once for many
# programs: with 132 multiprocessors 12 ranges of 11 blocks of rows. Not measured.
MIN_RANGES = 12

# The interpreter has nothing to fill; more than one, so that it merges.
INTERPRETER_RANGES = 3

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Head(NamedTuple):
    """One model's half of the comparison, as the kernel takes it."""

    hidden_ptr: Tensor  # [N, D]
    stride_hn: int
    stride_hd: int
    index_ptr: Tensor | None  # [M] int64, rows of hidden; None: all, in order
    stride_i: int
    weight_ptr: Tensor  # [>= V, D]
    stride_wv: int
    stride_wd: int
    bias_ptr: Tensor | None  # [>= V]
    stride_b: int
    inner: float | None  # logit / T = outer * tanh(inner * z), or outer * z
    outer: float
    D: int


@triton.jit
def _rows(head, row):
    """Rows of the hidden states, [BLOCK_M]."""
    if head.index_ptr is not None:
        return tl.load(head.index_ptr + row * head.stride_i)
    else:
        return row


@triton.jit
def _tile_logits(head, row, column, V, DTYPES: tl.constexpr, BLOCK_D: tl.constexpr):
    """Logits / T, [BLOCK_M, BLOCK_V]; -inf outside the vocabulary."""
    entry = tl.minimum(column, V - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_D)
    hidden_ptrs = head.hidden_ptr + row[:, None] * head.stride_hn + depth.to(tl.int64)[None, :] * head.stride_hd
    weight_ptrs = head.weight_ptr + entry[None, :] * head.stride_wv + depth.to(tl.int64)[:, None] * head.stride_wd
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in range(0, head.D, BLOCK_D):
        inside = depth < head.D - first
        hidden = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0).to(DTYPES[0]).to(DTYPES[1])
        weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0).to(DTYPES[0]).to(DTYPES[1])
        z = tl.dot(hidden, weight, z, input_precision="ieee")
        hidden_ptrs += BLOCK_D * head.stride_hd
        weight_ptrs += BLOCK_D * head.stride_wd
    if head.bias_ptr is not None:
        z += tl.load(head.bias_ptr + entry * head.stride_b).to(tl.float32)[None, :]
    if head.inner is not None:
        z = tanh(z * head.inner)
    return tl.where((column < V)[None, :], z * head.outer, float("-inf"))


@triton.jit
def _base(maximum):
    """What to subtract before exp: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _describe(u, column, STATISTICS: tl.constexpr):
    """(maximum, sum above it, entry of the maximum) of each row of a tile, and its log-probabilities."""
    maximum = tl.max(u, axis=1)
    best = maximum
    if STATISTICS:
        best = tl.min(tl.where(u == maximum[:, None], column[None, :], 2147483647), axis=1)
    base = _base(maximum)
    total = tl.sum(tl.exp(u - base[:, None]), axis=1)
    # Where no entry is possible the log-probabilities are -inf, not NaN.
    return maximum, total, best, u - base[:, None] - tl.log(tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def _divergence_terms(la, lb):
    """a (la - lb) + (b - a) = a (exp(g) - 1 - g), g = lb - la: never negative, and near g = 0 nothing cancels."""
    a = tl.exp(la)
    b = tl.exp(lb)
    g = lb - la
    series = 1 / 2 + g * (1 / 6 + g * (1 / 24 + g * (1 / 120 + g * (1 / 720 + g * (1 / 5040 + g / 40320)))))
    # 0 log 0 = 0
    return tl.where(a == 0, b, tl.where(tl.abs(g) < 0.5, a * g * g * series, b - a - a * g))


@triton.jit
def _weighted(log_share, x):
    share = tl.exp(log_share)
    return tl.where(share == 0, 0.0, share * x)


@triton.jit
def _tile_entropy(lp):
    return -tl.sum(_weighted(lp, lp), axis=1)


@triton.jit
def _join(maximum, total, tile_maximum, tile_total):
    """(maximum, sum above it, log of the share of what came before, log of the tile's share)"""
    top = tl.maximum(maximum, tile_maximum)
    base = _base(top)
    before = maximum - base
    tile = tile_maximum - base
    whole = total * tl.exp(before) + tile_total * tl.exp(tile)
    # The logarithm of a ratio, not a difference of logarithms: exact near 0, where one part is nearly everything.
    before = tl.where(total == 0, float("-inf"), before + tl.log(total / whole))
    tile = tl.where(tile_total == 0, float("-inf"), tile + tl.log(tile_total / whole))
    return top, whole, before, tile


@triton.jit
def _chain(divergence, tile_divergence, a, tile_a, b, tile_b):
    """KL(a || b) over two parts, from theirs and the logarithms of their shares in both distributions."""
    mixing = _divergence_terms(a, b) + _divergence_terms(tile_a, tile_b)
    return _weighted(a, divergence) + _weighted(tile_a, tile_divergence) + mixing


@triton.jit
def _chain_entropy(entropy, tile_entropy, a, tile_a):
    return _weighted(a, entropy - a) + _weighted(tile_a, tile_entropy - tile_a)


@triton.jit(do_not_specialize=("M", "V", "ranges"))  # or 1 and multiples of 16 would compile anew
def _stream_kernel(
    student,  # Head
    teacher,  # Head
    out,  # VocabPart of [ranges, M]; its last three None unless STATISTICS
    M,
    V,
    ranges,
    STUDENT_DTYPES: tl.constexpr,  # what operands are rounded to, and what they are multiplied in
    TEACHER_DTYPES: tl.constexpr,
    FORWARD: tl.constexpr,  # KL(teacher || student), else the reverse
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs with neighbouring numbers share rows, and run at the same time.
    part = tl.program_id(0) % ranges
    row = (tl.program_id(0) // ranges).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # What lies outside repeats the last row, or entry: no registers for masks, and nothing foreign is ever read.
    student_row = _rows(student, tl.minimum(row, M - 1))
    teacher_row = _rows(teacher, tl.minimum(row, M - 1))

    max_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    max_t = max_s
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = sum_s
    divergence = sum_s
    entropy_s = sum_s
    entropy_t = sum_s
    agreement = sum_s
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(part * tiles // ranges, (part + 1) * tiles // ranges):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        u_s = _tile_logits(student, student_row, column, V, STUDENT_DTYPES, BLOCK_D)
        tile_max_s, tile_sum_s, best_s, lq = _describe(u_s, column, STATISTICS)
        u_t = _tile_logits(teacher, teacher_row, column, V, TEACHER_DTYPES, BLOCK_D)
        tile_max_t, tile_sum_t, best_t, lp = _describe(u_t, column, STATISTICS)
        if STATISTICS:
            # The maxima are one entry if they were and neither moved, or if both moved to the same.
            moved_s = tile_max_s > max_s
            moved_t = tile_max_t > max_t
            agreement = tl.where(moved_s | moved_t, 0.0, agreement)
            agreement = tl.where(moved_s & moved_t & (best_s == best_t), 1.0, agreement)
        max_s, sum_s, q, tile_q = _join(max_s, sum_s, tile_max_s, tile_sum_s)
        max_t, sum_t, p, tile_p = _join(max_t, sum_t, tile_max_t, tile_sum_t)
        if STATISTICS:
            entropy_s = _chain_entropy(entropy_s, _tile_entropy(lq), q, tile_q)
            entropy_t = _chain_entropy(entropy_t, _tile_entropy(lp), p, tile_p)
        if FORWARD:
            tile_divergence = tl.sum(_divergence_terms(lp, lq), axis=1)
            divergence = _chain(divergence, tile_divergence, p, tile_p, q, tile_q)
        else:
            tile_divergence = tl.sum(_divergence_terms(lq, lp), axis=1)
            divergence = _chain(divergence, tile_divergence, q, tile_q, p, tile_p)

    mask = row < M
    place = part.to(tl.int64) * M + row
    tl.store(out.student_maximum + place, max_s, mask=mask)
    tl.store(out.student_sum + place, sum_s, mask=mask)
    tl.store(out.teacher_maximum + place, max_t, mask=mask)
    tl.store(out.teacher_sum + place, sum_t, mask=mask)
    tl.store(out.divergence + place, divergence, mask=mask)
    if STATISTICS:
        tl.store(out.student_entropy + place, entropy_s, mask=mask)
        tl.store(out.teacher_entropy + place, entropy_t, mask=mask)
        tl.store(out.agreement + place, agreement, mask=mask)


def refusal(problem: Problem) -> str | None:
    """Why `stream_rows` cannot compute this problem; None: it can."""
    if problem.divergence not in MERGEABLE:
        return f"{problem.divergence} needs both normalisers over the whole vocabulary before its first term"
    if problem.accumulate_dtype != torch.float32:
        return f"it accumulates in float32, not in {problem.accumulate_dtype}"
    for name, side in (("student", problem.student), ("teacher", problem.teacher)):
        if _flat(side.hidden) is None:
            return f"no view makes one matrix of {name}_hidden with strides {side.hidden.stride()}"
    return None


def peak_bytes(problem: Problem, statistics: bool) -> int:
    """The most memory that `stream_rows` takes at once, what it returns included.

    For each row and range: a `VocabPart` of 4-byte numbers, and up to 8 float64 temporaries while they are merged.
    """
    ranges = _ranges(problem.rows, problem.vocab_size, _blocks(problem), problem.device)
    return problem.rows * ranges * (4 * _numbers(statistics) + 8 * 8)


def stream_rows(problem: Problem, statistics: bool) -> SuffixKLStats:
    """Divergences and statistics `[M]`, float32; the statistics are NaN unless asked for.

    No host synchronisation. Takes `peak_bytes`: 84 bytes a row and range of the vocabulary, 96 with statistics. Where
    rows alone fill the device there are `MIN_RANGES` or a few more, so that 8192 rows take some 10 MB.

    Raises:
        ValueError: `refusal(problem)` says why.
    """
    if (reason := refusal(problem)) is not None:
        raise ValueError(f"streaming: {reason}; compute it in chunks")
    rows, vocab_size, device = problem.rows, problem.vocab_size, problem.device
    blocks = _blocks(problem)
    ranges = _ranges(rows, vocab_size, blocks, device)
    count = _numbers(statistics)
    numbers = [torch.empty(ranges, rows, dtype=torch.float32, device=device) for _ in range(count)]
    parts = VocabPart(*numbers)
    if rows > 0:
        _stream_kernel[(triton.cdiv(rows, blocks.rows) * ranges,)](
            _head(problem.student, problem.temperature),
            _head(problem.teacher, problem.temperature),
            parts,
            rows,
            vocab_size,
            ranges,
            STUDENT_DTYPES=_dtypes(problem.student),
            TEACHER_DTYPES=_dtypes(problem.teacher),
            FORWARD=problem.divergence == "forward_kl",
            STATISTICS=statistics,
            BLOCK_M=blocks.rows,
            BLOCK_V=blocks.entries,
            BLOCK_D=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return finish(merge(parts, problem.divergence))


def _numbers(statistics: bool) -> int:
    """How many numbers of a `VocabPart` are asked for."""
    return len(VocabPart._fields) - (0 if statistics else len(VocabPart._field_defaults))


def _blocks(problem: Problem) -> Blocks:
    sides = (problem.student, problem.teacher)
    return BLOCKS[max(x.element_size() for side in sides for x in (side.hidden, side.weight))]


def _ranges(rows: int, vocab_size: int, blocks: Blocks, device: torch.device) -> int:
    """How many ranges the vocabulary is divided into: the least, but `MIN_RANGES`, that fill the device evenly."""
    if device.type != "cuda":
        return INTERPRETER_RANGES
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    row_blocks = max(triton.cdiv(rows, blocks.rows), 1)
    # A multiprocessor takes one program at a time, which needs most of its registers.
    waves = triton.cdiv(row_blocks * MIN_RANGES, multiprocessors)
    return min(waves * multiprocessors // row_blocks, triton.cdiv(vocab_size, blocks.entries))


def _head(side: Side, temperature: float) -> Head:
    hidden = _flat(side.hidden)
    assert hidden is not None
    scale, softcap = side.transform.scale, side.transform.softcap
    return Head(
        hidden_ptr=hidden,
        stride_hn=hidden.stride(0),
        stride_hd=hidden.stride(1),
        index_ptr=side.index,
        stride_i=0 if side.index is None else side.index.stride(0),
        weight_ptr=side.weight,
        stride_wv=side.weight.stride(0),
        stride_wd=side.weight.stride(1),
        bias_ptr=side.bias,
        stride_b=0 if side.bias is None else side.bias.stride(0),
        inner=None if softcap is None else scale / softcap,
        outer=(scale if softcap is None else softcap) / temperature,
        D=side.hidden_size,
    )


def _dtypes(side: Side) -> tuple[tl.dtype, tl.dtype]:
    return _TRITON_DTYPES[side.operand_dtype], _TRITON_DTYPES[side.product_dtype]


def _flat(hidden: Tensor) -> Tensor | None:
    """[N, D] without a copy, or None."""
    try:
        return hidden.view(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    except RuntimeError:  # strides that no view can flatten, such as hidden[:, :-1]
        return None
