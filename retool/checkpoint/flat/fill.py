"""Filling flat shards: from anything that can read a range of a named tensor."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple, Protocol

import torch

from retool.model.hf.names import COMPUTED, HEAD
from retool.parallel.fsdp.layout import Layout, Member, local_pieces

# Elements copied at a time: bounds what a conversion of dtype or a move to the device holds at once
CHUNK = 1 << 24
THREADS = 4
# What values may be stored in. Of another type they are quantised, and mean nothing without their scales.
PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class TensorSource(Protocol):
    """Named tensors on disk, readable in part."""

    def names(self) -> Collection[str]:
        """Every tensor that is there."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: 1-D, on the CPU, in the stored dtype.

        Reads only those bytes.

        Called from several threads at once.
        """
        ...


def load_flat(layout: Layout, shard_rank: int, source: TensorSource, out: torch.Tensor) -> None:
    """Fill `out` [layout.shard_numel] with what shard rank `shard_rank` owns of `source`; padding
    becomes 0.

    Values are converted to `out`'s dtype and device. Every rank checks every name and shape, so all
    of them raise the same ValueError (missing, misshapen and unexpected parameters, all at once)
    before anything is read.
    """
    assert out.shape == (layout.shard_numel,), (
        f"out has {tuple(out.shape)}, the shard {layout.shard_numel} elements"
    )
    on_disk = match_names(layout, source)
    # Padding between parameters must be 0: the optimizer updates it with the rest, and 0 stays 0.
    out.zero_()

    def fill(at: int, found: Found, start: int, stop: int) -> None:
        first = found.start + start
        out[at : at + stop - start].copy_(source.read(found.name, first, first + stop - start))

    # Checksums, page faults and copies to the device each let go of the interpreter lock, and
    # overlap here.
    with torch.no_grad(), ThreadPoolExecutor(THREADS) as pool:
        work = [
            pool.submit(
                fill,
                piece.local + start - piece.start,
                on_disk[piece.member.name],
                start,
                min(start + CHUNK, piece.stop),
            )
            for piece in local_pieces(layout, shard_rank)
            for start in range(piece.start, piece.stop, CHUNK)
        ]
        try:
            for part in work:
                part.result()
        finally:
            pool.shutdown(cancel_futures=True)


def require_tied(layout: Layout, source: TensorSource) -> None:
    """ValueError if config.json ties two parameters and the files hold different matrices for them."""
    names = set(source.names())
    for alias, name in layout.aliases:
        if alias in names and name in names and not same_values(source, alias, name):
            problem = (
                f"config.json says that {alias} is {name} (tie_word_embeddings), and the files hold "
                "two different matrices"
            )
            raise ValueError(
                f'{source}: {problem}. With "tie_word_embeddings": false in config.json both are trained.'
            )


def same_values(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors hold the same values. Reads no more than it needs to tell."""
    if source.shape(one) != source.shape(other):
        return False
    numel = prod(source.shape(one))
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        a, b = (source.read(name, start, stop) for name in (one, other))
        wider = torch.promote_types(a.dtype, b.dtype)
        if not torch.equal(a.to(wider), b.to(wider)):
            return False
    return True


class Found(NamedTuple):
    """Where a parameter's values are: elements of the flattened tensor `name`, from `start` on."""

    name: str
    start: int = 0


def match_names(layout: Layout, source: TensorSource) -> dict[str, Found]:
    """Parameter name → where `source` holds it: under its name, under an alias, or in a fused
    tensor.

    ValueError names everything that doesn't fit.
    """
    there = set(source.names())
    fused, faults = _fused_in(layout, source, there)
    names_of: dict[str, list[str]] = {member.name: [member.name] for _, member in layout.members}
    for alias, name in layout.aliases:
        names_of.setdefault(name, []).append(alias)

    matched: dict[str, Found] = {}
    for _, member in layout.members:
        # Its own name before an alias: of a tied pair, files may hold either or both.
        name = next((each for each in names_of[member.name] if each in there), None)
        whole = fused.get(member.name)
        if name is not None and whole is not None:
            faults.append(f"{name} is there twice: by itself, and in {whole.name}")
        elif whole is not None:
            matched[member.name] = whole
        elif name is None:
            faults.append(f"{member.name} {list(member.shape)} is missing")
        elif source.shape(name) != member.shape:
            faults.append(_misshapen(name, source.shape(name), member))
        elif source.dtype(name) not in PLAIN:
            faults.append(_quantised(name, source))
        else:
            matched[member.name] = Found(name)
    known = {each for names in names_of.values() for each in names}
    known |= {name for name, _ in layout.fused}
    for name in sorted(there - known):
        if not name.endswith(COMPUTED):
            faults.append(f"{name} is unexpected")
    if faults:
        head_is_missing = HEAD in names_of and HEAD not in matched
        way_out = _way_out(faults, head_is_missing, _before(list(names_of), there))
        raise ValueError(_does_not_fit(source, faults, way_out))
    return matched


def _before(names: list[str], there: set[str]) -> str:
    """What stands before each of the names where they are `there` under longer ones; else empty."""
    longer = (name.removesuffix(names[0]) for name in there if name.endswith(names[0]))
    return next((before for before in longer if all(before + name in there for name in names)), "")


def _way_out(faults: list[str], head_is_missing: bool, before: str) -> str:
    if any(" is quantised " in fault for fault in faults):
        return "Give the model's folder as it was before it was quantised."
    if before:
        return (
            f"The model is there under longer names: {before} stands before each. Save what the program "
            "that wrote it has put its wrapper around."
        )
    way_out = "Check that the weights and config.json belong together."
    if head_is_missing:
        way_out += (
            ' If the head is the embedding, config.json must say so: "tie_word_embeddings": true.'
        )
    return way_out


def _fused_in(
    layout: Layout, source: TensorSource, there: set[str]
) -> tuple[dict[str, Found], list[str]]:
    """Members that are part of a fused tensor of `source`, and an error for what doesn't fit in
    these tensors.
    """
    names = {slot: name for name, slot in layout.fused if name in there}
    found: dict[str, Found] = {}
    faults: list[str] = []
    for unit in layout.units:
        for slot in (slot for slot in unit.slots if slot.name in names):
            name = names[slot.name]
            whole = (slot.shape[0] * unit.parts, *slot.shape[1:])
            if source.shape(name) != whole and slot.part == 0:
                faults.append(f"{name} is {list(source.shape(name))}, the model has {list(whole)}")
            elif source.dtype(name) not in PLAIN and slot.part == 0:
                faults.append(_quantised(name, source))
            before = slot.part * slot.numel - slot.offset
            for member in slot.members:
                found[member.name] = Found(name, before + member.offset)
    return found, faults


def _does_not_fit(source: TensorSource, faults: list[str], way_out: str) -> str:
    listed = "; ".join(faults[:8])
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    return f"{source} does not fit the model: {listed}{more}. {way_out}"


def _quantised(name: str, source: TensorSource) -> str:
    return f"{name} is quantised ({str(source.dtype(name)).removeprefix('torch.')})"


def _misshapen(name: str, shape: tuple[int, ...], member: Member) -> str:
    return f"{name} is {list(shape)}, the model has {list(member.shape)}"
