"""A file of `torch.save`, memory-mapped: the object without its tensors' data, and any range of a tensor's elements.

Such a file is a zip of uncompressed records. Everything a record claims is compared with the file before it is used: sizes,
compression, position, and the checksum of what is read.
"""

from __future__ import annotations

import mmap
import os
import typing
import zipfile
import zlib
from pathlib import Path
from typing import Any, final

import torch

from retool.checkpoint.stored import Storage, Stored
from retool.checkpoint.unpickle import parse

PICKLE_LIMIT = 256 << 20
BLOCK = 1 << 20  # bytes of a file under one of its checksums


class TorchFile:
    """`content` is what was saved, tensors as `Stored` or `Sharded`. ValueError, with the file's name, for anything wrong.

    With `blocks` (the file's CRC-32 per BLOCK bytes, from checksums.json) each block is checked when first read, so that reading
    a part needs no more than that part. Without, a record's own checksum is compared when all of it is read at once.
    """

    def __init__(self, path: Path, blocks: list[int] | None = None) -> None:
        self.path, self.blocks = path, blocks
        self._checked: set[int] = set()
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                with zipfile.ZipFile(file) as archive:
                    infos = archive.infolist()
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}.") from error
        except Exception as error:  # zipfile raises a dozen kinds on broken archives
            raise ValueError(f"{path} is not a torch checkpoint, or is truncated ({error}).") from error
        self._places: dict[str, tuple[int, int, int]] = {}
        for info in infos:
            self._add(info)
        self.content = self._parse()

    def __repr__(self) -> str:
        return str(self.path)

    def _fault(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}.")

    def _add(self, info: zipfile.ZipInfo) -> None:
        """Note where a record's data begins, its size and CRC, by its name without the archive's own folder."""
        _, _, name = info.filename.partition("/")
        head = self._map[info.header_offset : info.header_offset + 30]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise self._fault(f"record {name[:80]!r} is compressed or encrypted, which torch never does")
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise self._fault(f"record {name[:80]!r} is not where the index says")
        begin = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if begin + info.file_size > len(self._map):
            raise self._fault(f"record {name[:80]!r} runs past the end of the file: it is truncated")
        if name in self._places:
            raise self._fault(f"record {name[:80]!r} is there twice")
        self._places[name] = (begin, info.file_size, info.CRC)

    def _record(self, name: str, limit: int) -> bytes:
        if name not in self._places:
            raise self._fault(f"it has no record {name}")
        begin, size, crc = self._places[name]
        if size > limit:
            raise self._fault(f"record {name} of {size} bytes is larger than any real one")
        data = self._map[begin : begin + size]
        if zlib.crc32(data) != crc:
            raise self._fault(f"record {name} has a wrong checksum: the file is damaged")
        return data

    def _parse(self) -> Any:
        if "byteorder" in self._places and self._record("byteorder", 16) != b"little":
            raise self._fault("it was written on a big-endian machine")
        data = self._record("data.pkl", PICKLE_LIMIT)
        try:
            return parse(data)
        except ValueError as error:
            raise self._fault(str(error)) from error

    def read(self, tensor: Stored, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor: 1-D, a view of the mapped file."""
        assert 0 <= start <= stop <= tensor.numel
        begin, size, crc = self._place(tensor.storage)
        if start == stop:
            return torch.empty(0, dtype=tensor.storage.dtype)
        item = tensor.storage.dtype.itemsize
        first, last = begin + (tensor.offset + start) * item, begin + (tensor.offset + stop) * item
        if self.blocks is not None:
            self._check_blocks(first, last, self.blocks)
        elif last - first == size and zlib.crc32(memoryview(self._map)[first:last]) != crc:
            raise self._fault(f"record data/{tensor.storage.key} has a wrong checksum: the file is damaged")
        return torch.frombuffer(self._map, dtype=tensor.storage.dtype, count=stop - start, offset=first)

    def value(self, tensor: Stored) -> torch.Tensor:
        """The whole tensor, a copy."""
        return self.read(tensor, 0, tensor.numel).view(tensor.shape).clone()

    def _place(self, storage: Storage) -> tuple[int, int, int]:
        place = self._places.get(f"data/{storage.key}")
        if place is None or place[1] != storage.numel * storage.dtype.itemsize:
            found = "nothing" if place is None else f"{place[1]} bytes"
            raise self._fault(f"storage {storage.key} should hold {storage.numel} elements of {storage.dtype}, the file has {found}")
        return place

    def _check_blocks(self, first: int, last: int, blocks: list[int]) -> None:
        for index in range(first // BLOCK, -(-last // BLOCK)):
            if index not in self._checked:
                if index >= len(blocks) or zlib.crc32(memoryview(self._map)[index * BLOCK : (index + 1) * BLOCK]) != blocks[index]:
                    raise self._fault(f"bytes [{index * BLOCK}, {(index + 1) * BLOCK}) differ from checksums.json: the file is damaged")
                self._checked.add(index)

    def release(self) -> None:
        """Give back the mapped pages; views of them stay valid and are read again when used."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def check_all(self) -> None:
        """Compare every record with its own checksum, and every block with checksums.json."""
        for name, (begin, size, crc) in self._places.items():
            if zlib.crc32(memoryview(self._map)[begin : begin + size]) != crc:
                raise self._fault(f"record {name} has a wrong checksum: the file is damaged")
        if self.blocks is not None:
            self._check_blocks(0, len(self._map), self.blocks)


@final
class ChecksummedFile:
    """A new file, written from beginning to end, and the CRC-32 of every BLOCK of what was to be written, taken as it goes by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._blocks: list[int] = []
        self._crc = self._size = 0

    def write(self, data: Any) -> int:
        """All of `data` (bytes or a buffer). OSError where the disk says no."""
        view = memoryview(data).cast("B")
        for start in range(-(self._size % BLOCK), len(view), BLOCK):  # by block, so that one pass over memory serves both
            piece = view[max(start, 0) : start + BLOCK]
            self._crc = zlib.crc32(piece, self._crc)
            self._size += len(piece)
            if self._size % BLOCK == 0:
                self._blocks.append(self._crc)
                self._crc = 0
            while piece:
                piece = piece[self._file.write(piece) :]
        return len(view)

    def flush(self) -> None:
        """Nothing waits in this process."""

    def close(self) -> dict[str, Any]:
        """Make it survive a power cut; {"size": bytes, "crc32": [one per BLOCK bytes]}."""
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "crc32": self._blocks + ([self._crc] if self._size % BLOCK else [])}

    def abandon(self) -> None:
        """Let go of it after an error."""
        self._file.close()


def write_archive(path: Path, content: Any) -> dict[str, Any]:
    """`torch.save` (of `bytes`: as they are) and fsync; the file's checksums. OSError where the disk says no: through a Python file,
    torch passes its errors on as they are."""
    file = ChecksummedFile(path)
    try:
        file.write(content) if isinstance(content, bytes) else torch.save(content, typing.cast(Any, file))
        return file.close()
    except RuntimeError as error:  # after a write that failed torch still ends the archive, and complains of its length instead
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        file.abandon()
