"""What a pickle may describe: tensors in the file, how they are sharded, and nothing else.

Everything has a bound, checked before there is work to do: a few hundred bytes of pickle can
otherwise ask for hours or terabytes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from retool.checkpoint.format.allowed_names import DTENSORS, INERT, STORAGES, Name, Refused

MOST_ELEMENTS = 1 << 40  # of one tensor: more is a lie
MOST_DIMENSIONS = 64  # of a tensor or a mesh, as in torch
MOST_DIGITS = 9  # of a record's number
MOST_KEY = 1 << 31  # a parameter's index; of larger numbers many can be made to collide


@dataclass(eq=False)
class Record:
    """An instance of an inert class: its name, constructor arguments and attributes."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)

    def get(self, *names: str) -> Any:
        """The first of these attributes that the instance has."""
        return next((self.state[n] for n in names if n in self.state), None)


class Attributed(dict[Any, Any]):
    """An OrderedDict with the attributes that were set on it: torch's `_metadata`, or the step that
    our model files tell.
    """

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.attributes: dict[Any, Any] = {}


@dataclass(frozen=True)
class Storage:
    """A storage in the file: record `key`, `numel` elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in the file, `offset` elements into its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class StoredShard:
    """One rank's part of a DTensor.

    `placements` holds a dimension for Shard(dim) and None for Replicate().
    """

    local: StoredTensor
    shape: tuple[int, ...]
    placements: tuple[int | None, ...]
    mesh_shape: tuple[int, ...] | None


def expect(kind: type, value: Any) -> Any:
    """`value`, if it is a `kind`; else ValueError."""
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def key_of(value: Any) -> Hashable:
    """A key of a dict. Only plain ones: hashing nested tuples can take exponential time."""
    if isinstance(value, int) and not -MOST_KEY <= value < MOST_KEY:
        raise ValueError("a dict key that is no parameter's index")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"a dict key of type {type(value).__name__}")
    return value


def storage_of(pid: Any) -> Storage:
    """A storage from torch's persistent id."""
    kind, cls, key, _location, numel = expect(tuple, pid)
    if (
        kind != "storage"
        or not isinstance(key, str)
        or not key.isascii()
        or not key.isdigit()
        or len(key) > MOST_DIGITS
    ):
        raise ValueError("not a tensor storage")
    name = expect(Name, cls).name
    if name not in STORAGES:
        raise ValueError(f"a storage of class {name}")
    return Storage(key, STORAGES[name], _size(numel))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_ELEMENTS:
        raise ValueError("not a size")
    return value


def _few(value: Any) -> tuple[Any, ...]:
    """The items of a short tuple or list: one for each dimension of a tensor or a mesh."""
    if not isinstance(value, (tuple, list)) or len(value) > MOST_DIMENSIONS:
        raise ValueError(f"expected a tuple of at most {MOST_DIMENSIONS} items")
    return tuple(value)


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(map(_size, _few(value)))


def call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call of `name` would describe. The caller bounds how much there is in `args`."""
    match name:
        case "collections OrderedDict":
            pairs = map(_few, expect(list, args[0]) if args else ())
            return Attributed((key_of(key), value) for key, value in pairs)
        case "torch Size":
            return _sizes(args[0])
        case "torch device" | "torch.serialization _get_layout":
            return None
        case "torch._utils _rebuild_tensor_v2":
            return _stored(*args[:4])
        case "torch._utils _rebuild_parameter":
            return args[0]
        case "torch._tensor _rebuild_from_type_v2":
            return _sharded(args)
    return instance(name, args)


def instance(name: str, args: tuple[Any, ...]) -> Record:
    """An instance of `name`, inert."""
    if name not in INERT:
        raise Refused(f"refused: it calls {name.replace(' ', '.')}")
    return Record(name, args)


def _stored(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """A tensor's place, after checking that it lies inside its storage and is contiguous."""
    shape = _sizes(shape)
    stride = _sizes(stride)
    expect(Storage, storage)
    if _size(offset) + prod(shape) > storage.numel:
        raise ValueError(
            f"a tensor {list(shape)} at {offset} is larger than its storage of {storage.numel} elements"
        )
    dense = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        # A dimension of size 1 may have any stride, and so may everything in a tensor without
        # elements.
        if size > 1 and step != dense and prod(shape):
            raise ValueError(
                f"a tensor {list(shape)} with strides {list(stride)} is not contiguous"
            )
        dense *= size
    return StoredTensor(storage, offset, shape)


def _sharded(args: tuple[Any, ...]) -> StoredShard:
    """A DTensor out of `_rebuild_from_type_v2(function, DTensor, arguments, {_local_tensor,
    _spec})`.
    """
    _, cls, _, state = args
    # (attributes, slots), the way of classes with __slots__
    parts = state if isinstance(state, tuple) else (state,)
    given = [expect(dict, part) for part in _few(parts) if part is not None]
    if expect(Name, cls).name not in DTENSORS:
        raise Refused(f"refused: a tensor of class {cls.name.replace(' ', '.')}")
    local = expect(
        StoredTensor, next(part["_local_tensor"] for part in given if "_local_tensor" in part)
    )
    spec = expect(Record, next(part["_spec"] for part in given if "_spec" in part))
    mesh = expect(Record, spec.get("mesh"))
    meta = expect(Record, spec.get("tensor_meta"))
    return StoredShard(
        local=local,
        shape=_sizes(meta.args[0] if meta.args else meta.state["shape"]),
        placements=tuple(map(_placement, _few(spec.state["placements"]))),
        mesh_shape=_mesh_shape(mesh),
    )


def _placement(record: Any) -> int | None:
    kind = expect(Record, record).name.split(" ")[1]
    if kind == "Replicate":
        return None
    if kind == "Shard":
        return _size(record.args[0] if record.args else record.state["dim"])
    raise Refused(f"placement {kind} is not supported: only Shard and Replicate are")


def _mesh_shape(mesh: Record) -> tuple[int, ...] | None:
    """The mesh's shape, in the spellings of torch 2.8 (a tensor of ranks) and later (a layout);
    None if in another one.
    """
    ranks = mesh.get("mesh", "_mesh")
    layout = mesh.get("_layout")
    if isinstance(ranks, StoredTensor):
        return ranks.shape
    if not isinstance(layout, Record):
        return None
    axes = layout.get("axes")
    if axes is not None:
        return tuple(prod(_flattened(expect(Record, axis).state["shape"])) for axis in _few(axes))
    shape = layout.get("shape") if layout.state else layout.args[0]
    if shape is None:
        return None
    return tuple(
        prod(_flattened(size)) for size in (_few(shape) if isinstance(shape, tuple) else (shape,))
    )


def _flattened(sizes: Any) -> tuple[int, ...]:
    """Nested tuples of sizes as one.

    Tuples that share their parts could be 2ⁿ sizes on n levels: what is looked at is counted.
    """
    out: list[int] = []
    ahead = [sizes]
    for _ in range(2 * MOST_DIMENSIONS):
        if not ahead:
            return tuple(out)
        item = ahead.pop()
        if isinstance(item, tuple):
            ahead += reversed(_few(item))
        else:
            out.append(_size(item))
    raise ValueError("a mesh of more dimensions than torch has")
