"""Reading sharded checkpoints, ours or verl's, written by any number of ranks: `ShardSource` and the small state files."""

from __future__ import annotations

import threading
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.archive import TorchFile
from retool.checkpoint.folder import recorded, shard_name, world_size
from retool.checkpoint.rows import row_range
from retool.checkpoint.stored import Sharded, Stored


class Shards:
    """The files of one kind (model or optim) in a checkpoint folder, opened when first needed."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.world = world_size(folder)
        self._recorded = recorded(folder)
        self._files: dict[int, TorchFile] = {}
        self._opening = threading.Lock()

    def file(self, rank: int) -> TorchFile:
        """Rank `rank`'s file. ValueError if it is missing, damaged or refused."""
        with self._opening:
            if rank not in self._files:
                name = shard_name(self.kind, self.world, rank)
                if not (self.folder / name).is_file():
                    raise ValueError(f"{self.folder / name} is missing: the checkpoint is not complete.")
                entry = self._recorded.get(name)
                self._files[rank] = TorchFile(self.folder / name, None if entry is None else entry["crc32"])
            return self._files[rank]

    def release(self) -> None:
        """Give back the memory of what was read."""
        for file in self._files.values():
            file.release()

    def entries(self, rank: int) -> dict[str, Any]:
        """Name → tensor of a rank's model file."""
        return _mapping(self.file(rank), self.file(rank).content)


def _mapping(file: TorchFile, content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{file.path}: not a state dict, but {type(content).__name__}.")
    return content


class ShardSource:
    """A tensor of each parameter across all ranks' files: the weights, or one of AdamW's moments.

    `which` is "model", "exp_avg" or "exp_avg_sq". Only files whose rows are asked for are opened; sources given the same `Shards`
    open each once.
    """

    def __init__(self, folder: Path | str | Shards, which: str = "model") -> None:
        self._shards = folder if isinstance(folder, Shards) else Shards(Path(folder), "model" if which == "model" else "optim")
        self.folder, self.which = self._shards.folder, which
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
                state = _mapping(file, _mapping(file, file.content).get("state"))
                self._entries[rank] = {name: _mapping(file, state[i]).get(self.which) for name, i in self._indices.items() if i in state}
        return self._entries[rank]

    def names(self) -> Collection[str]:
        return self._rank(0).keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checked(name, 0).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return _local(self._checked(name, 0)).storage.dtype

    def shards(self, name: str) -> int:
        """Over how many files a tensor's rows are spread."""
        entry = self._checked(name, 0)
        return 1 if isinstance(entry, Stored) else (entry.mesh_shape or (self._shards.world,))[-1]

    def _checked(self, name: str, rank: int) -> Stored | Sharded:
        """A rank's entry, after checking that its sharding is one we know and its rows are those it should have."""
        path, entry = self._shards.file(rank).path, self._rank(rank).get(name)
        if isinstance(entry, Stored):
            if self._shards.world > 1:
                raise ValueError(
                    f"{path}: {name} is a plain tensor in a checkpoint of {self._shards.world} ranks, so nothing says whether it is a part "
                    "or the whole. Save it with FSDP2 (fsdp_size or strategy fsdp2), which records the sharding."
                )
            return entry
        if not isinstance(entry, Sharded):
            raise ValueError(f"{path}: {name} is not there, or not a tensor.")
        self._check_mesh(path, name, entry)
        first, last = row_range(entry.shape[0], (entry.mesh_shape or (self._shards.world,))[-1], rank)
        if entry.local.shape != (last - first, *entry.shape[1:]):
            rows = f"rows [{first}, {last}) of {list(entry.shape)}"
            raise ValueError(f"{path}: {name} should have {rows} here, the file has {list(entry.local.shape)}.")
        return entry

    def _check_mesh(self, path: Path, name: str, entry: Sharded) -> None:
        mesh, world = entry.mesh_shape or (self._shards.world,), self._shards.world
        if not entry.shape or entry.placements not in ((0,), (None, 0)) or len(mesh) != len(entry.placements) or prod(mesh) != world:
            raise ValueError(
                f"{path}: {name} {list(entry.shape)} has placements {entry.placements} on a mesh {mesh} of {world} ranks; "
                "only rows over one mesh dimension (Shard(0), optionally replicated) can be read."
            )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        whole, count = self._checked(name, 0), self.shards(name)
        assert 0 <= start <= stop <= prod(whole.shape)
        if count == 1:
            return self._shards.file(0).read(_local(whole), start, stop)
        width, pieces = prod(whole.shape[1:]), []
        for rank in range(count):
            first, last = (row * width for row in row_range(whole.shape[0], count, rank))
            low, high = max(start, first), min(stop, last)
            if low < high:
                entry = self._checked(name, rank)
                if entry.shape != whole.shape or _local(entry).storage.dtype != _local(whole).storage.dtype:
                    raise ValueError(f"{self._shards.file(rank).path}: {name} is {list(entry.shape)}, rank 0 says {list(whole.shape)}.")
                pieces.append(self._shards.file(rank).read(_local(entry), low - first, high - first))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [torch.empty(0, dtype=self.dtype(name))])

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._shards.release()

    def check_files(self) -> None:
        """Compare all bytes with their checksums; and every rank's entries with rank 0's."""
        for rank in range(self._shards.world):
            self._shards.file(rank).check_all()
            if self._rank(rank).keys() != self._rank(0).keys():
                raise ValueError(f"{self._shards.file(rank).path} holds other tensors than rank 0's file.")


