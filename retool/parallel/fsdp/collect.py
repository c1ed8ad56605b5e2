"""Finds out which parameters belong to which unit.

What can't be sharded so is refused here: on several ranks it would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from retool.parallel.fsdp.layout import SlotSpec
from retool.parallel.mesh import Mesh

# (name of the unit, its modules), in forward order
Units = Sequence[tuple[str, Sequence[nn.Module]]]
# a parameter's name → names and shapes of what is stacked in it
Members = Mapping[str, list[tuple[str, tuple[int, ...]]]]


@dataclass
class Collected:
    """What one unit shards: a `SlotSpec` per parameter, and the parameters themselves.

    `outer` is true if a module of this unit contains a module of another unit.
    """

    name: str
    outer: bool
    slots: list[SlotSpec] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def add(self, slot: SlotSpec, parameter: nn.Parameter) -> None:
        """A parameter that several modules of the unit share is there once."""
        if all(parameter is not known for known in self.parameters):
            self.parameters.append(parameter)
            self.slots.append(slot)


def collect(
    module: nn.Module,
    units: Units,
    members: Members,
    divided: Collection[str] = (),
) -> list[Collected]:
    """Every parameter once, in the innermost unit around the module that has it.

    `divided`: names of those that the ranks of an ep group divide. ValueError for what can't be, with the way out.
    """
    # By identity throughout: `==` of two parameters compares their elements
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places = {id(child): name for name, child in module.named_modules()}
    roots = [id(part) for _, modules in units for part in modules]

    owner: dict[int, Collected] = {}  # of each parameter: its unit
    covered: set[int] = set()  # modules that are in some unit
    collected: list[Collected] = []
    for unit, modules in units:
        mine = Collected(unit, _is_outer(modules, roots))
        collected.append(mine)
        for part in modules:
            _check_module(unit, part, places, roots)
            for inside in _without_other_units(part, set(roots)):
                covered.add(id(inside))
                for parameter in _own_parameters(inside):
                    name = names[id(parameter)]
                    first = owner.setdefault(id(parameter), mine)
                    if first is not mine:
                        raise _shared(name, first.name, f"unit {unit!r}")
                    mine.add(_slot(name, parameter, members, name in divided), parameter)

    missing = [name for key, name in names.items() if key not in owner]
    if missing:
        raise ValueError(
            f"parameter {missing[0]} (and {len(missing) - 1} more) is in no unit: add its module to `units`."
        )
    # A parameter of a unit may be used by a module outside of all units, too
    for place, inside in module.named_modules():
        if id(inside) in covered:
            continue
        for parameter in _own_parameters(inside):
            where = f"module {place!r}, which is in no unit"
            raise _shared(names[id(parameter)], owner[id(parameter)].name, where)
    return collected


def _is_outer(modules: Sequence[nn.Module], roots: list[int]) -> bool:
    """Whether one of a unit's modules contains a module of another unit."""
    own = {id(part) for part in modules}
    return any(
        id(inside) in roots and id(inside) not in own
        for part in modules
        for inside in part.modules()
    )


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the module itself, not of modules in it."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _without_other_units(module: nn.Module, roots: set[int]) -> Iterator[nn.Module]:
    """The module and those in it, but for other units', in the order of `parameters()`."""
    yield module
    for child in module.children():
        if id(child) not in roots:
            yield from _without_other_units(child, roots)


def _slot(name: str, parameter: nn.Parameter, members: Members, divided: bool) -> SlotSpec:
    if not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name} is {parameter.dtype}, and only floating-point parameters are "
            "sharded: make it a buffer."
        )
    if hasattr(parameter, "gathered"):
        raise ValueError(
            f"parameter {name} is of a module that was sharded already: shard it once, with all its units."
        )
    shape = tuple(parameter.shape)
    stacked = members.get(name, [(name, shape)])
    return SlotSpec(name, shape, stacked, parameter.requires_grad, divided)


def _shared(parameter: str, unit: str, other: str) -> ValueError:
    return ValueError(
        f"parameter {parameter} of unit {unit!r} is used by {other} too, where it would not be gathered: "
        "put all modules that share it in one unit."
    )


def _check_module(unit: str, part: nn.Module, places: dict[int, str], roots: list[int]) -> None:
    """ValueError for a module that isn't there, is named twice, or is never called."""
    kind = type(part).__name__
    if id(part) not in places:
        raise ValueError(
            f"unit {unit!r} has a {kind} that isn't in the module: give modules of "
            "the one that is sharded."
        )
    name = places[id(part)]
    if roots.count(id(part)) > 1:
        raise ValueError(f"module {name!r} is in `units` more than once: name it once.")
    # A ModuleList, for example
    has_no_forward = type(part).forward is nn.Module.forward and "forward" not in vars(part)
    if has_no_forward:
        raise ValueError(
            f"unit {unit!r}: {name!r} is a {kind}, which is never called itself, so nothing would gather it: "
            "give the modules in it, or the one around it."
        )


def check_divided(collected: Sequence[Collected]) -> None:
    """ValueError for a divided parameter that has values: nothing says of which part they are."""
    for unit in collected:
        for slot, parameter in zip(unit.slots, unit.parameters, strict=True):
            if slot.divided and parameter.device.type != "meta":
                raise ValueError(
                    f"parameter {slot.name} of unit {unit.name!r} is divided over ranks and has values: make "
                    "the module on the meta device, and load them through the layout."
                )


def check_alike(collected: Sequence[Collected], mesh: Mesh) -> None:
    """ValueError unless parameters that have values have the same ones on every rank: shards of
    different models fit no model.
    """
    present: list[tuple[str, nn.Parameter]] = []
    for unit in collected:
        for slot, parameter in zip(unit.slots, unit.parameters, strict=True):
            if parameter.device.type != "meta":
                present.append((slot.name, parameter))
    if mesh.world_group is None or not present:
        return
    sums = torch.stack([_byte_sum(parameter).to(mesh.device) for _, parameter in present])
    # One collective for two extremes: the largest sum, and minus the smallest
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.world_group)
    for (name, _), spread in zip(present, extremes.sum(0).tolist(), strict=True):
        if spread:
            raise ValueError(
                f"parameter {name} has other values on another rank: seed all ranks alike before "
                "the module is made."
            )


def _byte_sum(parameter: nn.Parameter) -> torch.Tensor:
    """int64: what all bytes of the parameter add up to."""
    # Of bytes: exact in whatever order they are added, and NaN equals NaN
    return parameter.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
