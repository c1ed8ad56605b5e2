"""What goes into the shard files: state dicts of the model and the optimizer, as FSDP2 trainers
write them.
"""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from retool.checkpoint.flat.rows import Rows, named_rows
from retool.checkpoint.format.unpickle import parse
from retool.parallel.fsdp.layout import Layout

# What torch's AdamW has in its state dict: other programs look for all of it.
ADAMW = {
    "lr": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
# an attribute of a model file's OrderedDict: the training step. Other readers don't look
SAVED_AT = "retool_step"


@dataclass(frozen=True)
class Place:
    """Whose file it is: rank `rank` of `replicas` × `shards`."""

    rank: int
    shards: int
    replicas: int = 1

    @property
    def world(self) -> int:
        return self.replicas * self.shards

    @property
    def shard_rank(self) -> int:
        return self.rank % self.shards


def _tensor(buffer: torch.Tensor, rows: Rows, place: Place) -> torch.Tensor:
    """A parameter's rows as they go into the file: a DTensor, or the plain tensor in a world of
    one.
    """
    # Through numpy each tensor gets a storage of its own, so that each is a record of the file,
    # without a copy.
    # Numpy has no bfloat16
    plain = buffer.view(torch.int16) if buffer.dtype == torch.bfloat16 else buffer
    part = plain.numpy()[rows.offset : rows.offset + rows.stop - rows.start]
    local = (
        torch.from_numpy(part).view(buffer.dtype).view(rows.shape)
        if part.size
        else torch.empty(rows.shape, dtype=buffer.dtype)
    )
    return (
        local
        if place.world == 1
        else sharded_tensor(local, rows.member.shape, place.replicas, place.shards, place.rank)
    )


def model_content(
    layout: Layout, place: Place, params: torch.Tensor, step: int
) -> OrderedDict[str, torch.Tensor]:
    """A rank's model file of training step `step`, from its row buffer: name → rows of it, tied
    names included.
    """
    content = OrderedDict(
        (rows.member.name, _tensor(params, rows, place))
        for rows in named_rows(layout, place.shard_rank)
    )
    for alias, name in layout.aliases:
        content[alias] = content[name]
    setattr(content, SAVED_AT, step)
    return content


def optimizer_content(
    layout: Layout,
    place: Place,
    moments: tuple[torch.Tensor, torch.Tensor],
    updates: int,
    hyperparameters: Mapping[str, Any],
) -> dict[str, Any]:
    """A rank's optimizer file, from its row buffers: AdamW's state dict with the parameters' names.

    {"state": {index: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [one]}
    """
    exp_avg, exp_avg_sq = moments
    states: dict[int, dict[str, torch.Tensor]] = {}
    names: list[str] = []
    # Numbered in `parameters()` order, as torch numbers them.
    for index, rows in enumerate(named_rows(layout, place.shard_rank)):
        names.append(rows.member.name)
        states[index] = {
            "step": torch.tensor(float(updates)),
            "exp_avg": _tensor(exp_avg, rows, place),
            "exp_avg_sq": _tensor(exp_avg_sq, rows, place),
        }
    group = {
        **ADAMW,
        **hyperparameters,
        "params": list(states),
        # torch's own key for them: without names a reader has only the order to go by.
        "param_names": names,
    }
    return {"state": states, "param_groups": [group]}


def frozen(content: Mapping[str, Any], what: str) -> bytes:
    """`content` as torch.save writes it, after checking that it reads back without running
    anything.
    """
    pickled = io.BytesIO()
    torch.save(content, pickled)
    with zipfile.ZipFile(pickled) as archive:
        records = archive.namelist()
        data = archive.read(next(name for name in records if name.endswith("/data.pkl")))
    try:
        parse(data, len(records))
    except ValueError as error:
        raise ValueError(
            f"{what} may hold tensors, strings, numbers, lists and dicts only: {error}."
        ) from error
    return pickled.getvalue()


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
