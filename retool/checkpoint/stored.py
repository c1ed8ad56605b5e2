"""What a pickle may describe: tensors in the file, how they are sharded, and nothing else. Names stay names: nothing is looked up."""

from __future__ import annotations

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


class Refused(ValueError):
    """The stream is well-formed, but asks for something that we don't do."""


def expect(kind: type, value: Any) -> Any:
    """`value`, if it is a `kind`. ValueError else."""
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def name_of(name: str) -> Name:
    """A name that the pickle may mention. Refused for all others."""
    if name in STORAGES or name in DTYPES or name in FUNCTIONS or name.split(" ")[0].startswith(INERT_MODULES):
        return Name(name)
    shown = name.replace(" ", ".")[:200]
    raise Refused(f"refused: it names {shown}, and only tensors and their sharding are read. Don't load it with another tool either")


def storage_of(pid: Any) -> Storage:
    """A storage from torch's persistent id."""
    kind, cls, key, _location, numel = expect(tuple, pid)
    if kind != "storage" or not isinstance(key, str) or not key.isascii() or not key.isdigit():
        raise ValueError("not a tensor storage")
    return Storage(key, STORAGES[expect(Name, cls).name], _size(numel))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise ValueError("not a size")
    return value


def call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call of `name` would describe."""
    match name:
        case "collections OrderedDict":
            return dict(expect(list, args[0]) if args else ())
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
    return instance(name, args)


def instance(name: str, args: tuple[Any, ...]) -> Record:
    """An instance of `name`, inert."""
    if not name.split(" ")[0].startswith(INERT_MODULES):
        raise Refused(f"refused: it calls {name.replace(' ', '.')}")
    return Record(name, args)


def _stored(storage: Any, offset: Any, shape: Any, stride: Any) -> Stored:
    """A tensor's place, after checking that it lies inside its storage and is contiguous."""
    shape, stride = tuple(map(_size, shape)), tuple(map(_size, stride))
    expect(Storage, storage)
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
        state = {k: v for part in state if part is not None for k, v in expect(dict, part).items()}
    if not expect(Name, cls).name.endswith(" DTensor"):
        raise Refused(f"refused: a tensor of class {cls.name.replace(' ', '.')}")
    spec, local = expect(Record, state["_spec"]), expect(Stored, state["_local_tensor"])
    mesh, meta = expect(Record, spec.get("mesh")), expect(Record, spec.get("tensor_meta"))
    shape = tuple(map(_size, meta.args[0] if meta.args else meta.state["shape"]))
    names = mesh.get("mesh_dim_names", "_mesh_dim_names")
    names = None if names is None else tuple(expect(str, n) for n in names)
    return Sharded(local, shape, tuple(map(_placement, spec.state["placements"])), _mesh_shape(mesh), names)


def _placement(record: Any) -> int | None:
    kind = expect(Record, record).name.split(" ")[1]
    if kind == "Replicate":
        return None
    if kind == "Shard":
        return _size(record.args[0] if record.args else record.state["dim"])
    raise Refused(f"placement {kind} is not supported: only Shard and Replicate are")


def _mesh_shape(mesh: Record) -> tuple[int, ...] | None:
    """The mesh's shape, in the spellings of torch 2.8 (a tensor of ranks) and later (a layout); None if in another one."""
    ranks, layout = mesh.get("mesh", "_mesh"), mesh.get("_layout")
    if isinstance(ranks, Stored):
        return ranks.shape
    if not isinstance(layout, Record):
        return None
    axes = layout.get("axes")
    if axes is not None:
        return tuple(prod(_flatten(expect(Record, axis).state["shape"])) for axis in axes)
    shape = layout.get("shape") if layout.state else layout.args[0]
    return None if shape is None else tuple(prod(_flatten(n)) for n in (shape if isinstance(shape, tuple) else (shape,)))


def _flatten(sizes: Any) -> tuple[int, ...]:
    return tuple(n for s in sizes for n in _flatten(s)) if isinstance(sizes, tuple) else (_size(sizes),)
