"""The engine: token ids in, sampled token ids with their log-probabilities out.

It knows nothing of text, tools or rewards.

    engine.sync(model)                                   the trainer's weights, after every update
    engine.start(key, ids, params, group)                any number of sequences
    while not engine.idle():
        for turn in engine.step():                       one forward; turns that ended
            engine.extend(turn.key, more_ids, params)    … or engine.drop(turn.key)

With a tensor-parallel group all ranks `sync`; then rank 0 does the above and the others `follow()`
until it calls `end()`: they get each forward's batch from it, so they never schedule.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from retool.engine.chunks import Chunks
from retool.engine.forward import make_model
from retool.engine.kernels.attention import choose_paged
from retool.engine.kernels.kv_cache import KVCache
from retool.engine.memory import cache_bytes, cached_heads, page_bytes
from retool.engine.runner import DecodeLoop, Flight, Recordings, run_once
from retool.engine.schedule import sequence as seq
from retool.engine.schedule.ahead import plan_ahead
from retool.engine.schedule.batch import make_batch, make_change
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.types import EngineOptions, SamplingParams, Stats, TurnDone
from retool.engine.weights import Weights, make_decoder
from retool.model.config import ModelConfig
from retool.parallel.fsdp import Sharded


class Part(NamedTuple):
    """A forward whose draws weren't looked at: whose they are, and how many tokens each had. Who
    ends meanwhile is taken out of it. Without a `flight` there are rows only, that wait for the
    next one.
    """

    flight: Flight | None
    rows: list[seq.Sequence | None]
    lengths: list[int]


class Flying(NamedTuple):
    """A step that was started: single tokens in the loop, and chunks beside them; `other` can't be
    repeated.
    """

    loop: Part | None = None
    chunks: Part | None = None
    other: Part | None = None


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

        Raises ValueError for a group larger than the number of query heads.
        """
        cuda = device.type == "cuda"
        self.config = config
        self.device = device
        self.options = options
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.page_size = options.page_size or (256 if cuda else 16)
        compiled = cuda if options.use_compile == "auto" else options.use_compile
        self.weights = Weights(
            make_decoder(config, device, self.group, compiled), options.dtype, device
        )
        self.plan = self.weights.decoder.execution.plan
        self.scheduler: Scheduler | None = None
        self._flying: Flying | None = None
        self._drawn: torch.Tensor | None = None  # by the last chunks, [3, R]

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
        scheduler = self._ready()
        flying = self._flying or self._launch(scheduler)
        done: list[TurnDone] = []
        self._flying = None
        if flying is not None:
            self._flying = self._repeat(scheduler, flying)
            for part in filter(None, flying):
                done += self._accept(scheduler, part)
        done += scheduler.refused
        scheduler.refused = []
        return done

    def _accept(self, scheduler: Scheduler, part: Part) -> list[TurnDone]:
        """Append what was drawn, and return the turns that this ends."""
        done = []
        draws = part.flight.read().tolist() if part.flight is not None else [[]] * 3
        # A recorded step may have more rows
        for row, length, token, logp, behaviour in zip(
            part.rows, part.lengths, *draws, strict=False
        ):
            if row is not None and row.is_running and len(row.tokens) == length:
                turn = scheduler.accept(row, int(token), logp, behaviour)
                if turn is not None:
                    done.append(turn)
        return done

    def release(self) -> None:
        """Give back the memory of weights, cache and graphs, until the next `sync`.

        Every sequence is forgotten.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step that was started ahead may still run
        self.weights.buffers.clear()
        decoder = make_decoder(
            self.config, self.device, self.group, self.weights.decoder.execution.compiled
        )
        self.weights = Weights(decoder, self.options.dtype, self.device)
        self.scheduler = self._flying = self._drawn = None
        del self._model, self._loop, self._chunks
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ── tensor-parallel ranks other than 0
    # ───────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def follow(self) -> None:
        """Compute what rank 0 sends until it calls `end`."""
        self._ready()
        while (message := self._broadcast(None)) is not None:
            kind, work = message
            self._execute(kind, work)

    def end(self) -> None:
        """Rank 0: let the others return from `follow`."""
        if self.group is not None:
            self._broadcast(None)

    def _broadcast(self, message: object) -> tuple | None:
        box = [message]
        dist.broadcast_object_list(box, group=self.group, group_src=0, device=torch.device("cpu"))
        return box[0]  # pyright: ignore[reportReturnType]

    # ── inside
    # ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _ready(self) -> Scheduler:
        if self.scheduler is None:
            raise ValueError("the engine has no weights: call sync(model) first.")
        return self.scheduler

    def _allocate(self) -> None:
        o = self.options
        dtype = self.weights.dtype
        assert dtype is not None
        shape = self.config.layers, self.page_size, cached_heads(self.plan), self.config.head_dim
        size = page_bytes(shape, dtype)
        longest = o.max_length or self.config.max_position or (1 << 62)
        useful = o.max_num_seqs * min(longest, 1 << 40) // self.page_size * size
        pages = cache_bytes(o, self.config, dtype, self.device, self.group, useful) // size
        if pages < 2:
            raise ValueError(
                f"the KV cache has room for {max(pages - 1, 0)} pages of {self.page_size} tokens "
                f"({size:,} bytes each): raise kv_bytes (gpu_memory_utilization) or use a smaller "
                "page_size."
            )
        cache = KVCache(shape, pages, dtype, self.device)
        rows = -(-o.max_num_seqs // self.plan.sp) * self.plan.sp
        self.scheduler = Scheduler(
            PagePool(pages, self.page_size),
            o.max_num_seqs,
            o.max_num_seqs if o.deterministic else o.max_batch_tokens,
            longest,
        )
        kernels = choose_paged(self.device, dtype, self.config.head_dim, self.page_size)
        self._model = make_model(self.weights.decoder, cache, self.group, kernels)
        width = self.scheduler.pool.pages_for(self.scheduler.max_length)
        recordings = Recordings() if o.use_cuda_graphs and self.device.type == "cuda" else None
        paged = kernels != "torch"
        # torch's attention would gather whole page tables
        ahead = paged if o.run_ahead == "auto" else o.run_ahead
        self._loop = (
            DecodeLoop(self._model, rows, width, recordings, o.deterministic) if ahead else None
        )
        # torch's attention has to know the chunks' lengths on the host
        apart = ahead and paged and not o.deterministic
        self._chunks = (
            Chunks(self._model, o.max_batch_tokens, o.max_num_seqs, width, recordings)
            if apart
            else None
        )

    def _launch(self, scheduler: Scheduler) -> Flying | None:
        step = scheduler.plan()
        if step is None:
            return None
        scheduler.stats.steps += 1
        singles, chunks = (
            [i for i in step.items if (i.count > 1) is several] for several in (False, True)
        )
        plain = all(item.draws for item in singles)
        if self._chunks is not None and chunks:
            loop = self._part("start", seq.Step(singles, step.copies)) if singles else None
            beside = self._part("chunks", seq.Step(chunks, [] if singles else step.copies))
            return Flying(loop, beside) if plain else Flying(None, beside, loop)
        if self._loop is None or (chunks and not self.options.deterministic):
            return Flying(other=self._part("once", step))
        part = self._part("start", step)
        return Flying(part) if plain and not chunks else Flying(other=part)

    def _part(self, kind: str, step: seq.Step) -> Part:
        """Start a forward."""
        fixed = self.options.deterministic
        ranks = self.plan.sp
        multiple = (
            1
            if kind == "chunks"
            else -(-self.options.max_num_seqs // ranks) * ranks
            if fixed
            else ranks
        )
        batch, rows = make_batch(
            step, self.page_size, multiple, all_rows=fixed or self._loop is not None, expand=fixed
        )
        return Part(
            self._send(kind, batch), rows, [0 if row is None else len(row.tokens) for row in rows]
        )

    def _repeat(self, scheduler: Scheduler, flying: Flying) -> Flying | None:
        """Start the next decode step of the same sequences, and chunks beside it, if nothing else
        is to be done first.
        """
        over = (
            [
                slot
                for slot, row in enumerate(flying.loop.rows)
                if row is not None and not row.is_running
            ]
            if flying.loop
            else []
        )
        # A sequence that ended may run again before its draw in vain is read
        for part in filter(None, flying):
            part.rows[:] = [
                row if row is not None and row.is_running else None for row in part.rows
            ]
        if flying.other is not None:
            return None
        rows = [*flying.loop.rows] if flying.loop else []
        while rows and rows[-1] is None:
            rows.pop()
        step = plan_ahead(
            scheduler, rows, flying.chunks.rows if flying.chunks else [], self._chunks is not None
        )
        if step is None:
            return None
        scheduler.stats.steps += 1
        flight = self._send("again", make_change(step, over, flying.loop is None))
        loop = Part(flight, step.rows, [0 if row is None else row.computed for row in step.rows])
        return Flying(
            loop, self._part("chunks", seq.Step(step.chunks, [])) if step.chunks else None
        )

    def _send(self, kind: str, work: object) -> Flight | None:
        if self.group is not None:
            self._broadcast((kind, work))
        return self._execute(kind, work)

    def _execute(self, kind: str, work: Any) -> Flight | None:
        if kind == "once":
            return run_once(self._model, work)
        if kind == "chunks":
            assert self._chunks is not None
            flight = self._chunks.run(work)
            self._drawn = flight.on_device
            return flight
        assert self._loop is not None
        return self._loop.start(work) if kind == "start" else self._loop.again(work, self._drawn)
