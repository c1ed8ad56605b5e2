"""Variables as bytes, and back. Executes inside the cell.

Each is a record of its own, so that one that can't be had costs no other. All are in one stream, so
that what they share stays shared.

[Note: memo] A pickle refers to what it has written before by a number. One pickler writes all
records, so a record may refer to an earlier one. Where a record can't be read, what it has numbered
is forgotten, unless it can't be half made. A later record that refers to it can't be read either,
and doesn't get half an object.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

from . import reductions

# A name, where its record begins, how many objects were written before it
Entry = tuple[str, int, int]
SHARES = "it shares something with what can't be restored"


class Stored(NamedTuple):
    """Variables: their records in the stream; or, by their names, the modules that they are from."""

    stream: bytes
    entries: list[Entry]
    imported: dict[str, str]


class Bounded(io.BytesIO):
    """Takes `MOST_BYTES` from `begin` on, and no more."""

    begin = 0

    def write(self, data: Any, /) -> int:
        if self.tell() - self.begin + len(data) > reductions.MOST_BYTES:
            raise reductions.TooLarge
        return super().write(data)


def dump(variables: Mapping[str, Any], folder: str, room: int) -> tuple[Stored, dict[str, str]]:
    """The variables, in a stream of `room` bytes at most, and what had to be left out: name → what
    it is. Where there is too little room the largest go first.

    What is from a module, unless that lies in `folder`, is imported again.
    """
    imported = _imported(variables, folder)
    wanted = {name: value for name, value in variables.items() if name not in imported}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dill's, which the program's reader would see
        stream, entries, left_out = _dump(wanted, room)
    return Stored(stream, entries, imported), left_out


def _imported(variables: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Those that a module has by the same name: sympy's, after an import of all of it, are 900, and
    not all of them can be written.
    """
    modules = [
        (name, vars(module))
        for name, module in list(sys.modules.items())
        if name not in ("__main__", "builtins")  # which has what was shown last
        and isinstance(module, ModuleType)
        and getattr(module, "__spec__", None) is not None  # it can be imported
        and not str(getattr(module, "__file__", "")).startswith(folder)
    ]
    found: dict[str, str] = {}
    for name, value in variables.items():
        if type(value) in reductions.PLAIN or isinstance(value, ModuleType):
            continue
        for place, (module, content) in enumerate(modules):
            if content.get(name) is value:
                found[name] = module
                # The next one is likely from there, too
                modules.insert(0, modules.pop(place))
                break
    return found


def _dump(wanted: dict[str, Any], room: int) -> tuple[bytes, list[Entry], dict[str, str]]:
    left_out: dict[str, str] = {}
    while True:
        stream, entries, failed = _write(wanted)
        if failed:
            found = _troubles(wanted)
            # It may fail only beside others
            found = found or {failed: _kind(wanted[failed])}
        elif len(stream) <= room:
            return stream, entries, left_out
        else:
            found = _largest(wanted, stream, entries, room)
        for name in found:
            del wanted[name]
        left_out.update(found)


def _largest(
    wanted: Mapping[str, Any], stream: bytes, entries: Sequence[Entry], room: int
) -> dict[str, str]:
    """So many of the largest that the others have room."""
    sizes: dict[str, int] = {}
    end = len(stream)
    for name, begin, _ in reversed(entries):
        sizes[name] = end - begin
        end = begin
    over = len(stream) - room
    found: dict[str, str] = {}
    for name in largest_first(sizes):
        if over <= 0:
            break
        over -= sizes[name]
        kind = _kind(wanted[name])
        found[name] = f"{kind}, {megabytes(sizes[name])}"
    return found


def largest_first(sizes: Mapping[str, int]) -> list[str]:
    """The names, by their bytes."""
    return sorted(sizes, key=lambda name: sizes[name], reverse=True)


def megabytes(count: int) -> str:
    """Bytes, as a user reads them."""
    return f"{count / (1 << 20):.0f} MB"


def _kind(value: Any) -> str:
    return type(value).__name__


def _write(variables: Mapping[str, Any]) -> tuple[bytes, list[Entry], str]:
    """The last is the first variable that can't be written, or ""."""
    target = Bounded()
    pickler = reductions.make_pickler(target, variables)
    entries: list[Entry] = []
    for name, value in variables.items():
        target.begin = target.tell()
        known = len(pickler.memo)
        entries.append((name, target.begin, known))
        try:
            pickler.dump(value)
        except BaseException:  # whatever the program's own objects raise
            return b"", [], name
    return target.getvalue(), entries, ""


def _troubles(variables: Mapping[str, Any]) -> dict[str, str]:
    """Those that can't be written each by itself: what they are."""
    most = megabytes(reductions.MOST_BYTES)
    found: dict[str, str] = {}
    for name, value in variables.items():
        target = Bounded()
        pickler = reductions.make_pickler(target, {name: value})
        try:
            pickler.dump(value)
        except reductions.TooLarge:
            found[name] = f"{_kind(value)}, more than {most}"
        except BaseException:  # whatever the program's own objects raise
            found[name] = _kind(value)
    return found


def _is_whole(value: Any) -> bool:
    """Whether it can't be half made: it is plain, or was imported."""
    if type(value) in reductions.PLAIN:
        return True
    kinds = (FunctionType, BuiltinFunctionType, type)
    return isinstance(value, kinds) and value.__module__ != "__main__"


def load(stored: Stored) -> tuple[dict[str, Any], dict[str, str]]:
    """(the variables, why others can't be had)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, broken = _load(stored.stream, stored.entries)
        for name, module in stored.imported.items():
            try:
                found[name] = getattr(importlib.import_module(module), name)
            except BaseException as error:  # whatever the module does
                broken[name] = f"{_kind(error)}: {error}"
    return found, broken


def _load(stream: bytes, entries: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, str]]:
    import dill

    unpickler = dill.Unpickler(io.BytesIO(stream))
    try:
        return {name: unpickler.load() for name, _, _ in entries}, {}
    except BaseException:  # whatever the program's own objects raise
        return _load_each(stream, entries)


def _load_each(stream: bytes, entries: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same where something can't be read; slowly, by an unpickler that can forget."""
    source = io.BytesIO(stream)
    make: Any = pickle._Unpickler  # type: ignore[attr-defined]
    unpickler = make(source)
    found: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for name, begin, known in entries:
        source.seek(begin)
        try:
            found[name] = unpickler.load()
        except BaseException as error:
            shares = isinstance(error, pickle.UnpicklingError) and "Memo" in str(error)
            broken[name] = SHARES if shares else f"{_kind(error)}: {error}"
            half_made = [
                number
                for number, value in unpickler.memo.items()
                if number >= known and not _is_whole(value)
            ]
            for number in half_made:
                del unpickler.memo[number]
    return found, broken
