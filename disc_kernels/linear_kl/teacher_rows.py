"""Choose which teacher rows are projected: each distinct one once, however many student rows are compared with it.

How many distinct rows an index holds is a question to its values. For an index on an accelerator the host would have
to wait for the answer, so only an index on the CPU is asked; otherwise all rows of the teacher's hidden states are
projected once and cached, where they are few enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from disc_kernels.host import to_device


class Chunk(NamedTuple):
    """Name student rows start..stop, compared with projected teacher rows first..last."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class TeacherRows:
    """Hold the U teacher rows that are projected, and which of them each of the M student rows is compared with."""

    count: int  # U
    index: Tensor | None  # [U] int64, rows of the teacher's flattened hidden states; None: all of them, in order
    inverse_index: Tensor | None = None  # [M] int64, in 0..U-1; None: row i is compared with projected row i
    host_inverse_index: Tensor | None = None  # the same on the CPU, ascending; None: not known there
    order: Tensor | None = None  # [M] int64, the caller's row that is row i of the sorted problem; None: as they came

    @property
    def cached(self) -> bool:
        """Return whether all of them are projected in the first chunk and kept to the end."""
        return self.inverse_index is not None and self.host_inverse_index is None

    def chunks(self, rows: int, chunk_rows: int) -> Iterator[Chunk]:
        """Divide the rows into chunks of at most `chunk_rows` student rows, with teacher rows in proportion."""
        if self.host_inverse_index is None:
            for start in range(0, rows, chunk_rows):
                stop = min(start + chunk_rows, rows)
                yield Chunk(start, stop, *((start, stop) if self.inverse_index is None else (0, self.count)))
            return
        teacher_chunk_rows = -(-chunk_rows * self.count // max(rows, 1))
        start = 0
        while start < rows:
            first = int(self.host_inverse_index[start])
            beyond = int(torch.searchsorted(self.host_inverse_index, first + teacher_chunk_rows))
            stop = min(start + chunk_rows, beyond)
            yield Chunk(start, stop, first, int(self.host_inverse_index[stop - 1]) + 1)
            start = stop

    def to_callers_order(self, x: Tensor) -> Tensor:
        """Reorder [M] values of the sorted problem's rows to the caller's."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def to_sorted_order(self, x: Tensor) -> Tensor:
        """Reorder [M] values of the caller's rows to the sorted problem's."""
        return x if self.order is None else x[self.order]


def choose_teacher_rows(
    index: Tensor | None, host_index: Tensor | None, rows: int, hidden_rows: int, max_cached_rows: int
) -> TeacherRows:
    """Choose the teacher rows to project, and the order of the M rows that brings equal ones together.

    Args:
        index: [M] int64, the teacher's index on its device; None: all rows, in order.
        host_index: the same on the CPU; None: its values are not known there.
        rows: M.
        hidden_rows: how many rows the teacher's hidden states have.
        max_cached_rows: how many projected teacher rows there is room for besides a chunk.
    """
    if index is not None and host_index is not None:
        distinct, inverse = torch.unique(host_index, return_inverse=True)
        if len(distinct) < rows:
            order = None
            if bool((inverse[1:] < inverse[:-1]).any()):
                inverse, host_order = inverse.sort(stable=True)
                order = to_device(host_order, index.device)
            inverse_on_device = to_device(inverse, index.device)
            return TeacherRows(len(distinct), to_device(distinct, index.device), inverse_on_device, inverse, order)
    elif index is not None and hidden_rows <= min(max_cached_rows, rows // 2):
        return TeacherRows(hidden_rows, None, inverse_index=index)
    return TeacherRows(rows, index)
