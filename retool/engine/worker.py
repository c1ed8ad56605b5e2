"""One rank's device side: the model with its KV cache, and what runs batches on it.

[Note: ranks of an engine] With a tensor-parallel group only rank 0 schedules. It sends each forward's
arrays to the others, which `follow` until it calls `end`: so all ranks run the same forwards.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from retool.engine.chunks import Chunks
from retool.engine.decode import DecodeLoop
from retool.engine.forward import Model
from retool.engine.runner import Flight, Recordings, run_once
from retool.engine.schedule.batch import Batch, Change
from retool.engine.types import EngineOptions
from retool.parallel.shared_work import SharedWork

# once: any batch, with shapes of its own · start: single tokens, which the decode loop takes over ·
# again: the loop's next step · chunks: a batch without single tokens
Kind = Literal["once", "start", "again", "chunks"]


class Worker:
    """Planned work in, flights out. `loop` is None where nothing runs ahead, `chunks` where they
    are computed together with single tokens.
    """

    def __init__(self, model: Model, options: EngineOptions, width: int) -> None:
        """`width`: pages of the longest sequence."""
        self.model = model
        self.shared = SharedWork(model.group)
        self.loop: DecodeLoop | None = None
        self.chunks: Chunks | None = None
        self._drawn: Tensor | None = None  # [3, R] by the last chunks
        on_gpu = model.cache.data.is_cuda
        # Sorting tokens by expert, and products whose sizes follow from it, weren't recorded yet
        graphs = options.use_cuda_graphs and on_gpu and model.decoder.config.experts is None
        recordings = Recordings() if graphs else None
        # torch's attention would gather whole page tables
        paged = model.kernels != "torch"
        if paged if options.run_ahead == "auto" else options.run_ahead:
            rows = round_up(options.max_num_seqs, model.plan.sp)
            self.loop = DecodeLoop(model, rows, width, recordings, options.deterministic)
            # … and has to know the chunks' lengths on the host
            if paged and not options.deterministic:
                self.chunks = Chunks(
                    model, options.max_batch_tokens, options.max_num_seqs, width, recordings
                )

    def run(self, kind: Kind, work: Batch | Change) -> Flight | None:
        """Rank 0: compute it on every rank of the group; None where rows only get ready."""
        return self.shared.do(self._execute, (kind, work))

    def follow(self) -> None:
        """The other ranks: compute what rank 0 sends until it calls `end`."""
        self.shared.follow(self._execute)

    def end(self) -> None:
        """Rank 0: let the others return from `follow`."""
        self.shared.end()

    def _execute(self, message: tuple[Kind, Batch | Change]) -> Flight | None:
        kind, work = message
        if kind == "again":
            assert self.loop is not None and isinstance(work, Change)
            return self.loop.again(work, self._drawn)
        assert isinstance(work, Batch)
        if kind == "once":
            return run_once(self.model, work)
        if kind == "chunks":
            assert self.chunks is not None
            # The next decode step may need these draws before the host has read them
            flight = self.chunks.run(work)
            self._drawn = flight.on_device
            return flight
        assert self.loop is not None
        return self.loop.start(work)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
