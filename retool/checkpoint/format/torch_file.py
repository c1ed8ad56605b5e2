"""A file of `torch.save`, memory-mapped: the object without its tensors' data, and any range of a
tensor's elements.

Such a file is a zip of uncompressed records. Everything a record claims is compared with the file
before it is used: sizes, compression, position, and the checksum of what is read.
"""

from __future__ import annotations

import io
import mmap
import typing
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.format.checksums import BLOCK
from retool.checkpoint.format.stored_tensors import Storage, StoredTensor
from retool.checkpoint.format.unpickle import parse
from retool.files.untrusted import open_regular, shown

PICKLE_LIMIT = 256 << 20
INDEX_LIMIT = 64 << 20  # bytes of the list of records: of real files some 100 a tensor
# times the file's bytes that its tensors may take: tied weights are the same bytes twice.
MOST_SHARING = 4
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name
READ_AT_ONCE = 64 << 20  # bytes of the mapped file that checking a checksum keeps in memory
WAY_OUT = (
    "Copy the file again from where it was written, or take an older checkpoint (python -m "
    "retool.checkpoint ls RUN lists them)."
)


class TorchFile:
    """`content` is what was saved, tensors as `StoredTensor` or `StoredShard`.

    ValueError, with the file's name, for anything wrong.

    With `blocks` (the file's CRC-32 per BLOCK bytes, from checksums.json) each block is checked
    when first read, so that reading a part needs no more than that part. Without, a record is
    compared with its own checksum when some of it is first read.
    """

    def __init__(self, path: Path, blocks: list[int] | None = None) -> None:
        self.path = path
        self.blocks = blocks
        self._checked_blocks: set[int] = set()
        self._checked_records: set[str] = set()
        try:
            with open_regular(path) as file:
                self._map = mapped(file)
                with zipfile.ZipFile(_Bounded(file)) as archive:
                    infos = archive.infolist()
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}.") from error
        except Exception as error:  # zipfile raises a dozen kinds on broken archives
            raise ValueError(
                f"{path} is not a torch checkpoint, or is truncated ({shown(str(error))}). {WAY_OUT}"
            ) from error
        self._places: dict[str, tuple[int, int, int]] = {}
        for info in infos:
            self._add(info)
        self._require_records_apart()
        self.content = self._parse()

    def __repr__(self) -> str:
        return str(self.path)

    def _fault(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}. {WAY_OUT}")

    def _add(self, info: zipfile.ZipInfo) -> None:
        """Note where a record's data begins, its size and CRC, by its name without the archive's
        own folder.
        """
        _, _, name = info.filename.partition("/")
        packed = info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
        encrypted = info.flag_bits & 1
        if packed or encrypted:
            raise self._fault(
                f"record {shown(name)} is compressed or encrypted, which torch never does"
            )
        # Each record has a header of its own before its data, with lengths of its own.
        head = self._map[info.header_offset : info.header_offset + LOCAL_HEADER_BYTES]
        if len(head) < LOCAL_HEADER_BYTES or head[:4] != b"PK\x03\x04":
            raise self._fault(f"record {shown(name)} is not where the index says")
        name_bytes = int.from_bytes(head[26:28], "little")
        extra_bytes = int.from_bytes(head[28:30], "little")
        begin = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if begin + info.file_size > len(self._map):
            raise self._fault(
                f"record {shown(name)} runs past the end of the file: it is truncated"
            )
        if name in self._places:
            raise self._fault(f"record {shown(name)} is there twice")
        self._places[name] = (begin, info.file_size, info.CRC)

    def _require_records_apart(self) -> None:
        """ValueError if records overlap: a thousand records in the same bytes would be a thousand
        times the work.
        """
        end = 0
        for begin, size, _ in sorted(self._places.values()):
            if begin < end:
                raise self._fault("two of its records overlap")
            end = begin + size

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
            return parse(data, len(self._places))
        except ValueError as error:
            raise self._fault(str(error)) from error

    def read(self, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor: 1-D, a view of the mapped file."""
        assert 0 <= start <= stop <= tensor.numel
        begin = self._place(tensor.storage)
        # `frombuffer` refuses to give nothing
        if start == stop:
            return torch.empty(0, dtype=tensor.storage.dtype)
        item = tensor.storage.dtype.itemsize
        first = begin + (tensor.offset + start) * item
        last = begin + (tensor.offset + stop) * item
        if self.blocks is not None:
            self._check_blocks(first, last, self.blocks)
        else:
            self._check_record(f"data/{tensor.storage.key}")
        return torch.frombuffer(
            self._map, dtype=tensor.storage.dtype, count=stop - start, offset=first
        )

    def value(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor, a copy."""
        return self.read(tensor, 0, tensor.numel).view(tensor.shape).clone()

    def checksum(self, tensor: StoredTensor) -> int:
        """The checksum that the file gives for a tensor's storage."""
        self._place(tensor.storage)
        return self._places[f"data/{tensor.storage.key}"][2]

    def require_shared_as_ties_are(self, tensors: list[StoredTensor]) -> None:
        """ValueError if tensors take many times the bytes that the file has: a few megabytes can
        claim to be thousands of tensors.
        """
        claimed = sum(tensor.numel * tensor.storage.dtype.itemsize for tensor in tensors)
        if claimed > MOST_SHARING * len(self._map):
            raise self._fault(
                f"its tensors claim {claimed} bytes, all of them in a file of {len(self._map)}"
            )

    def _place(self, storage: Storage) -> int:
        """Where a storage's bytes begin, after comparing its size with the record's."""
        place = self._places.get(f"data/{storage.key}")
        if place is None or place[1] != storage.numel * storage.dtype.itemsize:
            found = "nothing" if place is None else f"{place[1]} bytes"
            raise self._fault(
                f"storage {storage.key} should hold {storage.numel} elements of {storage.dtype}, "
                f"the file has {found}"
            )
        return place[0]

    def _check_blocks(self, first: int, last: int, blocks: list[int]) -> None:
        for index in range(first // BLOCK, -(-last // BLOCK)):
            if index in self._checked_blocks:
                continue
            begin = index * BLOCK
            end = begin + BLOCK
            known = index < len(blocks)
            if not known or zlib.crc32(memoryview(self._map)[begin:end]) != blocks[index]:
                raise self._fault(
                    f"bytes [{begin}, {end}) differ from checksums.json: the file is damaged"
                )
            self._checked_blocks.add(index)

    def _check_record(self, name: str) -> None:
        if name in self._checked_records:
            return
        begin, size, expected = self._places[name]
        crc = 0
        for start in range(begin, begin + size, READ_AT_ONCE):
            end = min(start + READ_AT_ONCE, begin + size)
            crc = zlib.crc32(memoryview(self._map)[start:end], crc)
            if end - start == READ_AT_ONCE:
                # What was only summed up need not stay in memory
                self.release()
        if crc != expected:
            raise self._fault(f"record {shown(name)} has a wrong checksum: the file is damaged")
        self._checked_records.add(name)

    def release(self) -> None:
        """Give back the mapped pages; views of them stay valid and are read again when used."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def check_all(self) -> None:
        """Compare every record with its own checksum, and every block with checksums.json."""
        for name in self._places:
            self._check_record(name)
        if self.blocks is not None:
            self._check_blocks(0, len(self._map), self.blocks)


class _Bounded(io.BufferedReader):
    """A file from which no more is read at once than an archive's index may take, whatever the
    archive says about its length.
    """

    def __init__(self, file: typing.BinaryIO) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > INDEX_LIMIT:
            raise ValueError(f"its index of {size} bytes is larger than any real one")
        return super().read(size)


def mapped(file: typing.BinaryIO) -> mmap.mmap:
    """A file in memory, read page by page when used. A copy of a page is made where it is written,
    which nobody does: torch warns of buffers that it could not write to. NORESERVE, as a file may
    be larger than the memory that all copies would take.
    """
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
