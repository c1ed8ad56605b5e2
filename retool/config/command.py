"""What every command does around its `main`: it sets its own number of threads, and ends without a
traceback if the user ended it.
"""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE


def exit_status(main: Callable[[], int]) -> int:
    """`main`'s status; 130 after Ctrl-C; 141 where the reader of a pipe (`| head`) went away."""
    # A legacy terminal shows "?" for a character that it hasn't
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():  # another pipe broke: a fault like any other
            raise
        # What Python still flushes at its end has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def in_own_words(error: Exception, words: Mapping[str, str]) -> str:
    """What an error says where a command has `words` of its own for keys of a run, or for sentences
    about them: it reads data and templates as a run does, and there the faults are found.
    """
    told = str(error)
    for theirs, own in words.items():
        # Not within a longer name, or a path
        before = r"(?<![\w./-])" if theirs[0].isalpha() else ""
        told = re.sub(rf"{before}{re.escape(theirs)}(?!\w|/|\.\w)", own, told)
    return told


def topics_of(words: Sequence[str]) -> list[str]:
    """What is asked for besides `--help`: groups of keys, or parts of their names."""
    return [word for word in words if not word.startswith("-") and "=" not in word]


def calm_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Called before torch is imported: its CPU threads sleep while they wait, unless the user has
    set it otherwise.

    By default they spin between two operations. Beside the processes that read the data there are
    more threads than cores, and what spins keeps a core from what works: on two busy cores a step
    of a small model takes ten times longer, for twice the CPU time. Several ranks on one machine
    that no torchrun started have a thread each, as it would give them.
    """
    if "OMP_NUM_THREADS" in environment:
        return
    if int(environment.get("LOCAL_WORLD_SIZE", 1)) > 1:
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def calm_while_loading() -> Iterator[None]:
    """`calm_threads` for imports in this block. Afterwards the environment is as it was.

    For a program that isn't ours: torch reads the environment when it is loaded, and never again.
    """
    if "torch" in sys.modules:
        yield
        return
    before = dict(os.environ)
    calm_threads()
    added = {*os.environ} - {*before}
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
