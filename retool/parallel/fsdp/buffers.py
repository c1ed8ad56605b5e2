"""The few buffers that units use in turn, and which unit uses which.

Made once and never freed while the model lives: memory that one stream frees and another takes is
a race that nothing reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from retool.parallel.fsdp.layout import UnitLayout
from retool.parallel.fsdp.overlap import Pending

# Units whose sizes differ by less than this factor share buffers: the smaller one wastes the rest.
MAX_SIZE_RATIO = 2


@dataclass
class Buffer:
    """Memory that units use in turn."""

    data: torch.Tensor
    # Whether more than one unit is ever in it
    shared: bool = False
    # The index of the unit whose weights are in it, or are on their way
    holder: int | None = None
    # The gather that fills it, or the reduction that reads it, until someone waits for it
    pending: Pending | None = None
    # The end of the holder's last use: a gather for another unit starts after it, and no later
    free: torch.cuda.Event | None = None
    # Where the holder is, from its gather until its release
    in_use: Literal["forward", "backward"] | None = None

    def settle(self) -> None:
        """What comes next comes after what is under way here: its gather, or the reduction that
        reads it.
        """
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


@dataclass(frozen=True)
class Turns:
    """Which unit takes which buffer, by the unit's number, and the elements of each buffer.

    A unit that one rank owns alone is in none: the rank computes with its shard itself.
    """

    taken: dict[int, int]
    sizes: list[int]


def take_turns(units: Sequence[UnitLayout], own: Sequence[bool]) -> Turns:
    """A buffer for each unit, given in forward order; `own`, by place: it needs one for itself.

    Divided units take turns among themselves: what is gathered together never shares a buffer.
    """
    turns = Turns({}, [])
    for divided in (False, True):
        gathered = [
            number
            for number, unit in enumerate(units)
            if (unit.parts > 1) == divided and unit.owners > 1
        ]
        if not gathered:
            continue
        sizes = [units[number].part_numel for number in gathered]
        assigned = assign_buffers(sizes, [own[units[number].place] for number in gathered])
        first = len(turns.sizes)
        turns.taken.update(
            (number, first + buffer) for number, buffer in zip(gathered, assigned, strict=True)
        )
        turns.sizes.extend(buffer_sizes(sizes, assigned))
    return turns


@dataclass(frozen=True)
class Buffers:
    """Each buffer, and which one a unit uses, by the unit's number."""

    all: list[Buffer]
    of: dict[int, Buffer]


def make_buffers(
    units: Sequence[UnitLayout], own: Sequence[bool], dtype: torch.dtype, device: torch.device
) -> Buffers:
    """The memory that these units take turns in, see `take_turns`."""
    turns = take_turns(units, own)
    users = Counter(turns.taken.values())
    buffers = [
        Buffer(torch.zeros(numel, dtype=dtype, device=device), shared=users[number] > 1)
        for number, numel in enumerate(turns.sizes)
    ]
    return Buffers(buffers, {unit: buffers[number] for unit, number in turns.taken.items()})


def assign_buffers(sizes: Sequence[int], own: Sequence[bool]) -> list[int]:
    """A buffer number for each unit, given in forward order; neighbours never share one.

    Units of like size alternate between two buffers, or use a single one if no two of them are
    neighbours. A unit with `own` has a buffer for itself. So a decoder keeps two blocks, and the
    embedding or the head.
    """
    assigned = [0] * len(sizes)
    buffers = 0
    for units in _alike(sizes, own):
        have_neighbours = any(second - first == 1 for first, second in pairwise(units))
        # Neighbours are there at once: one is computed with while the other arrives or leaves
        needed = 2 if have_neighbours else 1
        for position, unit in enumerate(units):
            assigned[unit] = buffers + position % needed
        buffers += needed
    return assigned


def _alike(sizes: Sequence[int], own: Sequence[bool]) -> list[list[int]]:
    """The units in groups of about the size of the group's first; one with `own` is alone."""
    groups: list[list[int]] = []
    for unit, size in enumerate(sizes):
        for group in groups:
            first = group[0]
            ratio = size / max(sizes[first], 1)
            fits = 1 / MAX_SIZE_RATIO <= ratio <= MAX_SIZE_RATIO
            if fits and not own[unit] and not own[first]:
                group.append(unit)
                break
        else:
            groups.append([unit])
    return groups


def buffer_sizes(sizes: Sequence[int], assigned: Sequence[int]) -> list[int]:
    """Elements of each buffer: the largest of the units that take turns in it."""
    largest = [0] * (max(assigned) + 1)
    for size, buffer in zip(sizes, assigned, strict=True):
        largest[buffer] = max(largest[buffer], size)
    return largest
