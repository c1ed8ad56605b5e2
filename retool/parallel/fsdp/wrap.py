"""`shard(module, units, mesh)`: fully sharded data parallelism for any module, given what to gather
at once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from retool.parallel.fsdp.collect import (
    Collected,
    Members,
    Units,
    check_alike,
    check_divided,
    collect,
)
from retool.parallel.fsdp.hooks import attach
from retool.parallel.fsdp.layout import make_layout
from retool.parallel.fsdp.sharded import Dtypes, Sharded
from retool.parallel.mesh import Mesh


def shard(
    module: nn.Module,
    units: Units,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype = torch.bfloat16,
    master_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    members: Members | None = None,
    aliases: tuple[tuple[str, str], ...] = (),
    order: tuple[str, ...] = (),
    fused: tuple[tuple[str, str], ...] = (),
    divided: Collection[str] = (),
    trained: bool = True,
    keep_copy: bool = True,
    reshard_after_forward: bool = True,
    forward_prefetch: bool = True,
    backward_overlap: bool = True,
) -> Sharded:
    """Shard `module`'s parameters over `mesh.shards` ranks. Freeze parameters before.

    `units`: (name, modules) in forward order, an outer one before those inside it. Every parameter
    belongs to the innermost unit around it, and modules that share one are one unit. Every rank
    must run the same units in the same order; each may run any number of times. A unit's weights
    are there while its module is called and in its backward, not between. It returns its results
    (tensors, or tuples, lists, dicts, dataclasses of them), and doesn't write into its inputs in
    place.

    Parameters on the meta device start as zeros (load them through `layout`, then `refresh`);
    others keep their values, the same on every rank.

    `members` maps a parameter's name to the names and shapes stacked in it on disk (default:
    itself). `divided`: names of parameters that the ranks of an ep group divide (`mesh.ep`): the
    module has a part of each, made on the meta device; `members` names those of all parts. Without ep
    they are as others. `trained=False`: no gradient is ever wanted, and no memory kept for it. Without
    `keep_copy` there is no copy of a rank's shard in `param_dtype`: the master weights are cast
    whenever a unit is gathered. `forward_prefetch` gathers the next unit during a unit's forward;
    `backward_overlap` the one before during its backward, and lets reductions run beside what
    follows (both off only to measure what they hide).

    Raises ValueError for units that can't be sharded so, see `collect`.
    """
    collected = collect(module, units, members or {}, divided)
    if mesh.ep > 1:
        check_divided(collected)
    check_alike(collected, mesh)
    specs = [(unit.name, unit.slots) for unit in collected]
    sharded = Sharded(
        module,
        make_layout(specs, mesh.shards, aliases, order, fused, mesh.ep),
        mesh,
        Dtypes(param_dtype, master_dtype, reduce_dtype),
        trained=trained,
        keep_copy=keep_copy,
        # An outer unit's weights are in use while the units inside it take turns in theirs
        own_buffers=[unit.outer or not reshard_after_forward for unit in collected],
        forward_prefetch=forward_prefetch,
        backward_overlap=backward_overlap,
    )
    _keep_values(sharded, collected)
    _replace_parameters(sharded, collected)
    # Last: the hooks speak of parameters as they are now
    for place, (_, modules) in enumerate(units):
        for child in modules:
            attach(sharded, place, child, first=child is modules[0], only=len(modules) == 1)
    sharded.refresh()
    return sharded


def _by_name(collected: list[Collected]) -> dict[str, nn.Parameter]:
    """Every parameter as it was before, by its slot's name."""
    return {
        slot.name: parameter
        for unit in collected
        for slot, parameter in zip(unit.slots, unit.parameters, strict=True)
    }


def _keep_values(sharded: Sharded, collected: list[Collected]) -> None:
    """Copy this rank's part of parameters that have values already into the master shard."""
    parameters = _by_name(collected)
    for unit in sharded.layout.units:
        low = unit.low(sharded.mesh.shard_rank)
        high = low + unit.shard_numel
        for slot in unit.slots:
            parameter = parameters[slot.name]
            # Ranks are cut by elements, not by parameters: one may begin here and end on the next
            start = max(low, slot.offset)
            stop = min(high, slot.offset + slot.numel)
            if parameter.device.type == "meta" or start >= stop:
                continue
            values = parameter.detach().reshape(-1)[start - slot.offset : stop - slot.offset]
            here = unit.start + start - low
            sharded.master[here : here + stop - start] = values.to(sharded.master)


def _replace_parameters(sharded: Sharded, collected: list[Collected]) -> None:
    """Give the modules the views of the units' buffers, and move their own buffers to the device."""
    replacement: dict[int, nn.Parameter] = {}
    before = _by_name(collected)
    for unit in sharded.units:
        for slot, new in zip(unit.slots, unit.parameters, strict=True):
            replacement[id(before[slot.name])] = new
    device = sharded.mesh.device
    for child in sharded.module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                # Through `setattr`: a module that keeps a list of its own brings it up to date
                setattr(child, name, replacement[id(parameter)])
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device != device and buffer.device.type != "meta":
                child._buffers[name] = buffer.to(device)
