"""A `RolloutEngine` that samples on servers, over HTTP."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retool.engine import EngineOptions, SamplingParams, TurnDone
from retool.engine.kernels.draws import seed_key
from retool.engine.memory import EngineMemory
from retool.engine.types import Reason
from retool.model.config import ModelConfig
from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout
from retool.rl.server.dialects import Sampled
from retool.rl.server.fleet import Fleet, ServerOptions
from retool.rl.server.sender import Sender, Ticket
from retool.rl.server.weights import PREFIX, bring, clear, write_weights

# `step` waits so long for a turn: tools and judges go on between two steps
WAIT_SECONDS = 0.002
REASONS: dict[str, Reason] = {"stop": "stop", "length": "length"}
MOST_SEED = (1 << 63) - 1


@dataclass
class _Sequence:
    """All tokens so far; `ticket` is the turn that is being sampled."""

    ids: list[int]
    group: Hashable
    ticket: Ticket | None = None


class ServerEngine:
    """Every rank asks all servers; rank 0 brings them the weights.

    `folder` is where weights are handed over, which the servers must see under the same path;
    `model_folder` has the model's config and tokenizer. Nothing is opened before the first `sync`.
    """

    def __init__(self, options: ServerOptions, folder: Path, model_folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.model_folder = model_folder
        self.fleet = Fleet.of(options.urls)
        self.version = 0
        self._writes = False
        self._sequences: dict[Hashable, _Sequence] = {}
        self._sender: Sender | None = None

    @staticmethod
    def memory(
        config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
    ) -> EngineMemory:
        """On a training GPU: the unit that is being gathered, while weights are written."""
        largest = max(unit.numel for unit in layout.units)
        return EngineMemory(weights=0, work=largest * dtype.itemsize, page=0, page_size=1)

    def sync(self, sharded: Sharded) -> None:
        """Write the trainer's weights and have all servers load them. Collective.

        ServersGone where none is left; ValueError where the folder can't be written.
        """
        self.version += 1
        mesh = sharded.mesh
        target = self.folder / f"{PREFIX}{self.version}"
        self._writes = mesh.rank == 0
        if self._writes:
            clear(self.folder)
        problem = write_weights(sharded, target, self.model_folder)
        if mesh.rank == 0 and not problem:
            bring(self.fleet, self.options, target)
        found = gather_objects((problem, self.fleet), mesh.world_group)
        problem, fleet = found[0]
        if problem:
            way_out = "Make room, or name another folder in rollout.server.weights_dir."
            raise ValueError(f"{problem}. {way_out}")
        if mesh.rank != 0:
            self.fleet = fleet
            if self._sender is not None:
                self._sender.fleet = fleet
        self._tell_losses()
        if not self.fleet.there:
            raise self.fleet.gone()
        if self._sender is None:
            self._sender = Sender(self.fleet, self.options)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        """See `Sampler`."""
        self._sequences[key] = _Sequence(list(ids), key if group is None else group)
        self._ask(key, params)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        """See `Sampler`."""
        self._sequences[key].ids += ids
        self._ask(key, params)

    def drop(self, key: Hashable) -> None:
        """See `Sampler`."""
        sequence = self._sequences.pop(key)
        if sequence.ticket is not None:
            self._ready().cancel(sequence.ticket)

    def step(self) -> list[TurnDone]:
        """Turns that have come meanwhile. ServersGone where no server is left."""
        turns = []
        for ticket, outcome in self._ready().take(WAIT_SECONDS):
            sequence = self._sequences.get(ticket.key)
            if sequence is None or sequence.ticket is not ticket:  # dropped meanwhile
                continue
            if isinstance(outcome, Exception):
                raise outcome
            sequence.ticket = None
            sequence.ids += outcome.tokens
            turns.append(_turn(ticket.key, outcome))
        self._tell_losses()
        return turns

    def idle(self) -> bool:
        """See `Sampler`."""
        return not any(sequence.ticket for sequence in self._sequences.values())

    def follow(self) -> None:
        """No rank follows another's servers."""

    def end(self) -> None:
        """Nobody follows."""

    def release(self) -> None:
        """The servers keep their memory: it is their own."""

    def close(self) -> None:
        """Part from the servers; the weights' folder goes."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._writes:
            clear(self.folder)

    def _ready(self) -> Sender:
        if self._sender is None:
            raise ValueError("the servers have no weights: call sync(model) first.")
        return self._sender

    def _ask(self, key: Hashable, params: SamplingParams) -> None:
        sequence = self._sequences[key]
        # Each turn draws with a seed of its own, as it is a request of its own
        seed = seed_key((*params.seed, len(sequence.ids))) & MOST_SEED
        sequence.ticket = Ticket(key, sequence.group, list(sequence.ids), params, seed)
        self._ready().send(sequence.ticket)

    def _tell_losses(self) -> None:
        while self.fleet.fresh_losses:
            server = self.fleet.fresh_losses.pop()
            left = len(self.fleet.there)
            warnings.warn(
                f"{server.url} is left out, {left} server(s) go on: {server.lost}", stacklevel=1
            )


def _turn(key: Hashable, sampled: Sampled) -> TurnDone:
    """What the agent loop takes. A server that gave up is as an engine without room."""
    reason = REASONS.get(sampled.reason, "capacity")
    return TurnDone(key, sampled.tokens, sampled.logp, list(sampled.logp), reason)
