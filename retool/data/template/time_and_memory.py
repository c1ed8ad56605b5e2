"""Limits on the time and memory of a chat template, which is a program from the model's author.

It may loop without end, or make more text than there is memory for.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from types import FrameType
from typing import TypeVar

import jinja2

T = TypeVar("T")
MOST_SECONDS = (
    10.0  # of this thread's processor time: the longest conversations take a few tenths of one
)
MOST_BYTES = 4 << 30  # more than there were before
TICK_S = 0.5  # of the process's processor time between two looks at the clock
LONGEST_TEMPLATE = 4 << 20  # bytes; the longest known has 30 KB
PAGE = os.sysconf("SC_PAGE_SIZE")


class OutOfBounds(Exception):
    """A template was stopped; the message says at which bound.

    No ValueError: another try with other messages won't help.
    """


class Bounds:
    """Whether bounds are set already.

    Inner ones cost next to nothing then: a row of many renderings pays for one.
    """

    set = False


@contextmanager
def bounded() -> Iterator[None]:
    """Bound what the body computes and allocates.

    Raises OutOfBounds after MOST_SECONDS, MemoryError above MOST_BYTES.

    Costs some ten microseconds. Python gives signals to its main thread only, so in others the body
    isn't bounded.
    """
    if Bounds.set or threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.thread_time()

    def look_at_clock(number: int, frame: FrameType | None) -> None:
        del number, frame
        if time.thread_time() - began > MOST_SECONDS:
            raise OutOfBounds(f"it computes for more than {MOST_SECONDS:g} seconds")

    # A clock of the process's own work: SIGALRM belongs to others, and a busy machine is no fault
    # of the template.
    before = signal.signal(signal.SIGVTALRM, look_at_clock)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (_at_most(_private_bytes(int(began)) + MOST_BYTES, soft, hard), hard),
        )
        signal.setitimer(signal.ITIMER_VIRTUAL, min(TICK_S, MOST_SECONDS), TICK_S)
        Bounds.set = True
        yield
    finally:
        Bounds.set = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def within_bounds(compute: Callable[[], T]) -> T:
    """What `compute` returns; under the bounds that are set already where some are."""
    if Bounds.set:
        return compute()
    with bounded():
        return compute()


def _at_most(wanted: int, *limits: int) -> int:
    """`wanted`, or the smallest of the limits that are set."""
    return min([wanted, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


@lru_cache(maxsize=1)
def _private_bytes(second: int) -> int:
    """What RLIMIT_DATA counts of this process; looked up once in each `second` of work."""
    del second
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[5]) * PAGE


def check_source(template: str) -> None:
    """Raise ValueError for a template that no bound could stop.

    That is one that is huge, or takes powers: one instruction may last for days.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template):,} characters: that is no template. Give another "
            "(data.chat_template)."
        )
    try:
        tokens = [
            value
            for _, kind, value in jinja2.Environment().lex(template)
            if kind not in ("whitespace", "data")
        ]
    except jinja2.TemplateError:
        return  # it is told with its line where it is compiled
    for before, value in pairwise(tokens):
        # After these it spreads a mapping over arguments
        if value == "**" and not re.fullmatch(r"[(,]", before):
            raise ValueError(
                "the chat template takes powers (**), which may compute without end. Give another "
                "(data.chat_template)."
            )
