"""A pickle reader that executes nothing: it understands what torch writes for tensors and DTensors, and refuses the rest.

Checkpoints are untrusted input, and pickles of DTensors name torch-internal classes that come and go between releases. So no
class is ever looked up: a GLOBAL is only a name. Names of tensor storage, placements and meshes become inert records, out of
which tensors' places in the file and their sharding are read; every other name ends the reading with a ValueError.
"""

from __future__ import annotations

import pickletools
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
        "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip
DTYPES = {f"torch {str(dtype).removeprefix('torch.')}" for dtype in STORAGES.values()}
# Everything below these is state of a sharding description: kept as inert records, whatever the release calls it.
INERT_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed.device_mesh", "torch.distributed._mesh_layout")
FUNCTIONS = {
    "collections OrderedDict", "torch Size", "torch device", "torch.serialization _get_layout", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_wrapper_subclass",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LIMIT = 1 << 40  # elements of one tensor: more is a lie


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names. Never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """An instance of an inert class: its name, constructor arguments and attributes."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)

    def get(self, *names: str) -> Any:
        """The first of these attributes that is there."""
        return next((self.state[n] for n in names if n in self.state), None)


@dataclass(frozen=True)
class Storage:
    """A storage in the file: record `key`, `numel` elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in the file, `offset` elements into its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Sharded:
    """One rank's part of a DTensor. `placements` holds a dimension for Shard(dim) and None for Replicate()."""

    local: Stored
    shape: tuple[int, ...]
    placements: tuple[int | None, ...]
    mesh_shape: tuple[int, ...] | None
    mesh_names: tuple[str, ...] | None


def parse(data: bytes) -> Any:
    """The object that a pickle describes, tensors as `Stored` and `Sharded`. ValueError for anything else than data."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except _Refused:
        raise
    except Exception as error:  # a broken stream can break the machine anywhere; what matters is that it is broken
        raise ValueError(f"broken pickle: {type(error).__name__}: {error}") from error
    raise ValueError("broken pickle: it has no end")


class _Refused(ValueError):
    """The stream is well-formed, but asks for something that we don't do."""


class _Machine:
    """The stack machine for the opcodes that torch writes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def step(self, op: str, argument: Any) -> None:
        if op in LITERALS:
            self.stack.append(argument)
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op in TUPLES:
            count = TUPLES[op]
            items = tuple(self.pop() for _ in range(count))[::-1]
            self.stack.append(items)
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif op not in ("PROTO", "FRAME"):
            self._compose(op, argument)

    def _compose(self, op: str, argument: Any) -> None:
        match op:
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if op == "APPEND" else self.pop_mark()
                _expect(list, self.stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_mark() if op == "SETITEMS" else [self.pop() for _ in range(2)][::-1]
                _expect(dict, self.stack[-1]).update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                self.stack.append(_name(argument))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.stack.append(_name(f"{module} {name}"))
            case "BINPERSID":
                self.stack.append(_storage(self.pop()))
            case "REDUCE":
                args, function = self.pop(), self.pop()
                self.stack.append(_call(_expect(Name, function).name, _expect(tuple, args)))
            case "NEWOBJ":
                args, cls = self.pop(), self.pop()
                self.stack.append(_instance(_expect(Name, cls).name, _expect(tuple, args)))
            case "BUILD":
                state, target = self.pop(), self.stack[-1]
                if isinstance(target, Record):
                    target.state.update(_expect(dict, state))
                else:
                    _expect(dict, target)  # an OrderedDict's attributes (torch's _metadata): nothing that we need
            case _:
                raise _Refused(f"refused pickle opcode {op}: torch writes no such thing for tensors")


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _key(value: Any) -> Hashable:
    """Only plain keys: hashing nested tuples can take exponential time."""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"a dict key of type {type(value).__name__}")
    return value


def _name(name: str) -> Name:
    if name in STORAGES or name in DTYPES or name in FUNCTIONS or name.split(" ")[0].startswith(INERT_MODULES):
        return Name(name)
    shown = name.replace(" ", ".")[:200]
    raise _Refused(f"refused: it names {shown}, and only tensors and their sharding are read. Don't load it with another tool either")


def _storage(pid: Any) -> Storage:
    kind, cls, key, _location, numel = _expect(tuple, pid)
    if kind != "storage" or not isinstance(key, str) or not key.isascii() or not key.isdigit():
        raise ValueError("not a tensor storage")
    return Storage(key, STORAGES[_expect(Name, cls).name], _size(numel))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise ValueError("not a size")
    return value


def _call(name: str, args: tuple[Any, ...]) -> Any:
    match name:
        case "collections OrderedDict":
            return dict(_expect(list, args[0]) if args else ())
        case "torch Size":
            return tuple(args[0])
        case "torch device" | "torch.serialization _get_layout":
            return None
        case "torch._utils _rebuild_tensor_v2":
            return _stored(*args[:4])
        case "torch._utils _rebuild_parameter":
            return args[0]
        case "torch._tensor _rebuild_from_type_v2":
            return _sharded(args)
    return _instance(name, args)


def _instance(name: str, args: tuple[Any, ...]) -> Record:
    if not name.split(" ")[0].startswith(INERT_MODULES):
        raise _Refused(f"refused: it calls {name.replace(' ', '.')}")
    return Record(name, args)


def _stored(storage: Any, offset: Any, shape: Any, stride: Any) -> Stored:
    """A tensor's place, after checking that it lies inside its storage and is contiguous."""
    shape, stride = tuple(map(_size, shape)), tuple(map(_size, stride))
    _expect(Storage, storage)
    if _size(offset) + prod(shape) > storage.numel:
        raise ValueError(f"a tensor {list(shape)} at {offset} is larger than its storage of {storage.numel} elements")
    dense = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != dense and prod(shape):
            raise ValueError(f"a tensor {list(shape)} with strides {list(stride)} is not contiguous")
        dense *= size
    return Stored(storage, offset, shape)


def _sharded(args: tuple[Any, ...]) -> Sharded:
    """A DTensor out of `_rebuild_from_type_v2(function, DTensor, arguments, {_local_tensor, _spec})`."""
    _, cls, _, state = args
    if isinstance(state, tuple):  # (attributes, slots), the way of classes with __slots__
        state = {k: v for part in state if part is not None for k, v in _expect(dict, part).items()}
    if not _expect(Name, cls).name.endswith(" DTensor"):
        raise _Refused(f"refused: a tensor of class {cls.name.replace(' ', '.')}")
    spec, local = _expect(Record, state["_spec"]), _expect(Stored, state["_local_tensor"])
    mesh, meta = _expect(Record, spec.get("mesh")), _expect(Record, spec.get("tensor_meta"))
    shape = tuple(map(_size, meta.args[0] if meta.args else meta.state["shape"]))
    names = mesh.get("mesh_dim_names", "_mesh_dim_names")
    names = None if names is None else tuple(_expect(str, n) for n in names)
    return Sharded(local, shape, tuple(map(_placement, spec.state["placements"])), _mesh_shape(mesh), names)


def _placement(record: Any) -> int | None:
    kind = _expect(Record, record).name.split(" ")[1]
    if kind == "Replicate":
        return None
    if kind == "Shard":
        return _size(record.args[0] if record.args else record.state["dim"])
    raise _Refused(f"placement {kind} is not supported: only Shard and Replicate are")


def _mesh_shape(mesh: Record) -> tuple[int, ...] | None:
    """The mesh's shape, in the spellings of torch 2.8 (a tensor of ranks) and later (a layout); None if in another one."""
    ranks, layout = mesh.get("mesh", "_mesh"), mesh.get("_layout")
    if isinstance(ranks, Stored):
        return ranks.shape
    if not isinstance(layout, Record):
        return None
    axes = layout.get("axes")
    if axes is not None:
        return tuple(prod(_flatten(_expect(Record, axis).state["shape"])) for axis in axes)
    shape = layout.get("shape") if layout.state else layout.args[0]
    return None if shape is None else tuple(prod(_flatten(n)) for n in (shape if isinstance(shape, tuple) else (shape,)))


def _flatten(sizes: Any) -> tuple[int, ...]:
    return tuple(n for s in sizes for n in _flatten(s)) if isinstance(sizes, tuple) else (_size(sizes),)
