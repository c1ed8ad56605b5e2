"""CUDA's streams without a GPU: the code that orders them runs on CPU tensors, and every access
that nothing orders is an error.

Each stream has a vector clock (Lamport 1978; Fidge, Mattern 1988): what it has done, and what it
knows the others to have done, from the events it waited for. An operation on some bytes must know
of the last writes to them, a write of the last reads too, and the stream that memory was made by
must know of everything done with it before it may be used for something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[int, int]


class Stream:
    made = 0
    device_index = 0

    def __init__(self, device: object = None) -> None:
        Stream.made += 1
        self.number = Stream.made
        self.clock: Clock = {self.number: 0}

    def wait_event(self, event: Event) -> None:
        for number, count in event.clock.items():
            self.clock[number] = max(self.clock.get(number, 0), count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event(other.clock))


class Event:
    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = dict(clock or {})

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


@dataclass
class Access:
    low: int
    high: int
    stream: int
    count: int
    writes: bool
    what: str


@dataclass
class Memory:
    alive: StorageWeakRef
    maker: Stream | None  # None: made before anything was watched
    accesses: list[Access] = field(default_factory=list)


class Unordered(AssertionError):
    """Two accesses to the same bytes, or an access and the reuse of its memory, in no order."""


class Streams(TorchDispatchMode):
    """Watches every operation; `now` is the stream that it is enqueued on."""

    now = Stream()

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Memory] = {}
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(self._inputs(func, args, kwargs))
        known = {t.untyped_storage()._cdata for t, _ in inputs}
        out = func(*args, **kwargs)
        made = [
            t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)
        ]
        new = [t for t in made if t.untyped_storage()._cdata not in known]
        if new or any(writes for _, writes in inputs) or not made:  # else a view
            self.access(
                [*inputs, *((t, True) for t in new)],
                str(func),
                {t.untyped_storage()._cdata for t in new},
            )
        return out

    def _inputs(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
        for i, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            yield from (
                (t, writes)
                for t in (value if isinstance(value, (tuple, list)) else [value])
                if isinstance(t, Tensor)
            )

    def access(
        self, tensors: list[tuple[Tensor, bool]], what: str, new: set[int] = frozenset()
    ) -> None:  # type: ignore[assignment]
        """One operation on the present stream that reads or writes these tensors."""
        self._reuse_freed()
        stream = Streams.now
        self.operations = self.operations + 1
        stream.clock[stream.number] += 1
        for tensor, writes in tensors:
            storage = tensor.untyped_storage()
            memory = self.memory.get(storage._cdata)
            if memory is None:
                memory = self.memory[storage._cdata] = Memory(
                    StorageWeakRef(storage), stream if storage._cdata in new else None
                )
            low = tensor.storage_offset() * tensor.element_size()
            high = (
                low
                + (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1)
                * tensor.element_size()
            )
            mine = Access(low, high, stream.number, stream.clock[stream.number], writes, what)
            for other in memory.accesses:
                if (
                    other.low < high
                    and low < other.high
                    and (writes or other.writes)
                    and not _knows(stream.clock, other)
                ):
                    raise Unordered(
                        f"{what} on stream {stream.number} is in no order with {other.what} on stream {other.stream}"
                    )
            memory.accesses = [
                a for a in memory.accesses if not (writes and low <= a.low and a.high <= high)
            ]
            memory.accesses.append(mine)

    def _reuse_freed(self) -> None:
        """Memory that is free now may be given to what its maker does next."""
        for key, memory in list(self.memory.items()):
            if memory.alive.expired():
                for access in memory.accesses:
                    if memory.maker is not None and not _knows(memory.maker.clock, access):
                        raise Unordered(
                            f"memory used by {access.what} on stream {access.stream} is free for stream {memory.maker.number}"
                        )
                del self.memory[key]


def _knows(clock: Clock, access: Access) -> bool:
    return clock.get(access.stream, 0) >= access.count


def _set(stream: Stream) -> None:
    Streams.now = stream


@contextmanager
def watched() -> Iterator[Streams]:
    """Streams instead of CUDA's for `retool.parallel.fsdp.overlap` and what stands on it;
    collectives are done at once.
    """
    from retool.parallel import collectives
    from retool.parallel.fsdp import overlap

    streams = Streams()

    def noted(collective: Any) -> Any:
        def run(out: Tensor, source: Tensor, group: Any) -> None:
            streams.access([(source, False), (out, True)], collective.__name__)
            collective(out, source, group=group)

        return run

    def send_parts(received: Tensor, flat: Tensor, group: Any) -> list[Any]:
        streams.access([(flat, False), (received, True)], "send_parts")
        return collectives.send_parts(received, flat, group)

    def sum_over(shard: Tensor, group: Any) -> None:
        streams.access([(shard, True)], "all_reduce")
        collectives.sum_over(shard, group)

    def start(self: overlap.Overlap, device: torch.device) -> None:
        self.gather_stream, self.reduce_stream = Stream(), Stream()  # type: ignore[assignment]
        self.replica_stream = Stream()  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "set_stream", _set)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda _: Streams.now)
        patch.setattr(overlap.Overlap, "__init__", start)
        for name in ("all_gather_flat", "reduce_scatter_flat"):
            patch.setattr(overlap, name, noted(getattr(overlap, name)))
        patch.setattr(overlap, "sum_over", sum_over)
        patch.setattr(overlap, "send_parts", send_parts)
        with streams:
            yield streams
