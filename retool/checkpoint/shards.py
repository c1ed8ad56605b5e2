"""Reading sharded checkpoints, ours or verl's, written by any number of ranks: `ShardSource` and
the small state files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.folder import first_missing, recorded, shard_name, world_size, written_by_us
from retool.checkpoint.format.archive import WAY_OUT, TorchFile
from retool.checkpoint.format.rows import row_range
from retool.checkpoint.format.stored import Sharded, Stored
from retool.files.untrusted import shown

MOST_PARAMETERS = 1 << 20
MOST_STEPS = 1 << 53
MOST_BETAS = 8  # numbers in one hyperparameter
MOST_DEPTH = 100  # levels of lists and dicts in a state


class Shards:
    """The files of one kind (model or optim) in a checkpoint folder, opened when first needed.

    ValueError where there are fewer of them than ranks: nothing is done for ranks that only a
    number claims.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.world = world_size(folder)
        self._recorded = recorded(folder)
        self._files: dict[int, TorchFile] = {}
        self._opening = threading.Lock()
        if missing := first_missing(folder, kind, self.world):
            raise ValueError(
                f"{folder / missing} is missing: the checkpoint is not complete. {WAY_OUT}"
            )

    def file(self, rank: int) -> TorchFile:
        """Rank `rank`'s file. ValueError if it is missing, damaged or refused."""
        with self._opening:
            if rank not in self._files:
                name = shard_name(self.kind, self.world, rank)
                if not (self.folder / name).is_file():
                    raise ValueError(
                        f"{self.folder / name} is missing: the checkpoint is not complete. {WAY_OUT}"
                    )
                entry = self._recorded.get(name)
                self._files[rank] = TorchFile(
                    self.folder / name, None if entry is None else entry["crc32"]
                )
            return self._files[rank]

    def release(self) -> None:
        """Give back the memory of what was read."""
        for file in self._files.values():
            file.release()

    def entries(self, rank: int) -> dict[str, Any]:
        """Name → tensor of a rank's model file."""
        return _named(self.file(rank), _mapping(self.file(rank), self.file(rank).content))

    def states(self, rank: int) -> dict[int, Any]:
        """Parameter's index → its state in a rank's optimizer file."""
        file = self.file(rank)
        return _mapping(file, _mapping(file, file.content).get("state"))


def _mapping(file: TorchFile, content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{file.path}: not a state dict, but {type(content).__name__}. {WAY_OUT}")
    return content


def _named(file: TorchFile, entries: dict[Any, Any]) -> dict[str, Any]:
    """`entries` if their keys can be names of parameters, and their tensors are not the same bytes
    over and over.
    """
    for name in entries:
        if not isinstance(name, str) or name != shown(name):
            raise ValueError(
                f"{file.path}: {shown(repr(name))} is no name of a parameter. {WAY_OUT}"
            )
    file.require_shared_as_ties_are(
        [_local(entry) for entry in entries.values() if isinstance(entry, (Stored, Sharded))]
    )
    return entries


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
                self._entries[rank] = _named(
                    file, {name: _mapping(file, state).get(self.which) for name, state in there}
                )
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
            return self._shards.file(0).read(_local(whole), start, stop)
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
                    or _local(entry).storage.dtype != _local(whole).storage.dtype
                ):
                    path = self._shards.file(rank).path
                    raise ValueError(
                        f"{path}: {name} is {list(entry.shape)}, rank 0 says {list(whole.shape)}. {WAY_OUT}"
                    )
                pieces.append(
                    self._shards.file(rank).read(_local(entry), low - first, high - first)
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
            file.checksum(_local(self._checked(name, r)))
            for file, r in zip(files, (first, rank), strict=True)
        )
        if here != there:
            raise ValueError(
                f"{files[1].path}: {name} differs from its copy in {files[0].path.name}. {WAY_OUT}"
            )


def _local(entry: Stored | Sharded) -> Stored:
    return entry.local if isinstance(entry, Sharded) else entry


def parameter_indices(optim: Shards) -> dict[str, int]:
    """Parameter name → its index in the optimizer's state.

    From the names in the file where it has them (ours does). Else the parameters are the model
    file's entries in order, without a tied head, which is the same parameter as the embedding and
    has no state of its own.
    """
    file = optim.file(0)
    states = optim.states(0)
    indices, names = _grouped_parameters(file)
    if not names:
        entries = Shards(optim.folder, "model").entries(0)
        names = list(entries)
        if len(names) == len(indices) + 1 and "lm_head.weight" in entries:
            names.remove("lm_head.weight")
    sound = all(isinstance(name, str) for name in names) and all(
        type(index) is int for index in indices
    )
    if not sound or len(names) != len(indices) or len(set(names)) != len(names):
        raise ValueError(
            f"{file.path}: {len(indices)} optimizer states for {len(names)} parameters; which "
            "belongs to which can't be told. Start a new run from its weights (python -m "
            "retool.checkpoint merge)."
        )
    return {name: index for name, index in zip(names, indices, strict=True) if index in states}


