"""The files of one kind in a checkpoint folder, opened when first needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from retool.checkpoint.format.folder import (
    first_missing,
    recorded_files,
    shard_name,
    world_size,
)
from retool.checkpoint.format.stored_tensors import StoredShard, StoredTensor
from retool.checkpoint.format.torch_file import WAY_OUT, TorchFile
from retool.files.untrusted import shown


class Shards:
    """The files of one kind (model or optim) in a checkpoint folder, opened when first needed.

    ValueError where there are fewer of them than ranks: nothing is done for ranks that only a
    number claims.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.world = world_size(folder)
        self._recorded = recorded_files(folder)
        self._files: dict[int, TorchFile] = {}
        self._opening = threading.Lock()
        if missing := first_missing(folder, kind, self.world):
            raise ValueError(
                f"{folder / missing} is missing: the checkpoint is not complete. {WAY_OUT}"
            )

    def file(self, rank: int) -> TorchFile:
        """Rank `rank`'s file. ValueError if it is missing, damaged or refused."""
        # Several threads read, and each file is opened once
        with self._opening:
            if rank not in self._files:
                self._files[rank] = self._open(shard_name(self.kind, self.world, rank))
            return self._files[rank]

    def _open(self, name: str) -> TorchFile:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is not complete. {WAY_OUT}")
        entry = self._recorded.get(name)
        return TorchFile(path, None if entry is None else entry["crc32"])

    def release(self) -> None:
        """Give back the memory of what was read."""
        for file in self._files.values():
            file.release()

    def entries(self, rank: int) -> dict[str, Any]:
        """Name → tensor of a rank's model file."""
        file = self.file(rank)
        return require_named_tensors(file, require_dict(file, file.content))

    def states(self, rank: int) -> dict[int, Any]:
        """Parameter's index → its state in a rank's optimizer file."""
        file = self.file(rank)
        content = require_dict(file, file.content)
        return require_dict(file, content.get("state"))


def require_dict(file: TorchFile, content: Any) -> dict[Any, Any]:
    """`content` if it is a dict. ValueError names the file."""
    if not isinstance(content, dict):
        raise ValueError(f"{file.path}: not a state dict, but {type(content).__name__}. {WAY_OUT}")
    return content


def require_named_tensors(file: TorchFile, entries: dict[Any, Any]) -> dict[str, Any]:
    """`entries` if their keys can be names of parameters, and their tensors are not the same bytes
    over and over.
    """
    for name in entries:
        if not isinstance(name, str) or name != shown(name):
            raise ValueError(
                f"{file.path}: {shown(repr(name))} is no name of a parameter. {WAY_OUT}"
            )
    tensors = [each for each in entries.values() if isinstance(each, (StoredTensor, StoredShard))]
    file.require_shared_as_ties_are([local_part(tensor) for tensor in tensors])
    return entries


def local_part(entry: StoredTensor | StoredShard) -> StoredTensor:
    """What the file holds of a tensor: its rows, or all of it."""
    return entry.local if isinstance(entry, StoredShard) else entry
