"""Peak memory of an RL step by phase, on one GPU: what training always keeps, and what the engine
and the update add in turn.

    sync       state · engine weights
    rollout    state · engine weights · KV cache · what a forward of the engine needs
    log-probs  state · a forward without gradients            (+ what the engine has, where it isn't freed)
    update     state · activations and the head               (likewise)
    optimizer  state · float64 pieces of the gradient, or what comes from host memory   (likewise)

The cache takes `gpu_memory_utilization` of what is free when it is made, so rollout fills the GPU
as far as it is allowed to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch

from retool.engine import EngineOptions, find_backend
from retool.model.build import DTYPES, plan_layout
from retool.model.config import ModelConfig
from retool.parallel.fsdp.layout import Layout
from retool.perf import GIB
from retool.preflight.plan import Choice
from retool.preflight.training_memory import (
    DTYPE_BYTES,
    OUTSIDE,
    Setting,
    gathered,
    head_bytes,
    layer_bytes,
)
from retool.rl.config import RLConfig
from retool.rl.server.engine import ServerEngine

SERVER = "server"  # the `rollout.name` of servers
ROOM = 1.3  # times the predicted activations must be free for the engine to keep its memory


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU by phase.

    `weights` and `cache` are the engine's; `freed`: it gives them back for the update. `sequences`
    is how many of the maximum length the cache has room for. Where the GPU's memory isn't known,
    the cache is what `max_num_seqs` such sequences need, and `fits` is None.
    """

    load: float
    sync: float
    rollout: float
    logprobs: float
    update: float
    optimizer: float
    save: float
    weights: float
    cache: float
    sequences: float
    freed: bool
    fits: bool | None

    @property
    def phases(self) -> dict[str, float]:
        """In the order of a step."""
        return {
            "load": self.load,
            "sync": self.sync,
            "rollout": self.rollout,
            "log-probs": self.logprobs,
            "update": self.update,
            "optimizer": self.optimizer,
            "save": self.save,
        }


def engine_options(config: RLConfig) -> EngineOptions:
    rollout = config.actor_rollout_ref.rollout
    data = config.data
    return EngineOptions(
        max_num_seqs=rollout.max_num_seqs,
        kv_share=rollout.gpu_memory_utilization,
        max_batch_tokens=max(rollout.max_num_batched_tokens, rollout.max_num_seqs),
        max_length=data.max_prompt_length + data.max_response_length,
        dtype=None if rollout.dtype == "auto" else DTYPES[rollout.dtype],
        use_cuda_graphs=not rollout.enforce_eager,
        deterministic=config.trainer.deterministic,
        return_experts=rollout.enable_rollout_routing_replay,
    )


def step_memory(
    model: ModelConfig,
    setting: Setting,
    choice: Choice,
    engine: EngineOptions,
    tensor_parallel: int,
    free: bool | Literal["auto"],
    reference: bool,
    device_gib: float | None,
    backend: str = "native",
    judge: float = 0.0,
) -> StepMemory:
    """Memory of a step that trains under `choice`, with an engine on every `tensor_parallel` ranks.

    `free`: whether the engine gives its memory back for the update; auto: where the update doesn't
    fit beside it. `reference`: with a frozen policy. `backend`: `rollout.name`. `judge`: bytes of
    a reward model's weights.
    """
    training = choice.prediction
    layout = plan_layout(model, setting.shards, setting.ep)
    dtype = engine.dtype or DTYPES[setting.compute]
    kind = ServerEngine if backend == SERVER else find_backend(backend, model)
    needed = kind.memory(model, engine, dtype, tensor_parallel, layout)
    frozen = judge
    if reference:
        # Its shard, and what it is gathered in
        elements = layout.shard_numel + gathered(layout, setting.reshard)
        frozen += elements * DTYPE_BYTES[setting.compute]
    state = training.state + frozen
    available = None if device_gib is None else device_gib * GIB - OUTSIDE - state
    max_length = engine.max_length or model.max_position or needed.page_size
    # Whole pages: the last one may be nearly empty.
    sequence = -(-max_length // needed.page_size) * needed.page
    cache = float(engine.max_num_seqs * sequence)
    if engine.kv_bytes is not None:
        cache = engine.kv_bytes
    # What the engine itself will do when it allocates: a share of what is free beside weights and
    # work.
    elif available is not None and sequence:
        cache = max(0.0, (available - needed.weights - needed.work) * engine.kv_share)
    activations = training.forward_backward - training.state
    freed = free
    if freed == "auto":
        left = None if available is None else available - needed.weights - cache - needed.work
        freed = left is not None and left < ROOM * activations
    # Recorded steps keep what they work in.
    kept = needed.weights + cache + (needed.work if engine.use_cuda_graphs else 0)
    beside = frozen + (0.0 if freed else kept)
    # Without gradients nothing is kept for a backward, so it can't be more than the update's.
    forward = min(forward_bytes(model, setting, choice), activations)
    memory = StepMemory(
        load=training.load + frozen,
        sync=state + needed.weights + _gathered_for_sync(layout, dtype),
        rollout=state + needed.weights + cache + needed.work,
        logprobs=training.state + beside + forward,
        update=training.forward_backward + beside,
        optimizer=training.optimizer + beside,
        save=training.save + beside,
        weights=needed.weights,
        cache=cache,
        sequences=cache / sequence if sequence else inf,
        freed=freed,
        fits=None,
    )
    if device_gib is None:
        return memory
    peak = max(memory.phases.values()) + OUTSIDE
    fits = bool(choice.fits) and memory.sequences >= 1 and peak <= device_gib * GIB
    return replace(memory, fits=fits)


def _gathered_for_sync(layout: Layout, dtype: torch.dtype) -> int:
    """Experts that ranks divide reach the engine by way of a layer's: as gathered, and in order."""
    divided = [unit.numel for unit in layout.units if unit.parts > 1]
    return 2 * max(divided, default=0) * dtype.itemsize


def forward_bytes(model: ModelConfig, setting: Setting, choice: Choice) -> float:
    """Bytes of a micro-batch's forward without gradients: the activations of one block and of the
    head.
    """
    # What it would keep, and gate times up, which no backward keeps
    block = layer_bytes(model, setting, "none") + model.ffn * setting.element.compute
    return choice.tokens * block + head_bytes(model, setting, choice.tokens, choice.recompute)
