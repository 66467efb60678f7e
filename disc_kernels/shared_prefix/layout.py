"""Describe a packed sequence of trees: a trunk that is read once, and branches that each continue a part of it."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor


def check_int(name: str, value: object) -> None:
    """Raise TypeError unless a value is an integer, of Python's or of another kind; a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {value!r}")


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedPrefixLayout:
    """Hold where each of L packed tokens belongs: four int64 tensors of shape [L] on one device.

    Query q may see key k iff they are in one tree and either k is on the trunk at an offset below ``attach[q]``, or k
    is on q's own branch (or own trunk) and not after q. A branch therefore sees what it would as a sequence of its own,
    made of the first ``attach`` trunk tokens and itself. L may be 0, and so may a trunk's length.

    Args:
        tree_id: equal on the tokens of one tree, different between trees; a tree's tokens are contiguous.
        branch_id: 0 on the trunk, which comes first, then 1, 2, ... on the tree's branches in order.
        attach: in a branch, how many trunk tokens it sees; on the trunk, the token's own offset.
        position_ids: on the trunk, the token's offset; in a branch, attach + its offset in the branch.

    The values are checked once, here. For tensors on an accelerator that waits for the device, so build a layout on the
    CPU and move it: `to` does not check again.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: naming the argument, the first token that breaks its rule, what was expected and what was given.
    """

    tree_id: Tensor
    branch_id: Tensor
    attach: Tensor
    position_ids: Tensor

    def __post_init__(self) -> None:
        self._check_tensors()
        self._check_values()

    def __len__(self) -> int:
        return self.tree_id.numel()

    @property
    def device(self) -> torch.device:
        return self.tree_id.device

    @classmethod
    def from_trees(cls, trees: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> "SharedPrefixLayout":
        """Lay out trees in order, each given as ``(trunk length, [(attach, length), ...])``, one pair a branch.

        Raises:
            TypeError: a length or an attach that is no integer.
            ValueError: a negative trunk length, a branch of length below 1, or an attach outside its trunk.
        """
        segments: list[tuple[int, int, int, int]] = []  # tree, branch, attach, length
        for tree, (trunk, branches) in enumerate(trees):
            check_int(f"trees[{tree}]: trunk length", trunk)
            if trunk < 0:
                raise ValueError(f"trees[{tree}]: expected a trunk length of at least 0, got {trunk}")
            segments.append((tree, 0, 0, trunk))
            for branch, (attach, length) in enumerate(branches, start=1):
                where = f"trees[{tree}], branch {branch}"
                check_int(f"{where}: attach", attach)
                check_int(f"{where}: length", length)
                if length < 1:
                    raise ValueError(f"{where}: expected a length of at least 1, got {length}")
                if not 0 <= attach <= trunk:
                    raise ValueError(f"{where}: expected attach from 0 to the trunk's length {trunk}, got {attach}")
                segments.append((tree, branch, attach, length))

        table = torch.tensor(segments, dtype=torch.int64).reshape(-1, 4)
        lengths = table[:, 3]
        tokens = table.repeat_interleave(lengths, dim=0)
        # Copies: a view would take the whole table along wherever it is pickled.
        tree_id, branch_id, attached = tokens[:, 0].clone(), tokens[:, 1].clone(), tokens[:, 2]
        offset = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return cls(
            tree_id=tree_id,
            branch_id=branch_id,
            attach=torch.where(branch_id == 0, offset, attached),
            position_ids=attached + offset,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SharedPrefixLayout":
        """Copy to another device, except `segments`; the copy is not checked again."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SharedPrefixLayout":
        """Copy to page-locked memory; torch's DataLoader looks for a method of this name."""
        return self._map(Tensor.pin_memory)

    @cached_property
    def segments(self) -> Tensor:
        """Return the trunks and branches that have tokens, in order: [S, 4] int64, on the CPU wherever the layout is.

        Columns: first token, number of tokens, first token of the tree, attach (0 for a trunk). What needs numbers on
        the host (grid sizes, checks) takes them from here, so that nothing waits for an accelerator: a layout made on
        the CPU takes its segments along to other devices, and into pickles once it has been moved.
        """
        start, length = self.segment_start().unique_consecutive(return_counts=True)
        return torch.stack([start, length, self.tree_start()[start], self.attach[start]], dim=1).cpu()

    def tree_start(self) -> Tensor:
        """Return the index of the first token of each token's tree, [L] int64."""
        return _run_start(_changed(self.tree_id))

    def segment_start(self) -> Tensor:
        """Return the index of the first token of each token's segment (its trunk or its branch), [L] int64."""
        return _run_start(_changed(self.tree_id) | _changed(self.branch_id))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SharedPrefixLayout":
        mapped = copy(self)  # without __init__, so without its checks
        tensors = {field.name: function(getattr(self, field.name)) for field in fields(self)}
        vars(mapped).update(tensors, segments=self.segments)
        return mapped

    def _check_tensors(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{field.name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int64:
                raise ValueError(f"{field.name}: expected dtype torch.int64, got {tensor.dtype}")
            expected = (self.tree_id.numel(),)
            if tensor.shape != expected:
                raise ValueError(f"{field.name}: expected shape {expected}, got {tuple(tensor.shape)}")
            if tensor.device != self.device:
                raise ValueError(f"{field.name}: expected device {self.device} (tree_id's), got {tensor.device}")

    def _check_values(self) -> None:
        if len(self) == 0:
            return
        order = self.tree_id.argsort(stable=True)
        sorted_id = self.tree_id[order]
        returns = torch.zeros_like(order, dtype=torch.bool)
        returns[order[1:]] = (sorted_id[1:] == sorted_id[:-1]) & (order[1:] != order[:-1] + 1)
        _require(~returns, "tree_id", self.tree_id, "a tree's tokens next to each other")

        new_tree = _changed(self.tree_id)
        previous = torch.where(new_tree, 0, self.branch_id.roll(1))
        step = self.branch_id - previous
        _require(
            (step == 0) | (step == 1),
            "branch_id",
            self.branch_id,
            "0 (trunk) or 1 at the start of a tree, then the previous token's number or the next one",
        )

        segment_start = self.segment_start()
        on_trunk = self.branch_id == 0
        offset = torch.arange(len(self), device=self.device) - segment_start
        _require_equal("attach", self.attach, torch.where(on_trunk, offset, self.attach[segment_start]))

        tree = new_tree.cumsum(0) - 1
        trunk_length = torch.zeros_like(tree).scatter_add_(0, tree, on_trunk.long())[tree]
        _require(self.attach >= 0, "attach", self.attach, "at least 0")
        _require(self.attach <= trunk_length, "attach", self.attach, "at most the trunk's length", trunk_length)
        _require_equal("position_ids", self.position_ids, torch.where(on_trunk, 0, self.attach) + offset)


def _changed(ids: Tensor) -> Tensor:
    """Return where a token's id differs from the previous token's, [L] bool; True for the first token."""
    changed = torch.ones_like(ids, dtype=torch.bool)
    changed[1:] = ids[1:] != ids[:-1]
    return changed


def _run_start(starts: Tensor) -> Tensor:
    """Return for each token the index of the last True at or before it, [L] int64; starts[0] is True."""
    index = torch.arange(len(starts), device=starts.device)
    return index.where(starts, 0).cummax(0).values


def _require(holds: Tensor, name: str, got: Tensor, expected: str, value: Tensor | None = None) -> None:
    if holds.all():
        return
    token = int(holds.logical_not().nonzero()[0])
    value_text = "" if value is None else f" {int(value[token])}"
    raise ValueError(f"{name}: token {token}: expected {expected}{value_text}, got {int(got[token])}")


def _require_equal(name: str, got: Tensor, expected: Tensor) -> None:
    _require(got == expected, name, got, "the value", expected)
