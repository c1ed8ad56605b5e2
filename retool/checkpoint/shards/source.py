"""A tensor of each parameter across all ranks' files: weights, or AdamW's moments."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.flat.rows import row_range
from retool.checkpoint.format.stored import Sharded, Stored
from retool.checkpoint.format.torch_file import WAY_OUT
from retool.checkpoint.shards.files import Shards, local_part, require_dict, require_named_tensors
from retool.checkpoint.shards.optimizer import parameter_indices


class ShardSource:
    """A tensor of each parameter across all ranks' files: the weights, or one of AdamW's moments.

    `which` is "model", "exp_avg" or "exp_avg_sq". Only files whose rows are asked for are opened;
    sources given the same `Shards` open each once.
    """

    def __init__(self, folder: Path | str | Shards, which: str = "model") -> None:
        self._shards = (
            folder
            if isinstance(folder, Shards)
            else Shards(Path(folder), "model" if which == "model" else "optim")
        )
        self.folder = self._shards.folder
        self.which = which
        self._indices = None if which == "model" else parameter_indices(self._shards)
        self._entries: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"{self.folder} ({self.which})"

    def _rank(self, rank: int) -> dict[str, Any]:
        if rank not in self._entries:
            if self._indices is None:
                self._entries[rank] = self._shards.entries(rank)
            else:
                file = self._shards.file(rank)
                states = self._shards.states(rank)
                there = [
                    (name, states[index])
                    for name, index in self._indices.items()
                    if index in states
                ]
                self._entries[rank] = require_named_tensors(
                    file, {name: require_dict(file, state).get(self.which) for name, state in there}
                )
        return self._entries[rank]

    def names(self) -> Collection[str]:
        return self._rank(0).keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checked(name, 0).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return local_part(self._checked(name, 0)).storage.dtype

    def shards(self, name: str) -> int:
        """Over how many files a tensor's rows are spread."""
        entry = self._checked(name, 0)
        return 1 if isinstance(entry, Stored) else (entry.mesh_shape or (self._shards.world,))[-1]

    def _checked(self, name: str, rank: int) -> Stored | Sharded:
        """A rank's entry, after checking that its sharding is one we know and its rows are those it
        should have.
        """
        path = self._shards.file(rank).path
        entry = self._rank(rank).get(name)
        if isinstance(entry, Stored):
            if self._shards.world > 1:
                raise ValueError(
                    f"{path}: {name} is a plain tensor in a checkpoint of {self._shards.world} "
                    "ranks, so nothing says whether it is a part or the whole. Save it with FSDP2 "
                    "(fsdp_size or strategy fsdp2), which records the sharding."
                )
            return entry
        if not isinstance(entry, Sharded):
            raise ValueError(f"{path}: {name} is not there, or not a tensor. {WAY_OUT}")
        self._check_mesh(path, name, entry)
        shards = (entry.mesh_shape or (self._shards.world,))[-1]
        first, last = row_range(entry.shape[0], shards, rank % shards)
        if entry.local.shape != (last - first, *entry.shape[1:]):
            rows = f"rows [{first}, {last}) of {list(entry.shape)}"
            raise ValueError(
                f"{path}: {name} should have {rows} here, the file has {list(entry.local.shape)}. {WAY_OUT}"
            )
        return entry

    def _check_mesh(self, path: Path, name: str, entry: Sharded) -> None:
        mesh = entry.mesh_shape or (self._shards.world,)
        world = self._shards.world
        if (
            not entry.shape
            or entry.placements not in ((0,), (None, 0))
            or len(mesh) != len(entry.placements)
            or prod(mesh) != world
        ):
            raise ValueError(
                f"{path}: {name} {list(entry.shape)} has placements {entry.placements} on a mesh "
                f"{mesh} of {world} ranks; only rows over one mesh dimension (Shard(0), optionally "
                "replicated) can be read. Merge it with the program that wrote it."
            )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        whole = self._checked(name, 0)
        count = self.shards(name)
        assert 0 <= start <= stop <= prod(whole.shape)
        if count == 1:
            return self._shards.file(0).read(local_part(whole), start, stop)
        width = prod(whole.shape[1:])
        pieces = []
        for rank in range(count):
            first, last = (row * width for row in row_range(whole.shape[0], count, rank))
            low = max(start, first)
            high = min(stop, last)
            if low < high:
                entry = self._checked(name, rank)
                if (
                    entry.shape != whole.shape
                    or local_part(entry).storage.dtype != local_part(whole).storage.dtype
                ):
                    path = self._shards.file(rank).path
                    raise ValueError(
                        f"{path}: {name} is {list(entry.shape)}, rank 0 says {list(whole.shape)}. {WAY_OUT}"
                    )
                pieces.append(
                    self._shards.file(rank).read(local_part(entry), low - first, high - first)
                )
        return (
            pieces[0]
            if len(pieces) == 1
            else torch.cat(pieces or [torch.empty(0, dtype=self.dtype(name))])
        )

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._shards.release()

    def check_files(self) -> None:
        """Compare all bytes with their checksums; every rank's entries with rank 0's; copies of the
        same rows with each other.
        """
        for rank in range(self._shards.world):
            file = self._shards.file(rank)
            file.check_all()
            if self._rank(rank).keys() != self._rank(0).keys():
                raise ValueError(f"{file.path} holds other tensors than rank 0's file. {WAY_OUT}")
            for name in self.names():
                self._check_copy(name, rank)

    def _check_copy(self, name: str, rank: int) -> None:
        """A replica's rows are those of the first rank that holds them."""
        first = rank % self.shards(name)
        if rank == first:
            return
        files = self._shards.file(first), self._shards.file(rank)
        here, there = (
            file.checksum(local_part(self._checked(name, r)))
            for file, r in zip(files, (first, rank), strict=True)
        )
        if here != there:
            raise ValueError(
                f"{files[1].path}: {name} differs from its copy in {files[0].path.name}. {WAY_OUT}"
            )
