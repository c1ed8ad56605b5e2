"""The engine: token ids in, sampled token ids with their log-probabilities out.

It knows nothing of text, tools or rewards.

    engine.sync(model)                                   the trainer's weights, after every update
    engine.start(key, ids, params, group)                any number of sequences
    while not engine.idle():
        for turn in engine.step():                       one forward; turns that ended
            engine.extend(turn.key, more_ids, params)    … or engine.drop(turn.key)

With a tensor-parallel group all ranks `sync`; then rank 0 does the above and the others `follow()`
until it calls `end()`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

from retool.engine.experts_cache import ExpertsCache, require_tellable
from retool.engine.forward import make_model, seen_by_layer
from retool.engine.kernels.attention import choose_paged
from retool.engine.kernels.kv_cache import KVCache
from retool.engine.memory import (
    CPU_PAGE_SIZE,
    GPU_PAGE_SIZE,
    EngineMemory,
    cache_bytes,
    cached_heads,
    engine_memory,
    page_bytes,
)
from retool.engine.pipeline import Pipeline
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.types import EngineOptions, SamplingParams, Stats, TurnDone
from retool.engine.weights import Weights, make_decoder
from retool.engine.worker import Worker
from retool.model.config import ModelConfig
from retool.model.rope import too_long_to_sample
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout


class Engine:
    """One engine per data-parallel rank, or per tensor-parallel `group` (heads are split over it)."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        options: EngineOptions,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Nothing is allocated before the first `sync`.

        Raises ValueError for a group larger than the number of query heads, and for sequences that
        are longer than the model's rope takes, and for experts that nobody has or can tell.
        """
        if problem := too_long_to_sample(config, options.max_length or 0):
            raise ValueError(f"max_length={options.max_length}: {problem}")
        on_gpu = device.type == "cuda"
        self.config = config
        self.device = device
        self.options = options
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.page_size = options.page_size or (GPU_PAGE_SIZE if on_gpu else CPU_PAGE_SIZE)
        self._compiled = on_gpu if options.use_compile == "auto" else options.use_compile
        self.experts: ExpertsCache | None = None
        if options.return_experts:
            require_tellable(config, 1 if self.group is None else dist.get_world_size(self.group))
            self.experts = ExpertsCache(config, device)
        self.weights = self._make_weights()
        self.scheduler: Scheduler | None = None

    @staticmethod
    def memory(
        config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
    ) -> EngineMemory:
        """What an engine will take on each of `ranks` GPUs, for preflight."""
        return engine_memory(config, options, dtype, ranks, layout)

    @torch.no_grad()
    def sync(self, sharded: Sharded) -> None:
        """Take the trainer's weights over; a collective call on all ranks of its mesh.

        Turns under way go on with the new weights.
        """
        self.weights.sync(sharded)
        if self.scheduler is None:
            self._allocate()

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        """Begin a sequence with a prompt.

        Sequences of one `group` have one prompt, which is computed once.
        """
        self._ready().start(key, list(ids), params, group)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        """Go on with a sequence whose turn is done: `ids` come after its last sampled token."""
        self._ready().extend(key, list(ids), params)

    def drop(self, key: Hashable) -> None:
        """Forget a sequence, in whatever state it is."""
        self._ready().drop(key)

    def idle(self) -> bool:
        """Whether there is nothing to compute and nothing to report."""
        s = self.scheduler
        return s is None or not (s.running or s.waiting or s.refused)

    @property
    def stats(self) -> Stats:
        return self._ready().stats

    @torch.no_grad()
    def step(self) -> list[TurnDone]:
        """One forward and the turns that ended with it.

        Where it runs ahead, the next forward starts before this one is read.
        """
        self._ready()
        return self._pipeline.step()

    @torch.no_grad()
    def follow(self) -> None:
        """Ranks of the group other than 0: compute what rank 0 sends until it calls `end`."""
        self._ready()
        self._worker.follow()

    def end(self) -> None:
        """Rank 0: let the others return from `follow`."""
        if self.group is not None:
            self._ready()
            self._worker.end()

    def release(self) -> None:
        """Give back the memory of weights, cache and graphs, until the next `sync`.

        Every sequence is forgotten.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step that was started ahead may still run
        # Graphs were recorded over these addresses: they go with the worker below.
        self.weights.buffers.clear()
        if self.experts is not None:
            self.experts.allocate(0, 0)
        self.weights = self._make_weights()
        # A run releases an engine that failed, and all of them for the update
        if self.scheduler is not None:
            del self._worker, self._pipeline
        self.scheduler = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing outlives it."""

    def _ready(self) -> Scheduler:
        if self.scheduler is None:
            raise ValueError("the engine has no weights: call sync(model) first.")
        return self.scheduler

    def _make_weights(self) -> Weights:
        decoder = make_decoder(
            self.config,
            self.device,
            self.group,
            self._compiled,
            self.experts,
        )
        return Weights(decoder, self.options.dtype, self.device)

    def _allocate(self) -> None:
        """Make the KV cache, and what plans and runs over it."""
        options = self.options
        config = self.config
        dtype = self.weights.dtype
        assert dtype is not None
        heads = cached_heads(self.weights.decoder.execution.plan)
        shape = config.layers, self.page_size, heads, config.head_dim
        longest = options.max_length or config.max_position or (1 << 62)
        if config.steady_length:
            # The last token that is sampled has no key, but counts where the sequence is trained on
            longest = min(longest, config.steady_length - 1)
        pages = self._count_pages(page_bytes(shape, dtype), dtype, longest)
        scheduler = Scheduler(
            PagePool(pages, self.page_size),
            options.max_num_seqs,
            # Deterministic: as many tokens in every step, so that its shapes depend on nobody else
            options.max_num_seqs if options.deterministic else options.max_batch_tokens,
            longest,
        )
        cache = KVCache(shape, pages, dtype, self.device)
        if self.experts is not None:
            self.experts.allocate(pages, self.page_size)
            cache.follower = self.experts.copy
        seen = seen_by_layer(config, longest)
        kernels = choose_paged(
            self.device,
            dtype,
            config.head_dim,
            self.page_size,
            windowed=any(layer.window for layer in seen),
            capped=config.score_cap > 0,
        )
        model = make_model(self.weights.decoder, cache, self.group, kernels, seen)
        width = scheduler.pool.pages_for(scheduler.max_length)
        self._worker = Worker(model, options, width)
        self._pipeline = Pipeline(scheduler, self._worker, options)
        self.scheduler = scheduler

    def _count_pages(self, page: int, dtype: torch.dtype, longest: int) -> int:
        """How many pages of so many bytes the cache has. ValueError if there is room for none."""
        options = self.options
        # More than all sequences at their longest would never be filled
        useful = options.max_num_seqs * min(longest, 1 << 40) // self.page_size * page
        pages = cache_bytes(options, self.config, dtype, self.device, self.group, useful) // page
        # Page 0 is never given out
        if pages < 2:
            raise ValueError(
                f"the KV cache has room for {max(pages - 1, 0)} pages of {self.page_size} tokens "
                f"({page:,} bytes each): raise kv_bytes (gpu_memory_utilization) or use a smaller "
                "page_size."
            )
        return pages
