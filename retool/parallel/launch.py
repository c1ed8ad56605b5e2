"""`retool sft --nproc_per_node=2 …`: torchrun's launcher in this process, without its last words.

torchrun ends every failed run with its own traceback and a report, thirty lines under a fault that
takes one. Nothing that a worker does makes it say less. The workers are started by the same code
here, so ranks, restarts and signals are what they are with torchrun; only how it ends is told by us.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from retool.config.elsewhere import FLAGS, LAUNCHERS, plain
from retool.parallel.agreement import describe
from retool.parallel.meeting import OWN_STORES

SEVERAL_MACHINES = ("nnodes", "rdzv_endpoint", "rdzv_backend", "master_addr", "master_port")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of torchrun, the other words)."""
    options: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or plain(name) not in LAUNCHERS:
            others.append(word)
            continue
        options.append(word)
        if not equals and plain(name) not in FLAGS and left:
            options.append(left.pop(0))
    return options, others


def launch(module: str, options: Sequence[str], words: Sequence[str]) -> int:
    """Run `python -m module words` in as many processes as torchrun's `options` say: the exit status
    of the first that failed, or 0. Where torchrun's own code fails, that is said in a line, and it is 1.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a warning
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    names = {plain(option.partition("=")[0]) for option in options}
    alone = [] if names & {*SEVERAL_MACHINES, "standalone"} else ["--standalone"]
    if any(_starts_again(option) for option in options):
        os.environ.setdefault(OWN_STORES, "1")
    arguments = parse_args([*alone, *options, "-m", module, *words])
    logging.disable(logging.ERROR)  # what it says of workers that end, they say themselves
    try:
        run(arguments)
    except ChildFailedError as error:
        return _status(*error.get_first_failure())
    except SignalException as error:
        return 128 + int(error.sigval)
    except Exception as error:  # of what the options ask for, each part of it raises its own kind
        print(f"error: {_problem(error, arguments, options)}", file=sys.stderr)
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _problem(error: Exception, arguments: Any, options: Sequence[str]) -> str:
    """Why torchrun's own code ended, and the way out."""
    if "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT={arguments.master_port}: is taken by another process on this machine. Choose "
            "another --master_port, or --standalone on one machine."
        )
    given = " ".join(options)
    return f"the launcher ended ({describe(error)}). Check torchrun's options: {given}"


def _starts_again(option: str) -> bool:
    """Whether an option of torchrun allows for restarts."""
    name, _, value = option.partition("=")
    return plain(name) == "max_restarts" or (plain(name) == "nnodes" and ":" in value)


def _status(rank: int, failure: Any) -> int:
    """The exit status of a worker; of one that couldn't say what happened, it is said here."""
    code = int(failure.exitcode)
    if code < 0:
        name = signal.Signals(-code).name
        print(f"error: rank {rank} was ended by {name}.", file=sys.stderr)
        return 128 - code
    return code
