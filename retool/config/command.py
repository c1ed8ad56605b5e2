"""What every command has around its `main`: its own threads, and an end without a traceback where the
user ended it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE


def exit_status(main: Callable[[], int]) -> int:
    """`main`'s status; 130 after Ctrl-C; 141 where the reader of a pipe (`| head`) went away."""
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
