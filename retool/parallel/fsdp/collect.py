"""Which parameters belong to which unit, and what can't be sharded so: refused here, as on several
ranks it would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from retool.parallel.fsdp.layout import SlotSpec
from retool.parallel.mesh import Mesh

Units = Sequence[tuple[str, Sequence[nn.Module]]]
Members = Mapping[str, list[tuple[str, tuple[int, ...]]]]


@dataclass
class Collected:
    """A unit's slot specifications and present parameters; `outer` where another unit's module lies
    in one of its own.
    """

    name: str
    outer: bool
    slots: list[SlotSpec] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


def collect(module: nn.Module, units: Units, members: Members) -> list[Collected]:
    """Every parameter once, in the innermost unit around the module that has it.

    ValueError for what can't be, with the way out.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    places = {id(m): n for n, m in module.named_modules()}
    roots = [id(m) for _, modules in units for m in modules]
    owner: dict[int, int] = {}
    covered: set[int] = set()
    found: list[Collected] = []
    for index, (unit, modules) in enumerate(units):
        mine = {id(m) for m in modules}
        found.append(
            Collected(
                unit,
                any(id(d) in roots and id(d) not in mine for m in modules for d in m.modules()),
            )
        )
        for part in modules:
            _check_module(unit, part, places, roots)
            for inside in _own(part, set(roots)):
                covered.add(id(inside))
                for parameter in _direct(inside):
                    if owner.setdefault(id(parameter), index) != index:
                        raise _shared(
                            names[id(parameter)], units[owner[id(parameter)]][0], f"unit {unit!r}"
                        )
                    if all(parameter is not p for p in found[-1].parameters):
                        found[-1].parameters.append(parameter)
                        found[-1].slots.append(_slot(names[id(parameter)], parameter, members))
    missing = [n for i, n in names.items() if i not in owner]
    if missing:
        raise ValueError(
            f"parameter {missing[0]} (and {len(missing) - 1} more) is in no unit: add its module to `units`."
        )
    for place, inside in module.named_modules():
        for parameter in _direct(inside) if id(inside) not in covered else ():
            raise _shared(
                names[id(parameter)],
                units[owner[id(parameter)]][0],
                f"module {place!r}, which is in no unit",
            )
    return found


def _direct(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _own(module: nn.Module, roots: set[int]) -> Iterator[nn.Module]:
    """The module and those in it, but for other units', in the order of `parameters()`."""
    yield module
    for child in module.children():
        if id(child) not in roots:
            yield from _own(child, roots)


def _slot(name: str, parameter: nn.Parameter, members: Members) -> SlotSpec:
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
    return name, shape, members.get(name, [(name, shape)]), parameter.requires_grad


def _shared(parameter: str, unit: str, other: str) -> ValueError:
    return ValueError(
        f"parameter {parameter} of unit {unit!r} is used by {other} too, where it would not be gathered: "
        "put all modules that share it in one unit."
    )


def _check_module(unit: str, part: nn.Module, places: dict[int, str], roots: list[int]) -> None:
    if id(part) not in places:
        raise ValueError(
            f"unit {unit!r} has a {type(part).__name__} that isn't in the module: give modules of "
            "the one that is sharded."
        )
    name = places[id(part)]
    if roots.count(id(part)) > 1:
        raise ValueError(f"module {name!r} is in `units` more than once: name it once.")
    if type(part).forward is nn.Module.forward and "forward" not in vars(part):
        kind = type(part).__name__
        raise ValueError(
            f"unit {unit!r}: {name!r} is a {kind}, which is never called itself, so nothing would gather it: "
            "give the modules in it, or the one around it."
        )


def check_alike(found: Sequence[Collected], mesh: Mesh) -> None:
    """ValueError unless parameters that have values have the same ones on every rank: shards of
    different models fit no model.
    """
    here = [
        (s[0], p)
        for unit in found
        for s, p in zip(unit.slots, unit.parameters, strict=True)
        if p.device.type != "meta"
    ]
    if mesh.world_group is None or not here:
        return
    sums = torch.stack(
        [
            p.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64).to(mesh.device)
            for _, p in here
        ]
    )
    both = torch.stack([sums, -sums])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=mesh.world_group)
    for (name, _), differs in zip(here, both.sum(0).tolist(), strict=True):
        if differs:
            raise ValueError(
                f"parameter {name} has other values on another rank: seed all ranks alike before "
                "the module is made."
            )
