"""DTensors for files: built without a process group or a collective, from a local tensor and the
mesh's shape alone.
"""

from __future__ import annotations

from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def sharded_tensor(
    local: torch.Tensor, shape: tuple[int, ...], replicas: int, shards: int, rank: int
) -> torch.Tensor:
    """The DTensor of global `shape` whose rows on `rank` are `local`: Shard(0) on a mesh ("fsdp",),
    or ("ddp", "fsdp") with replicas.
    """
    placements = (Shard(0),) if replicas == 1 else (Replicate(), Shard(0))
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    mesh = file_mesh(replicas, shards, rank)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def file_mesh(replicas: int, shards: int, rank: int) -> DeviceMesh:
    """A mesh that is only a description: `_init_backend=False` makes no groups, `_rank` asks none."""
    ranks = torch.arange(replicas * shards, dtype=torch.int)
    if replicas == 1:
        return DeviceMesh("cpu", ranks, mesh_dim_names=("fsdp",), _init_backend=False, _rank=rank)
    return DeviceMesh(
        "cpu",
        ranks.view(replicas, shards),
        mesh_dim_names=("ddp", "fsdp"),
        _init_backend=False,
        _rank=rank,
    )
