"""The safetensors format: a memory-mapped reader for ranges of tensors, and a writer that streams.

A file is an 8-byte little-endian header length, a JSON header (name → dtype, shape, [begin, end) in
the data) and the data. Sizes are known before any data, so tensors can be written as they come and
nothing but the current piece is held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.format.checksums import ChecksummedFile
from retool.checkpoint.format.stored_tensors import MOST_DIMENSIONS
from retool.checkpoint.format.torch_file import mapped
from retool.files.untrusted import open_regular, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Only ever named: what is stored so isn't trained
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100 << 20  # the format's own limit
MOST_BYTES = 1 << 63
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFile:
    """One memory-mapped file; `entries` is name → (dtype, shape, begin, end) in bytes of the file.

    ValueError on a bad header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise ValueError(
                    f"{path} is not a safetensors file or is truncated: {size} bytes, header of "
                    f"{length}. Fetch it again."
                )
            try:
                header = json.loads(file.read(length).decode("utf-8"))
                self.entries = {
                    name: _entry(name, entry, 8 + length)
                    for name, entry in header.items()
                    if name != "__metadata__"
                }
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path} has a broken safetensors header ({shown(str(error))}). Fetch it again."
                ) from error
            self._check_places(8 + length, size)
            self.data = mapped(file)

    def _check_places(self, start: int, size: int) -> None:
        """Each tensor has the bytes that its shape needs, inside the file, and none of another's."""
        end_of_last = start
        in_order = sorted(self.entries.items(), key=lambda item: item[1][2:])
        for name, (dtype, shape, begin, end) in in_order:
            inside = start <= begin <= end <= size
            if not inside or end - begin != prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"{self.path}: {name} {list(shape)} {dtype} does not fit its bytes "
                    f"[{begin}, {end}) of {size}. Fetch it again."
                )
            # Overlapping tensors would let a small file claim any number of them.
            if begin < end_of_last:
                raise ValueError(f"{self.path}: {name} overlaps another tensor. Fetch it again.")
            end_of_last = end

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, a view of the mapped file."""
        dtype, _, begin, _ = self.entries[name]
        # `frombuffer` refuses to give nothing
        if start == stop:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(
            self.data, dtype=dtype, count=stop - start, offset=begin + start * dtype.itemsize
        )


def _entry(
    name: str, entry: dict[str, Any], base: int
) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if name != shown(name):
        raise ValueError("a name that can't be printed")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is none that weights are trained in")
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < MOST_BYTES for n in (*shape, begin, end)):
        raise ValueError("shapes and offsets must be whole numbers, of sizes that a file can have")
    return DTYPES[entry["dtype"]], shape, base + begin, base + end


def plan_files(
    tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int = SHARD_BYTES
) -> list[tuple[str, list[str]]]:
    """Split tensors (name → shape, in order) into files of at most `limit` bytes, one tensor at
    least: [(file name, names)].
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [
        (f"model-{i:05}-of-{len(groups):05}.safetensors", names)
        for i, names in enumerate(groups, 1)
    ]


class WeightsWriter:
    """Write the weights of `tensors` (name → shape) into `folder`, in that order, piece by piece as
    they come.

    `write(piece)` takes the next elements of the running tensor sequence (a piece never spans two
    tensors); `close()` checks that everything came and writes the index where there are several
    files. Finished files are on the disk, and in `checksums`.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        limit: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self.dtype = dtype
        self.plan = plan_files(tensors, dtype, limit)
        self.files = [folder / name for name, _ in self.plan]
        self.checksums: dict[str, dict[str, Any]] = {}  # by file name, of those that are finished
        self._todo = self._steps()
        self._file: ChecksummedFile | None = None
        self._left = 0

    def _steps(self) -> Iterator[tuple[int, int]]:
        for index, (_, names) in enumerate(self.plan):
            for name in names:
                yield index, prod(self.tensors[name])

    def _open(self, index: int) -> ChecksummedFile:
        file = ChecksummedFile(self.files[index])
        file.write(header({name: self.tensors[name] for name in self.plan[index][1]}, self.dtype))
        return file

    def write(self, piece: torch.Tensor) -> None:
        """Append `piece` (any shape, CPU; converted to the file's dtype)."""
        # More than once where tensors have no elements
        while self._left == 0:
            index, self._left = next(self._todo)
            if self._file is None or self._file.path != self.files[index]:
                self._close_file()
                self._file = self._open(index)
        assert self._file is not None and piece.numel() <= self._left, (
            "a piece runs past the end of its tensor"
        )
        self._left -= piece.numel()
        self._file.write(as_bytes(piece.to(self.dtype)))

    def close(self) -> None:
        """Finish the files; a clean-up after an error may call `abandon` instead."""
        assert self._left == 0 and next(self._todo, None) is None, "some tensors were not written"
        self._close_file()
        if len(self.plan) > 1:
            total = sum(prod(shape) for shape in self.tensors.values()) * self.dtype.itemsize
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for file, names in self.plan for name in names},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close without checking, after an error."""
        if self._file is not None:
            self._file.abandon()

    def _close_file(self) -> None:
        if self._file is not None:
            self.checksums[self._file.path.name] = self._file.close()
            self._file = None


def header(tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The header of a file that holds `tensors` one after the other, padded so that the data starts
    8-byte aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces at the end are JSON, and tensors begin where a float64 may
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    # By way of uint8, as numpy knows no bfloat16.
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
