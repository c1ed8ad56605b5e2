"""CUDA's streams and events in a few verbs. Without a GPU what they order has happened already."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def record_event() -> torch.cuda.Event:
    """An event that happens after everything that is enqueued on the current stream now."""
    event = torch.cuda.Event()
    event.record()
    return event


def wait_for(event: torch.cuda.Event | None) -> None:
    """What is enqueued on the current stream from here on comes after the event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


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
    with torch.cuda.stream(stream):
        wait_for(after)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return None if stream is None else record_event()
