"""A `RolloutEngine` that samples with transformers, for borrowed models.

sync      the trainer's weights, shared or gathered
start     the first of a rollout makes the cache: prompts of other weights aren't found in it
step      one forward, and the turns that ended with it
release   the cache is given back, and weights that were gathered
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

from retool.engine.hf.batching import Batching, Ended, Room, Sampling, flash_is_right
from retool.engine.hf.module import SamplingModule
from retool.engine.memory import EngineMemory, cache_bytes, page_bytes, useful_bytes, work_bytes
from retool.engine.requests import Request, Requests
from retool.engine.types import EngineOptions, SamplingParams, TurnDone
from retool.model.config import ModelConfig
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout

GPU_PAGE_SIZE = 256
CPU_PAGE_SIZE = 16


class HfEngine:
    """One per rank. All sequences of a rollout are sampled alike, but for their seeds."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        options: EngineOptions,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Nothing is made before the first `sync`. ValueError for a group of ranks."""
        if group is not None and dist.get_world_size(group) > 1:
            raise ValueError("rollout.name=hf has an engine on each GPU; one can't span several.")
        self.config = config
        self.device = device
        self.options = options
        self.requests = Requests(options.max_length or 0)
        self.module: SamplingModule | None = None
        self.batching: Batching | None = None
        self._room: Room | None = None

    @staticmethod
    def memory(
        config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
    ) -> EngineMemory:
        """See `RolloutEngine`. Weights that one process has are shared."""
        size = options.page_size or GPU_PAGE_SIZE
        whole = sum(unit.numel for unit in layout.units) * dtype.itemsize
        return EngineMemory(
            weights=whole if layout.shards > 1 else 0,
            work=work_bytes(options, config, dtype),
            page=page_bytes((config.layers, size, config.kv_heads, config.head_dim), dtype),
            page_size=size,
        )

    @torch.no_grad()
    def sync(self, sharded: Sharded) -> None:
        """Take the trainer's weights over; a turn under way ends here. Collective.

        ValueError for a model that isn't transformers', and where the cache has no room.
        """
        self.requests.forget()
        self.batching = None
        if self.module is None:
            self.module = SamplingModule(sharded)
        self.module.take(sharded)
        if self._room is None:
            self._room = self._measure(sharded)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        """See `Sampler`. Samples of a group find their prompt in the cache."""
        self._add(self.requests.start(key, ids, params))

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        """See `Sampler`."""
        self._add(self.requests.extend(key, ids, params))

    def drop(self, key: Hashable) -> None:
        """See `Sampler`."""
        request = self.requests.drop(key)
        if request is not None and self.batching is not None:
            self.batching.cancel(request.name)

    @torch.no_grad()
    def step(self) -> list[TurnDone]:
        """See `Sampler`."""
        turns = self.requests.take_refused()
        for ended in [] if self.batching is None else self.batching.step():
            # None where it was dropped meanwhile: transformers may finish a request that was
            # cancelled.
            request = self.requests.under_way(ended.name)
            if request is not None:
                reason = _reason(request, ended)
                turn = self.requests.finish(ended.name, ended.tokens, ended.logp, reason)
                assert turn is not None
                turns.append(turn)
        return turns

    def idle(self) -> bool:
        """See `Sampler`."""
        return self.requests.idle

    def follow(self) -> None:
        """Every rank has an engine of its own."""

    def end(self) -> None:
        """Nobody follows."""

    def release(self) -> None:
        """Give cache and gathered weights back until the next `sync`; every sequence is forgotten."""
        self.requests.forget()
        self.batching = None
        if self.module is not None:
            self.module.release()
        # Measured anew at the next sync: what is free on the GPU may be another number then.
        self._room = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing outlives it but memory, which goes."""
        self.release()

    def _measure(self, sharded: Sharded) -> Room:
        """How large the cache is. ValueError where it has no room for a sequence."""
        options = self.options
        dtype = sharded.param_dtype
        on_gpu = self.device.type == "cuda"
        size = options.page_size or (GPU_PAGE_SIZE if on_gpu else CPU_PAGE_SIZE)
        config = self.config
        page = page_bytes((config.layers, size, config.kv_heads, config.head_dim), dtype)
        longest = options.max_length or config.max_position or size
        useful = useful_bytes(options, longest, size, page)
        room = cache_bytes(options, config, dtype, self.device, None, useful)
        pages = min(room, useful) // page
        if pages * size < longest:
            raise ValueError(
                f"the KV cache has room for {pages * size:,} tokens, and a sequence may have "
                f"{longest:,}: raise gpu_memory_utilization, or lower data.max_response_length."
            )
        return Room(size, pages, options.max_batch_tokens, options.max_num_seqs)

    def _add(self, request: Request | None) -> None:
        if request is None:
            return
        params = request.params
        sampling = Sampling(params.temperature, params.top_p, params.top_k)
        if self.batching is None or self.batching.sampling != sampling:
            self.batching = self._begin(sampling, request.seed)
        self.batching.add(request)

    def _begin(self, sampling: Sampling, seed: int) -> Batching:
        """A rollout's first request gives the seed of its draws."""
        if self.module is None or self._room is None:
            raise ValueError("the engine has no weights: call sync(model) first.")
        if self.requests.count > 1:
            raise ValueError("rollout.name=hf samples all turns that are under way alike.")
        causal = self.module.causal
        room = self._room
        flash = flash_is_right(self.config, self.device, causal.dtype, room.page_size)
        return Batching(causal, sampling, room, seed, flash)


def _reason(request: Request, ended: Ended) -> str:
    """Why a request ended; its last token tells."""
    stopped = bool(ended.tokens) and ended.tokens[-1] in request.params.stop_ids
    return "stop" if stopped else "length"
