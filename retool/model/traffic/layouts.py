"""The ways in which these machines can share parameters, and which of them waits least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from retool.model.config import ModelConfig
from retool.model.traffic.exchanges import Plan
from retool.model.traffic.machines import Machines
from retool.model.traffic.timeline import Expected, expected, work_of

# A layout is better if it saves this share of the step
WORTH_SAYING = 0.02


@dataclass(frozen=True)
class Layout:
    """A way to share parameters, and what a step comes to."""

    plan: Plan
    expected: Expected


def on(config: ModelConfig, plan: Plan, machines: Machines, document: int) -> Layout:
    """What a step of `plan` comes to, in documents of `document` tokens."""
    work = work_of(config, plan, document, machines.flops)
    return Layout(plan, expected(config, plan, machines, work))


def plans(plan: Plan, per_machine: int) -> Iterator[Plan]:
    """The same ranks, sharing parameters among all of them or within a machine; blocks' weights
    freed after the forward, or kept.
    """
    world = plan.world
    sizes = [plan.shards, world]
    if world % per_machine == 0:
        sizes.append(per_machine)
    for shards in dict.fromkeys(size for size in sizes if size % plan.ep == 0):
        for reshard in dict.fromkeys((plan.reshard, True, False)):
            yield replace(plan, shards=shards, replicas=world // shards, reshard=reshard)


def best(
    config: ModelConfig,
    plan: Plan,
    machines: Sequence[Machines],
    document: int,
    fits: Callable[[Plan], bool],
) -> Plan:
    """The plan among `plans` whose step is shortest on the first of `machines`, if it fits and saves
    enough; else `plan` itself.
    """
    first = machines[0]
    now = on(config, plan, first, document).expected.step
    found = plan
    shortest = now * (1 - WORTH_SAYING)
    for other in plans(plan, first.per_machine):
        seconds = on(config, other, first, document).expected.step
        if seconds < shortest and fits(other):
            found = other
            shortest = seconds
    return found
