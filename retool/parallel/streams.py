"""CUDA's streams and events in a few verbs. Without a GPU what they order has happened already.

They are called several times for each unit of each micro-batch, so the host's time counts: torch's
own ways to the current stream and to `with torch.cuda.stream` cost it several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def current_stream() -> torch.cuda.Stream:
    """The stream that this thread enqueues on."""
    # Given no index, torch takes long to find the device
    return torch.cuda.current_stream(torch.cuda.current_device())


class OnStream:
    """`with OnStream(stream)`: what is inside is enqueued on the stream; the thread is on its device
    from then on. None: it stays where it is.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.before: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        if self.stream is not None:
            self.before = torch.cuda.current_stream(self.stream.device_index)
            torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            torch.cuda.set_stream(self.before)


def record_event(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """An event that happens after everything that is enqueued on the stream now; without one, on the
    current stream.
    """
    event = torch.cuda.Event()
    event.record(current_stream() if stream is None else stream)
    return event


def wait_for(event: torch.cuda.Event | None) -> None:
    """What is enqueued on the current stream from here on comes after the event."""
    if event is not None:
        current_stream().wait_event(event)


def start_copy_to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A pinned tensor that has the values of one on CUDA once the event has happened."""
    # Pinned, or the copy would make the host wait.
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, record_event()


def start_copies(
    stream: torch.cuda.Stream | None,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    after: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    """Copy each (target, source) on `stream`, once `after` has happened.

    Returns the event of their end; without a stream they are copied here and now.
    """
    with OnStream(stream):
        wait_for(after)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return None if stream is None else record_event(stream)
