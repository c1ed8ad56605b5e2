"""Peak memory of an RL step by phase, on one GPU: what training keeps all the time, and what the
engine and the update add in turn.

    sync       state · engine weights
    rollout    state · engine weights · KV cache · what a forward of the engine needs
    log-probs  state · a forward without gradients            (+ what the engine has, where it isn't freed)
    update     state · activations and the head               (likewise)
    optimizer  state · float64 pieces of the gradient, or what comes from host memory   (likewise)

The cache takes `gpu_memory_utilization` of what is free when it is made, so rollout fills the GPU
as far as it is allowed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retool.engine import EngineOptions, find_backend
from retool.model.build import DTYPES, plan_layout
from retool.model.config import ModelConfig
from retool.perf import GIB
from retool.preflight.memory import (
    DTYPE_BYTES,
    OUTSIDE,
    Choice,
    Setting,
    gathered,
    head_bytes,
    layer_bytes,
)
from retool.rl.config import RLConfig

ROOM = 1.3  # times the predicted activations must be free for the engine to keep its memory


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU by phase; `weights` and `cache` are the engine's, `freed` whether it gives
    them back for the update.

    `sequences`: how many of the maximum length the cache has room for. Where the GPU's memory isn't
    known, the cache is what `max_num_seqs` such sequences need, and `fits` is None.
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
) -> StepMemory:
    """Memory of a step that trains under `choice`, with an engine on every `tensor_parallel` ranks.

    `reference`: with a frozen policy. `backend`: `rollout.name`.
    """
    training = choice.prediction
    p = DTYPE_BYTES[setting.compute]
    layout = plan_layout(model, setting.shards)
    # Its shard, and what it is gathered in
    other = (layout.shard_numel + gathered(layout, setting.reshard)) * p if reference else 0.0
    state = training.state + other
    dtype = engine.dtype or DTYPES[setting.compute]
    needed = find_backend(backend).memory(model, engine, dtype, tensor_parallel, layout)
    weights = needed.weights
    work = needed.work
    page = needed.page
    size = needed.page_size
    longest = -(-(engine.max_length or model.max_position or size) // size)
    useful = float(engine.max_num_seqs * longest * page)
    cache = useful
    if device_gib is not None:
        cache = max(0.0, (device_gib * GIB - OUTSIDE - state - weights - work) * engine.kv_share)
    if engine.kv_bytes is not None:
        cache = engine.kv_bytes
    added = training.forward_backward - training.state
    left = (
        None if device_gib is None else device_gib * GIB - OUTSIDE - state - weights - cache - work
    )
    freed = (left is not None and left < ROOM * added) if free == "auto" else free
    # Recorded steps keep what they work in
    kept = weights + cache + (work if engine.use_cuda_graphs else 0)
    beside = other + (0.0 if freed else kept)
    blocks = choice.tokens * layer_bytes(model, setting, "none")
    forward = blocks + head_bytes(model, setting, choice.tokens)
    sequences = cache / (longest * page)
    found = {
        "load": training.load + other,
        "sync": state + weights,
        "rollout": state + weights + cache + work,
        "logprobs": training.state + beside + min(forward, added),
        "update": training.forward_backward + beside,
        "optimizer": training.optimizer + beside,
        "save": training.save + beside,
    }
    fits = None
    if device_gib is not None:
        fits = (
            bool(choice.fits)
            and sequences >= 1
            and max(found.values()) + OUTSIDE <= device_gib * GIB
        )
    return StepMemory(
        **found, weights=weights, cache=cache, sequences=sequences, freed=freed, fits=fits
    )
