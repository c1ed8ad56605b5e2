"""The small files of plain data and tensors: extra_state of each rank, data.pt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.format.folder import (
    DATA,
    model_folder,
    recorded_files,
    shard_name,
    world_size,
    written_by_us,
)
from retool.checkpoint.format.stored_tensors import StoredTensor
from retool.checkpoint.format.torch_file import WAY_OUT, TorchFile

MOST_STEPS = 1 << 53
MOST_DEPTH = 100  # levels of lists and dicts in a state


def read_state(path: Path, blocks: list[int] | None = None) -> Any:
    """A small file of plain data and tensors (extra_state, data.pt), tensors loaded.

    ValueError for anything else in it.
    """
    file = TorchFile(path, blocks)
    return _Loader(file).value(file.content, depth=0)


def extra_state(where: Path, rank: int) -> dict[str, Any] | None:
    """What a rank of ours saved besides tensors; None if it saved nothing, or another program wrote
    the checkpoint.
    """
    return own_state(where / shard_name("extra_state", world_size(where), rank), where)


def data_state(top: Path) -> dict[str, Any]:
    """A checkpoint's data.pt, if we wrote it: other programs put pickled classes there.

    ValueError where it is damaged.
    """
    return own_state(top / DATA, model_folder(top)) or {}


def own_state(path: Path, where: Path) -> dict[str, Any] | None:
    """The states in a file of ours; None if there is none, another program wrote it, or
    checksums.json doesn't list it.
    """
    files = recorded_files(where)
    entry = files.get(os.path.relpath(path, where))
    unknown = bool(files) and entry is None
    if unknown or not written_by_us(where) or not path.is_file():
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


class _Loader:
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
        if isinstance(described, StoredTensor):
            out = self._tensor(described)
        elif isinstance(described, dict):
            out = {key: self.value(part, depth + 1) for key, part in described.items()}
        elif isinstance(described, (list, tuple)):
            out = type(described)(self.value(part, depth + 1) for part in described)
        elif described is not None and not isinstance(described, (str, bytes, int, float)):
            raise ValueError(
                f"{self._file.path}: a {type(described).__name__} among plain data. {WAY_OUT}"
            )
        # The number stays its own: the file holds all these objects meanwhile
        self._seen[id(described)] = out
        return out

    def _tensor(self, described: StoredTensor) -> torch.Tensor:
        storage = described.storage
        if storage.key not in self._storages:
            # The storage once, tensors as views of it: they shared memory when they were saved.
            everything = StoredTensor(storage, 0, (storage.numel,))
            self._storages[storage.key] = self._file.value(everything)
        whole = self._storages[storage.key]
        if whole.dtype != storage.dtype:
            raise ValueError(
                f"{self._file.path}: storage {storage.key} is {whole.dtype} and {storage.dtype}. {WAY_OUT}"
            )
        return whole[described.offset : described.offset + described.numel].view(described.shape)