def _grouped_parameters(file: TorchFile) -> tuple[list[Any], list[Any]]:
    """The indices and the names (none in other programs' files) of all parameter groups, one after
    the other.
    """
    indices: list[Any] = []
    names: list[Any] = []
    for group in _groups(file):
        indices += _listed(file, group.get("params"))
        names += _listed(file, group.get("param_names", []))
        if max(len(indices), len(names)) > MOST_PARAMETERS:
            raise ValueError(
                f"{file.path}: more than {MOST_PARAMETERS} parameters in its param_groups. {WAY_OUT}"
            )
    return indices, names


def _groups(file: TorchFile) -> list[dict[Any, Any]]:
    return [
        _mapping(file, group)
        for group in _listed(file, _mapping(file, file.content).get("param_groups"))
    ]


def _listed(file: TorchFile, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{file.path}: its param_groups are not AdamW's. {WAY_OUT}")
    return value


def optimizer_steps(optim: Shards, rank: int) -> dict[int, int]:
    """Parameter's index → how many updates a rank's optimizer file says it has had; parameters of
    which it says nothing are left out.
    """
    file = optim.file(rank)
    counts: dict[int, int] = {}
    for index, state in optim.states(rank).items():
        step = _mapping(file, state).get("step")
        if isinstance(step, Stored) and step.numel == 1:
            step = file.value(step).double().item()
        if step is None:
            continue
        if not isinstance(step, (int, float)) or not 0 <= step < MOST_STEPS:
            raise ValueError(
                f"{file.path}: the step of parameter {index} is no number of updates. {WAY_OUT}"
            )
        counts[index] = int(step)
    return counts


def optimizer_step(optim: Shards) -> int:
    """The number of updates that the optimizer of a checkpoint has made."""
    return next(iter(optimizer_steps(optim, 0).values()), 0)


def parameter_group(optim: Shards) -> dict[str, Any]:
    """AdamW's hyperparameters: the plain numbers of the first parameter group."""
    group = next(iter(_groups(optim.file(0))), {})
    return {
        k: v
        for k, v in group.items()
        if isinstance(k, str) and _is_plain(v) and k not in ("params", "param_names")
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) <= MOST_BETAS and all(isinstance(part, (int, float)) for part in value)
    return value is None or isinstance(value, (str, int, float))


def read_state(path: Path, blocks: list[int] | None = None) -> Any:
    """A small file of plain data and tensors (extra_state, data.pt), tensors loaded.

    ValueError for anything else in it.
    """
    file = TorchFile(path, blocks)
    return _Materialised(file).value(file.content, depth=0)


def extra_state(where: Path, rank: int) -> dict[str, Any] | None:
    """What a rank of ours saved besides tensors; None where it saved nothing, or another program
    did.
    """
    return own_state(where / shard_name("extra_state", world_size(where), rank), where)


def own_state(path: Path, where: Path) -> dict[str, Any] | None:
    """The states in a file of ours; None where there is none, another program wrote it, or
    checksums.json doesn't know it.
    """
    files = recorded(where)
    entry = files.get(os.path.relpath(path, where))
    if not written_by_us(where) or not path.is_file() or (files and entry is None):
        return None
    content = read_state(path, None if entry is None else entry["crc32"])
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a dict of states. {WAY_OUT}")
    return content


def step_of(value: Any, where: Path) -> int:
    """A training step as a checkpoint's state, or its folder's name, tells it."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if type(value) is not int or not 0 <= value < MOST_STEPS:
        raise ValueError(f"{where}: its extra state tells no training step. {WAY_OUT}")
    return value


class _Materialised:
    """Plain data with its tensors loaded.

    What is shared stays shared, so that it takes no more memory than the file has bytes.
    """

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        self._seen: dict[int, Any] = {}
        self._storages: dict[str, torch.Tensor] = {}

    def value(self, described: Any, depth: int) -> Any:
        if id(described) in self._seen:  # nested sharing would otherwise take exponential time
            return self._seen[id(described)]
        if depth > MOST_DEPTH:
            raise ValueError(
                f"{self._file.path}: nested more than {MOST_DEPTH} levels deep. {WAY_OUT}"
            )
        out = described
        if isinstance(described, Stored):
            out = self._tensor(described)
        elif isinstance(described, dict):
            out = {key: self.value(part, depth + 1) for key, part in described.items()}
        elif isinstance(described, (list, tuple)):
            out = type(described)(self.value(part, depth + 1) for part in described)
        elif described is not None and not isinstance(described, (str, bytes, int, float)):
            raise ValueError(
                f"{self._file.path}: a {type(described).__name__} among plain data. {WAY_OUT}"
            )
        self._seen[id(described)] = out
        return out

    def _tensor(self, described: Stored) -> torch.Tensor:
        storage = described.storage
        if storage.key not in self._storages:
            self._storages[storage.key] = self._file.value(Stored(storage, 0, (storage.numel,)))
        whole = self._storages[storage.key]
        if whole.dtype != storage.dtype:
            raise ValueError(
                f"{self._file.path}: storage {storage.key} is {whole.dtype} and {storage.dtype}. {WAY_OUT}"
            )
        return whole[described.offset : described.offset + described.numel].view(described.shape)
