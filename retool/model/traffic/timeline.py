"""A step's timeline: how long the step waits for what it sends."""

from __future__ import annotations

from dataclasses import dataclass, field

from retool.model.config import ModelConfig
from retool.model.costs import layer_costs, model_flops
from retool.model.recompute import Recompute
from retool.model.traffic.exchanges import (
    Plan,
    Purpose,
    Use,
    adding,
    experts,
    gathering,
    is_block,
    layout_of,
    numbers,
    reducing,
    sequence,
    uses,
)
from retool.model.traffic.machines import Machines
from retool.parallel.fsdp.buffers import take_turns

# Units compute one after the other, while the network brings the next one's weights and takes the last
# one's gradients, one collective after the other. What a step waits for is exposed: weights that
# aren't there yet, a gradient buffer that is still being sent, the reductions that are left at the
# end of a backward. In a step's last backward a unit's sum over the replicas follows its reduction,
# beside the next ones: replicas are on other machines. The all-to-alls of sequences and of experts are
# exposed by nature. The optimizer's update isn't counted.


@dataclass(frozen=True)
class Work:
    """Seconds that a rank computes in a micro-batch: in a layer's forward and backward, and in the
    vocabulary head's.
    """

    forward: float
    backward: float
    head_forward: float = 0.0
    head_backward: float = 0.0

    def seconds(self, config: ModelConfig, use: Use) -> float:
        if use.head:
            return self.head_backward if use.backward else self.head_forward
        if not is_block(config, use.place):
            return 0.0
        return self.backward if use.backward else self.forward


@dataclass(frozen=True)
class Expected:
    """Seconds of a step: of computing, and of waiting, by what for."""

    compute: float
    exposed: dict[Purpose, float]

    @property
    def waiting(self) -> float:
        return sum(self.exposed.values())

    @property
    def step(self) -> float:
        return self.compute + self.waiting

    @property
    def share(self) -> float:
        """Of the step, what it waits."""
        return self.waiting / self.step if self.step else 0.0


def work_of(config: ModelConfig, plan: Plan, document: int, flops: float) -> Work:
    """What a rank's share of a micro-batch takes, in documents of `document` tokens."""
    # A backward is two forwards
    per_flop = 1 / (3 * flops)
    head = 6.0 * config.vocab * config.hidden
    layer = (model_flops(config, [document]) / document - head) / config.layers
    again = _computed_again(config, plan.recompute)
    return Work(
        plan.tokens * layer * per_flop,
        plan.tokens * (2 * layer + 3 * again) * per_flop,
        plan.tokens * head * per_flop,
        2 * plan.tokens * head * per_flop,
    )


def _computed_again(config: ModelConfig, recompute: Recompute) -> float:
    """FLOPs per token of a layer's forward that its backward repeats; attention's kernel never."""
    costs = layer_costs(config)
    after = sum(matrix.elements for matrix in costs.after) - costs.unused
    repeated = {"none": 0, "selective": after}.get(recompute, costs.active_parameters)
    return 2.0 * repeated


@dataclass
class _Clock:
    """Where the computing is, until when the network among shards is busy, and that among replicas, and
    what was waited for.
    """

    now: float = 0.0
    network: float = 0.0
    replicas: float = 0.0
    compute: float = 0.0
    exposed: dict[Purpose, float] = field(default_factory=dict)

    def send(self, seconds: float) -> float:
        """Enqueue a collective here; when it ends."""
        self.network = max(self.network, self.now) + seconds
        return self.network

    def add_up(self, reduced: float, seconds: float) -> None:
        """Enqueue a sum over the replicas, of what is reduced then."""
        self.replicas = max(self.replicas, reduced) + seconds

    def wait(self, until: float, purpose: Purpose) -> None:
        waited = max(0.0, until - self.now)
        self.now += waited
        self.exposed[purpose] = self.exposed.get(purpose, 0.0) + waited

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.compute += seconds


def expected(config: ModelConfig, plan: Plan, machines: Machines, work: Work) -> Expected:
    """A step, played through."""
    layout = layout_of(config, plan)
    buffer = take_turns(layout.units, [False] * len(layout.units)).taken
    clock = _Clock()
    arrives: dict[int, float] = {}  # when a unit's weights are there
    reduced: dict[int, float] = {}  # when a buffer of gradients is free again
    for use in uses(config, plan):
        for unit in use.late:
            arrives[unit] = clock.send(machines.seconds(gathering(config, plan, unit)))
        clock.wait(max(arrives.get(unit, 0.0) for unit in use.units), "gathering")
        for unit in use.ahead:
            arrives[unit] = clock.send(machines.seconds(gathering(config, plan, unit)))
        if is_block(config, use.place):
            for exchange in (
                *sequence(config, plan, use.backward),
                *experts(config, plan, use.backward),
            ):
                clock.wait(clock.now + machines.seconds(exchange), exchange.purpose)
        clock.work(work.seconds(config, use))
        if use.reduces:
            for unit, exchange in reducing(config, plan, use.units):
                clock.wait(reduced.get(buffer[unit], 0.0), "reducing")
                reduced[buffer[unit]] = clock.send(machines.seconds(exchange))
        for unit in use.units if use.completes else ():
            sent = reduced.get(buffer[unit], clock.now) if unit in buffer else clock.now
            clock.add_up(sent, machines.seconds(adding(config, plan, unit)))
        if use.backward and use.place == 0 and not use.head:
            # The end of a backward waits for its reductions
            clock.wait(max(reduced.values(), default=0.0), "reducing")
    clock.wait(clock.replicas, "replicas")
    for exchange in numbers(config, plan):
        clock.wait(clock.now + machines.seconds(exchange), exchange.purpose)
    return Expected(clock.compute, clock.exposed)
