"""One tensor of each parameter, read from all ranks' files: its weights, or AdamW's moments."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.flat.rows import row_range
from retool.checkpoint.format.stored_tensors import StoredShard, StoredTensor
from retool.checkpoint.format.torch_file import WAY_OUT
from retool.checkpoint.shards.files import Shards, local_part, require_dict, require_named_tensors
from retool.checkpoint.shards.optimizer import parameter_indices


class ShardSource:
    """A tensor of each parameter across all ranks' files: the weights, or one of AdamW's moments.

    `which` is "model", "exp_avg" or "exp_avg_sq". Only files whose rows are asked for are opened;
    sources given the same `Shards` open each once.
    """

    def __init__(self, folder: Path | str | Shards, which: str = "model") -> None:
        if not isinstance(folder, Shards):
            folder = Shards(Path(folder), "model" if which == "model" else "optim")
        self._shards = folder
        self.folder = folder.folder
        self.which = which
        self._indices = None if which == "model" else parameter_indices(folder)
        self._entries: dict[int, dict[str, Any]] = {}  # by rank, of files that were opened

    def __repr__(self) -> str:
        return f"{self.folder} ({self.which})"

    def _rank(self, rank: int) -> dict[str, Any]:
        """Name → tensor in a rank's file."""
        if rank not in self._entries:
            if self._indices is None:
                self._entries[rank] = self._shards.entries(rank)
            else:
                self._entries[rank] = self._moments(rank, self._indices)
        return self._entries[rank]

    def _moments(self, rank: int, indices: dict[str, int]) -> dict[str, Any]:
        file = self._shards.file(rank)
        states = self._shards.states(rank)
        moments = {
            name: require_dict(file, states[index]).get(self.which)
            for name, index in indices.items()
            if index in states
        }
        return require_named_tensors(file, moments)

    def names(self) -> Collection[str]:
        return self._rank(0).keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checked(name, 0).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return local_part(self._checked(name, 0)).storage.dtype

    def shards(self, name: str) -> int:
        """Number of files over which a tensor's rows are spread."""
        entry = self._checked(name, 0)
        return 1 if isinstance(entry, StoredTensor) else self._mesh(entry)[-1]

    def _mesh(self, entry: StoredShard) -> tuple[int, ...]:
        """The mesh's shape: (shards,), or (replicas, shards)."""
        return entry.mesh_shape or (self._shards.world,)

    def _checked(self, name: str, rank: int) -> StoredTensor | StoredShard:
        """A rank's entry, after checking that its sharding is a known one and that it has the rows
        that it should have.
        """
        path = self._shards.file(rank).path
        entry = self._rank(rank).get(name)
        if isinstance(entry, StoredTensor):
            if self._shards.world > 1:
                raise ValueError(
                    f"{path}: {name} is a plain tensor in a checkpoint of {self._shards.world} "
                    "ranks, so nothing says whether it is a part or the whole. Save it with FSDP2 "
                    "(fsdp_size or strategy fsdp2), which records the sharding."
                )
            return entry
        if not isinstance(entry, StoredShard):
            raise ValueError(f"{path}: {name} is not there, or not a tensor. {WAY_OUT}")
        self._check_mesh(path, name, entry)
        shards = self._mesh(entry)[-1]
        # Replicas come after each other: rank r holds part r mod shards
        first, last = row_range(entry.shape[0], shards, rank % shards)
        if entry.local.shape != (last - first, *entry.shape[1:]):
            rows = f"rows [{first}, {last}) of {list(entry.shape)}"
            raise ValueError(
                f"{path}: {name} should have {rows} here, the file has {list(entry.local.shape)}. {WAY_OUT}"
            )
        return entry

    def _check_mesh(self, path: Path, name: str, entry: StoredShard) -> None:
        mesh = self._mesh(entry)
        world = self._shards.world
        # Shard(0), or Replicate() then Shard(0): FSDP and HSDP. Nothing else is written by what we
        # read.
        over_rows = entry.placements in ((0,), (None, 0)) and len(mesh) == len(entry.placements)
        if not entry.shape or not over_rows or prod(mesh) != world:
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
        pieces: list[torch.Tensor] = []
        for rank in range(count):
            first_row, end_row = row_range(whole.shape[0], count, rank)
            # Elements, as the caller counts: files are cut by rows
            first = first_row * width
            low = max(start, first)
            high = min(stop, end_row * width)
            if low < high:
                entry = self._checked(name, rank)
                self._require_like_first(name, rank, entry, whole)
                file = self._shards.file(rank)
                pieces.append(file.read(local_part(entry), low - first, high - first))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces or [torch.empty(0, dtype=self.dtype(name))])

    def _require_like_first(
        self,
        name: str,
        rank: int,
        entry: StoredTensor | StoredShard,
        first: StoredTensor | StoredShard,
    ) -> None:
        """ValueError if a rank's file gives another shape or dtype than rank 0's."""
        same_dtype = local_part(entry).storage.dtype == local_part(first).storage.dtype
        if entry.shape != first.shape or not same_dtype:
            path = self._shards.file(rank).path
            raise ValueError(
                f"{path}: {name} is {list(entry.shape)}, rank 0 says {list(first.shape)}. {WAY_OUT}"
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
        """ValueError unless a replica's rows equal those of the first rank that holds them."""
        first = rank % self.shards(name)
        if rank != first and self._checksum(name, rank) != self._checksum(name, first):
            path = self._shards.file(rank).path
            other = self._shards.file(first).path.name
            raise ValueError(f"{path}: {name} differs from its copy in {other}. {WAY_OUT}")

    def _checksum(self, name: str, rank: int) -> int:
        return self._shards.file(rank).checksum(local_part(self._checked(name, rank)))
