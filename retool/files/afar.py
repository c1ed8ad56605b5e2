"""Data on a remote store, which may fail in a dozen ways of its own or say nothing any more: it is
asked in a thread, and given up after a while. A store's client alone may try for hours.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
SILENCE_S = 300.0
WAY_OUT = "Check the store and the address, or copy the file here; then start again."
LOOK_S = 1.0  # between two looks whether anybody still wants more


def is_remote(file: str) -> bool:
    return "://" in file and not file.startswith(("file://", "local://"))


def answer(file: str, ask: Callable[[], T]) -> T:
    """What `ask` returns; of a remote file within SILENCE_S, else ValueError."""
    if not is_remote(file):
        return ask()
    return next(items(file, lambda: iter([ask()])))


def items(file: str, make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """`make()`'s items; of a remote file each within SILENCE_S, one ahead. ValueError names the file."""
    if not is_remote(file):
        yield from make()
        return
    # One ahead: the next item comes while this one is worked on, and no more lie in memory
    ready: queue.Queue[tuple[str, T | Exception | None]] = queue.Queue(1)
    unwanted = threading.Event()
    work = threading.Thread(
        target=_work, args=(make, ready, unwanted), name="retool-remote-data", daemon=True
    )
    work.start()
    try:
        while True:
            try:
                kind, item = ready.get(timeout=SILENCE_S)
            except queue.Empty:
                raise ValueError(
                    f"{file}: the store has said nothing for {SILENCE_S:g} s. {WAY_OUT}"
                ) from None
            # These say in words of their own what is wrong with the file
            if isinstance(item, (ValueError, FileNotFoundError, PermissionError)):
                raise item
            if isinstance(item, Exception):
                why = f"{type(item).__name__}: {item}"
                raise ValueError(f"{file} can't be read ({why}). {WAY_OUT}") from item
            if kind == "end":
                return
            yield item  # pyright: ignore[reportReturnType]
    finally:
        unwanted.set()


def _work(
    make: Callable[[], Iterator[T]],
    ready: queue.Queue[tuple[str, T | Exception | None]],
    unwanted: threading.Event,
) -> None:
    def give(kind: str, item: T | Exception | None) -> bool:
        while not unwanted.is_set():
            try:
                ready.put((kind, item), timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in make():
            if not give("item", item):
                return
    # Any of a dozen clients' own exceptions
    except Exception as error:
        give("error", error)
    else:
        give("end", None)