def _local(entry: Stored | Sharded) -> Stored:
    return entry.local if isinstance(entry, Sharded) else entry


def parameter_indices(optim: Shards) -> dict[str, int]:
    """Parameter name → its index in the optimizer's state.

    From the names in the file where it has them (ours does). Else the parameters are the model file's entries in order, without a
    tied head, which is the same parameter as the embedding and has no state of its own.
    """
    file = optim.file(0)
    content = _mapping(file, file.content)
    groups, state = content.get("param_groups"), _mapping(file, content.get("state"))
    try:
        assert isinstance(groups, list)
        indices = [i for group in groups for i in group["params"]]
        names = [n for group in groups for n in group.get("param_names", ())]
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{file.path}: its param_groups are not AdamW's.") from error
    if not names:
        entries = Shards(optim.folder, "model").entries(0)
        names = list(entries)
        if len(names) == len(indices) + 1 and "lm_head.weight" in entries:
            names.remove("lm_head.weight")
    if len(names) != len(indices) or not all(isinstance(x, kind) for x, kind in [*((n, str) for n in names), *((i, int) for i in indices)]):
        raise ValueError(f"{file.path}: {len(indices)} optimizer states for {len(names)} parameters; which belongs to which can't be told.")
    return {name: i for name, i in zip(names, indices, strict=True) if i in state}


def optimizer_step(optim: Shards) -> int:
    """The number of updates that the optimizer of a checkpoint has made."""
    file = optim.file(0)
    for entry in _mapping(file, _mapping(file, file.content).get("state")).values():
        step = _mapping(file, entry).get("step")
        if isinstance(step, Stored) and step.numel == 1:
            return int(file.value(step).item())
        return step if isinstance(step, int) else 0
    return 0


def parameter_group(optim: Shards) -> dict[str, Any]:
    """AdamW's hyperparameters: the plain numbers of the first parameter group."""
    file = optim.file(0)
    groups = _mapping(file, file.content).get("param_groups")
    group = groups[0] if isinstance(groups, list) and groups else {}
    plain = (str, int, float, tuple, type(None))
    return {k: v for k, v in _mapping(file, group).items() if isinstance(v, plain) and k not in ("params", "param_names")}


def read_state(path: Path, blocks: list[int] | None = None) -> Any:
    """A small file of plain data and tensors (extra_state, data.pt), tensors loaded. ValueError for anything else in it."""
    file = TorchFile(path, blocks)
    try:
        return _materialise(file, file.content, {})
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply.") from error


def _materialise(file: TorchFile, value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:  # shared parts once: nested sharing would otherwise take exponential time
        return seen[id(value)]
    out = value
    if isinstance(value, Stored):
        out = file.value(value)
    elif isinstance(value, dict):
        out = {k: _materialise(file, v, seen) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        out = type(value)(_materialise(file, v, seen) for v in value)
    elif value is not None and not isinstance(value, (str, bytes, int, float)):
        raise ValueError(f"{file.path}: a {type(value).__name__} among plain data.")
    seen[id(value)] = out
    return out
