"""Objects that dill can't write, or restores as something else.

Executes inside the cell.
"""

from __future__ import annotations

import enum
import io
import os
import pickle
import subprocess
import sys
import threading
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

PROTOCOL = 3  # it numbers what it has written: `variables`, [Note: memo]
PLAIN = frozenset([bool, int, float, complex, str, bytes, type(None)])
PLAIN_LENGTH = 64  # of a container, from which on it is written at once
MOST_BYTES = 64 << 20  # of one object: more has no room anyway
FILES = (
    io.TextIOWrapper,
    io.BufferedReader,
    io.BufferedWriter,
    io.BufferedRandom,
    io.FileIO,
)
STREAMS = ("__stdin__", "__stdout__", "__stderr__")
NOT_OF_ENUMS = (
    "__new__",
    "__dict__",
    "__weakref__",
    "__module__",
    "__doc__",
    "__members__",
)

# As of `object.__reduce__`; NotImplemented leaves an object to dill
Reduced = Any


class TooLarge(Exception):
    """An object has more bytes than any session keeps."""


def make_pickler(target: io.BytesIO, variables: Mapping[str, Any]) -> Any:
    """dill's, that writes some things otherwise. `variables` are all that will be written."""
    import dill

    shared = _shared_arrays(variables.values())

    class Pickler(dill.Pickler):
        def reducer_override(self, value: Any) -> Reduced:
            kind = type(value)
            if kind in (list, tuple, set, frozenset, dict):
                return _plain(value)
            if kind in (str, bytes, bytearray) and len(value) > MOST_BYTES:
                raise TooLarge
            if isinstance(value, enum.EnumMeta):
                return _enum_parts(value)
            if isinstance(value, typing.TypeVar):
                return _type_var_parts(value)
            if isinstance(value, io.IOBase):
                return _file_parts(value)
            if kind.__name__ == "ndarray" and kind.__module__ == "numpy":
                return _array_parts(value, shared)
            if _runs(value):
                raise TypeError("it runs in this program's process")
            return NotImplemented

    return Pickler(target, PROTOCOL)


def _plain(value: Any) -> Reduced:
    """A long container of plain values.

    Python's own pickler is 40 times as fast as dill's.
    """
    if len(value) > MOST_BYTES:
        raise TooLarge
    if len(value) < PLAIN_LENGTH:
        return NotImplemented
    parts = [value]
    if isinstance(value, dict):
        parts = [value.keys(), value.values()]
    if not all(map(_all_plain, parts)):
        return NotImplemented
    content = pickle.dumps(value)
    return pickle.loads, (content,)


def _all_plain(values: Iterable[Any]) -> bool:
    """Whether they are plain, or tuples of what is: these don't change, so they may be copied."""
    kinds = set(map(type, values))
    if kinds <= PLAIN:
        return True
    if not kinds <= PLAIN | {tuple}:
        return False
    tuples = (value for value in values if type(value) is tuple)
    return PLAIN.issuperset(map(type, chain.from_iterable(tuples)))


def _runs(value: Any) -> bool:
    """Whether it stands for what ends with this program."""
    if isinstance(value, threading.Thread):
        return value.is_alive()
    return isinstance(value, subprocess.Popen) and value.returncode is None


# --- arrays ---


def _shared_arrays(values: Iterable[Any]) -> set[int]:
    """Arrays whose memory several variables have, by their ids."""
    owners = [id(_owner(value)) for value in values if type(value).__name__ == "ndarray"]
    return {owner for owner, count in Counter(owners).items() if count > 1}


def _owner(array: Any) -> Any:
    base = getattr(array, "base", None)
    return base if type(base) is type(array) else array


def _array_parts(array: Any, shared: set[int]) -> Reduced:
    """What is written into one of those that share their memory is in all of them."""
    if array.nbytes > MOST_BYTES:
        raise TooLarge
    owner = _owner(array)
    if owner is array or id(owner) not in shared:
        return NotImplemented
    if owner.dtype.hasobject or not owner.flags.c_contiguous:
        return NotImplemented
    offset = _address(array) - _address(owner)
    return _view, (owner, array.shape, array.dtype, offset, array.strides)


def _address(array: Any) -> int:
    return array.__array_interface__["data"][0]


def _view(owner: Any, shape: Any, dtype: Any, offset: int, strides: Any) -> Any:
    return type(owner)(shape, dtype, owner, offset, strides)


# --- files ---


def _file_parts(file: Any) -> Reduced:
    """By its name and where it stands.

    What was written before stays, and what was read isn't read again.
    """
    for name in STREAMS:
        if file is getattr(sys, name):
            return getattr, (sys, name)
    if not isinstance(file, FILES) or not isinstance(file.name, str):
        return NotImplemented
    encoding = getattr(file, "encoding", None)
    if file.closed:
        return _closed, (file.mode, encoding)
    if file.writable():
        file.flush()
    there = os.stat(file.name)
    if not os.path.samestat(there, os.fstat(file.fileno())):
        raise ValueError(f"{file.name} is another file by now")
    # The next program begins in the same folder
    name = os.path.relpath(file.name)
    return _opened, (name, file.mode, encoding, file.tell())


def _closed(mode: str, encoding: str | None) -> Any:
    with open(os.devnull, mode.replace("x", "w"), encoding=encoding) as file:
        return file


def _opened(name: str, mode: str, encoding: str | None, position: int) -> Any:
    reads = mode.replace("w", "r").replace("x", "r")
    changes = "" if reads == mode or "+" in mode else "+"
    file = open(name, f"{reads}{changes}", encoding=encoding)  # noqa: SIM115
    file.seek(position)
    return file


# --- classes ---


def _type_var_parts(variable: Any) -> Reduced:
    module = variable.__module__
    there = getattr(sys.modules.get(module), variable.__name__, None)
    if there is variable and module != "__main__":
        return NotImplemented
    about = {
        "bound": variable.__bound__,
        "covariant": variable.__covariant__,
        "contravariant": variable.__contravariant__,
    }
    return _type_var, (variable.__name__, variable.__constraints__, about)


def _type_var(name: str, constraints: tuple[Any, ...], about: Mapping[str, Any]) -> Any:
    make: Any = typing.TypeVar
    return make(name, *constraints, **about)


def _enum_parts(kind: Any) -> Reduced:
    """Its values; and what else the class says, set afterwards, since that may name the class."""
    if kind.__module__ != "__main__":
        return NotImplemented
    values = {}
    of_members = {}
    for name, member in kind.__members__.items():
        values[name] = member.value
        of_members[name] = _own(member)
    attributes = {
        name: value
        for name, value in vars(kind).items()
        if name not in values and name not in NOT_OF_ENUMS and not _is_enums(name)
    }
    made_of = (type(kind), kind.__name__, kind.__bases__, values)
    state = (attributes, of_members)
    return _enum, made_of, state, None, None, _finish_enum


def _is_enums(name: str) -> bool:
    """Whether it is a name like `_member_map_`, which the class makes itself."""
    if name.startswith("__") or name == "_missing_":
        return False
    return name.startswith("_") and name.endswith("_")


def _own(member: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(member).items() if not name.startswith("_")}


def _enum(meta: Any, name: str, bases: tuple[type, ...], values: Mapping[str, Any]) -> Any:
    body = meta.__prepare__(name, bases)
    body["__module__"] = "__main__"
    for key, value in values.items():
        body[key] = value
    return meta(name, bases, body)


def _finish_enum(kind: Any, state: Any) -> None:
    attributes, of_members = state
    for name, value in attributes.items():
        setattr(kind, name, value)
    for name, own in of_members.items():
        kind.__members__[name].__dict__.update(own)
