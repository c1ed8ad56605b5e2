"""The backends that sample an RL run's tokens, and the protocol that they share.

A backend is one class with everything of `RolloutEngine`, and a line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from retool.engine.engine import Engine
from retool.engine.hf.engine import HfEngine
from retool.engine.memory import EngineMemory
from retool.engine.types import EngineOptions, SamplingParams, TurnDone
from retool.engine.vllm.engine import VllmEngine
from retool.engine.vllm.start import is_installed as vllm_is_installed
from retool.model.borrowed.config import BorrowedConfig
from retool.model.config import ModelConfig
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout


class Sampler(Protocol):
    """What a rollout asks of an engine: turns of many sequences, whichever ends first.

    A sequence is known by its `key`, a turn's result by `TurnDone`.
    """

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        """Begin a sequence with a prompt; sequences of one `group` have the same one."""
        ...

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        """Go on with a sequence whose turn is done: `ids` come after its last sampled token."""
        ...

    def drop(self, key: Hashable) -> None:
        """Forget a sequence, in whatever state it is."""
        ...

    def step(self) -> list[TurnDone]:
        """Compute a little, and return the turns that ended. It returns soon: between two calls
        tools and judges go on.
        """
        ...

    def idle(self) -> bool:
        """Whether there is nothing to compute and nothing to report."""
        ...


class RolloutEngine(Sampler, Protocol):
    """What an RL run asks of an engine.

    A step: all ranks `sync`. The rank that leads an engine rolls out and then says `end`, the others
    of its group `follow` meanwhile. All `release`, where the update needs the memory.
    """

    @staticmethod
    def memory(
        config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
    ) -> EngineMemory:
        """What it will take on each of `ranks` GPUs: preflight plans with it, before there is one.

        `layout`: the trainer's weights; `dtype`: the engine's.
        """
        ...

    def sync(self, sharded: Sharded) -> None:
        """Take the trainer's weights over. Collective on all ranks of the trainer."""
        ...

    def follow(self) -> None:
        """Ranks of the group that don't lead: work for the one that does, until it says `end`."""
        ...

    def end(self) -> None:
        """The leading rank: let the others return from `follow`."""
        ...

    def release(self) -> None:
        """Give back the memory until the next `sync`; every sequence is forgotten."""
        ...

    def close(self) -> None:
        """The run is over, whichever way: let go of what would outlive it."""
        ...


class InProcessEngine(RolloutEngine, Protocol):
    """A rollout engine in the training processes: how it is made."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        options: EngineOptions,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`group`: the ranks that share the engine, None for one of its own. Takes no memory yet."""
        ...


# `rollout.name` → class. `RolloutConfig.name` says the same names, for it is read without torch.
BACKENDS: dict[str, type[InProcessEngine]] = {
    "native": Engine,
    "vllm": VllmEngine,
    "hf": HfEngine,
}
# What existing scripts say, too. Where it can't be had, or isn't needed, it means the native engine,
# as the start-up says.
MEANING_NATIVE = ("vllm", "sglang", "hf")


def meaning(name: str, model: ModelConfig | None = None) -> str:
    """The backend that `rollout.name` stands for here: vLLM is itself where it is installed, and hf
    for a `model` that runs as transformers' module.

    ValueError for a name that means nothing.
    """
    if name == "vllm" and vllm_is_installed():
        return name
    if name == "hf" and isinstance(model, BorrowedConfig):
        return name
    if name in MEANING_NATIVE:
        return "native"
    if name not in BACKENDS:
        raise ValueError(
            f"rollout.name={name}: there is no such backend. There is {', '.join(BACKENDS)}; "
            f"{', '.join(MEANING_NATIVE)} may mean native."
        )
    return name


def find_backend(name: str, model: ModelConfig | None = None) -> type[InProcessEngine]:
    """The class that `rollout.name` asks for. ValueError for a name that means nothing."""
    return BACKENDS[meaning(name, model)]


def make_engine(
    name: str,
    config: ModelConfig,
    device: torch.device,
    options: EngineOptions,
    group: dist.ProcessGroup | None = None,
) -> RolloutEngine:
    """The engine of a run: `rollout.name`, over the ranks of `group`."""
    return find_backend(name, config)(config, device, options, group)
