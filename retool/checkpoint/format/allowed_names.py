"""The classes and functions that a checkpoint's pickle may name. Names are compared as a whole and
stay names: nothing is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retool.files.untrusted import shown

STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
DTYPES = {f"torch {str(dtype).removeprefix('torch.')}" for dtype in STORAGES.values()}
# State of a sharding description, under the names that torch 2.4 to 2.14 give it: kept as inert
# records. Whole names are compared.
DTENSORS = {
    f"{module} DTensor"
    for module in (
        "torch.distributed.tensor",
        "torch.distributed.tensor._api",
        "torch.distributed._tensor",
        "torch.distributed._tensor.api",
    )
}
SPECS = {
    f"{module} {name}"
    for module in (
        "torch.distributed.tensor._dtensor_spec",
        "torch.distributed._tensor.placement_types",
    )
    for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
}
PLACEMENTS = {
    f"{module} {name}"
    for module in (
        "torch.distributed.tensor.placement_types",
        "torch.distributed._tensor.placement_types",
    )
    for name in ("Shard", "Replicate", "Partial", "_StridedShard", "_StridedShardOffsetMode")
}
MESHES = {
    "torch.distributed.device_mesh DeviceMesh",
    "torch.distributed._tensor.device_mesh DeviceMesh",
    "torch.distributed._mesh_layout _MeshLayout",
    "torch.distributed._mesh_layout _FlatLayout",
}
INERT = DTENSORS | SPECS | PLACEMENTS | MESHES
FUNCTIONS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_wrapper_subclass",
}
NAMES = INERT | FUNCTIONS | DTYPES | STORAGES.keys()


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names. Never looked up."""

    name: str


class Refused(ValueError):
    """The stream is well-formed, but asks for something that we don't do."""


def name_of(name: str) -> Name:
    """A name that the pickle may mention. Refused for all others."""
    if name in NAMES:
        return Name(name)
    named = shown(name.replace(" ", "."))
    raise Refused(
        f"refused: it names {named}, and only tensors and their sharding are read. Don't load it with "
        "another tool either"
    )
