"""Limits on tokenizers of unknown origin: how much their settings may make of a text, and a trial
run.

The library that runs them is compiled. No signal stops it at work, and where it finds no memory it
ends the process. So a tokenizer is loaded in a child process first, with limits, and is given texts
there that patterns without bounds choke on.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import json
import os
import re
import resource
import select
import signal
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info >= (3, 11):
    from re import _parser as patterns
else:
    import sre_parse as patterns

TRIAL_SECONDS = 30  # of processor time; the largest known vocabularies load in three
TRIAL_BYTES = 4 << 30  # more than the process has
WAITED_SECONDS = 600  # by the clock, for a child that computes nothing
STUCK_SECONDS = 600.0  # of the process's processor time, for one row; it takes a few thousandths
# What one character may become. The longest that Unicode's own forms make of one has 54 bytes.
MOST_GROWTH = 100
LONGEST_TOKEN = 10_000  # characters; the longest known are runs of a few hundred spaces
LONGEST_ANSWER = 2_000  # bytes
RUN = 4_000  # characters of a probe
PROBES = ("a", "a ", " ", "\n", "0", "é", "(", "Ab1", "<|")
CHAINS = ("normalizers", "pretokenizers", "decoders")
WAY_OUT = "Take the tokenizer from the model's origin."


def check_tokenizer(file: Path, load: Callable[[], Any]) -> None:
    """Raise ValueError, which names `file`, for a tokenizer that has no bounds in time or memory.

    `load` gives its `tokenizers.Tokenizer`, or None where it has none; it is called in a child.
    """
    found = file.stat()
    wrong = _trial(file, (found.st_size, found.st_mtime_ns, found.st_ino), load)
    if wrong:
        raise ValueError(f"{file}: {wrong} {WAY_OUT}")


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Raise a compiled tokenizer's panic, which is no Exception, as a ValueError."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise ValueError(
            f"the tokenizer gives up at this text ({error}): a pattern in its tokenizer.json tries "
            f"too many ways to match. {WAY_OUT}"
        ) from None


@contextlib.contextmanager
def stuck_ends_process() -> Iterator[None]:
    """End the process, with its stack on stderr, if the body computes for STUCK_SECONDS.

    The last resort for a pattern that only some text of the data chokes: nothing gentler reaches
    compiled code. Nothing happens where somebody else uses SIGPROF.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
        yield
        return
    # It needs no interpreter, and passes the signal on to the system, which ends the process.
    faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)
    signal.setitimer(signal.ITIMER_PROF, STUCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # its module can't be imported


# --- the trial ---

_tried: dict[tuple[Path, tuple[int, int, int]], str] = {}


def _trial(file: Path, identity: tuple[int, int, int], load: Callable[[], Any]) -> str:
    """What is wrong, or nothing; a file is tried once."""
    key = (file.absolute(), identity)
    if key not in _tried:
        _tried[key] = _in_child(load)
    return _tried[key]


def _in_child(load: Callable[[], Any]) -> str:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child uses no thread and no lock of this process: it loads a tokenizer of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _answer(writer, load)
    os.close(writer)
    ready: object = None
    try:
        ready = select.select([reader], [], [], WAITED_SECONDS)[0]
        answer = os.read(reader, LONGEST_ANSWER) if ready else b""
    finally:
        os.close(reader)
        if not ready:  # also where Ctrl-C ended the wait
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return answer.decode() if status == 0 else _how_it_ended(status)


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGXCPU:
        return f"the tokenizer computes for more than {TRIAL_SECONDS} seconds on short texts."
    if status == -signal.SIGKILL:
        return "the tokenizer was killed while it was tried, or never ended: memory may be short."
    return f"the tokenizer takes more than {TRIAL_BYTES / 2**30:g} GiB of memory, or crashes."


def _answer(writer: int, load: Callable[[], Any]) -> NoReturn:
    """In the child: say what is wrong, and end without returning."""
    try:
        faulthandler.disable()  # how it ends is told by the parent
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # panics are told there
        with open("/proc/self/statm", "rb") as file:
            taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        # Python's own errors are told well, so what they need is left to it
        _lower(resource.RLIMIT_AS, taken + TRIAL_BYTES)
        _lower(resource.RLIMIT_CPU, TRIAL_SECONDS)
        _lower(resource.RLIMIT_CORE, 0)
        os.write(writer, (_whats_wrong(load) or "").encode("utf-8", "replace")[:LONGEST_ANSWER])
        os._exit(0)
    finally:
        os._exit(1)


def _lower(kind: int, limit: int) -> None:
    soft, hard = resource.getrlimit(kind)
    wanted = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(kind, (min(wanted), hard))


def _whats_wrong(load: Callable[[], Any]) -> str | None:
    try:
        tokenizer = load()
        if tokenizer is None:
            return None
        return _too_long(tokenizer) or _too_much(tokenizer) or _give_probes(tokenizer)
    except MemoryError:
        return f"the tokenizer takes more than {TRIAL_BYTES / 2**30:g} GiB of memory."
    except BaseException as error:
        if _is_panic(error):
            return f"the tokenizer gives up at a short text ({error})."
        return None  # what is no matter of bounds is told where the tokenizer is loaded


def _give_probes(tokenizer: Any) -> str | None:
    for probe in PROBES:
        text = probe * (RUN // len(probe)) + "!\x00"
        found = tokenizer.encode(text, add_special_tokens=False)
        if len(found.ids) > MOST_GROWTH * len(text.encode()):
            return f"{probe!r}, {RUN:,} characters of it, become {len(found.ids):,} tokens."
        tokenizer.decode(found.ids)
    return None


# --- its settings ---


def _too_long(tokenizer: Any) -> str | None:
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > LONGEST_TOKEN:
        return f"a token has {longest:,} characters, more than {LONGEST_TOKEN:,}."
    return None


def _too_much(tokenizer: Any) -> str | None:
    """What a chain of steps may make of a character."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, name)
        if part is None:
            continue
        most = growth(json.loads(part.__getstate__()))
        if most > MOST_GROWTH:
            return f"its {name} may write {most:.3g} characters for one, more than {MOST_GROWTH}."
    return None


def growth(step: Mapping[str, Any]) -> float:
    """How many characters a step, or a chain of them, may make of one."""
    kind = step.get("type")
    if kind == "Sequence":
        most = 1.0
        for inner in next((step[name] for name in CHAINS if name in step), ()):
            most *= growth(inner)
        return most
    if kind == "Replace":
        return _growth_of_replacing(step["pattern"], str(step["content"]))
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "ByteLevel":
        return 2.0  # a byte above 127 becomes a character of two
    if kind == "BertNormalizer":
        return 3.0  # spaces around each ideograph
    if kind == "Precompiled":
        return _longest_replacement(str(step["precompiled_charsmap"]))
    return 1.0


def _growth_of_replacing(pattern: Mapping[str, str], content: str) -> float:
    if "String" in pattern:
        shortest = len(pattern["String"])
    else:
        shortest = _shortest_match(pattern["Regex"])
    if shortest == 0:
        return 1.0 + len(content)  # it is written between any two characters
    return max(1.0, len(content) / shortest)


@lru_cache(maxsize=100)
def _shortest_match(pattern: str) -> int:
    """Characters of the shortest text that a pattern matches; 0 where that isn't known."""
    readable = re.sub(r"\\[pP]\{[^}]*\}", ".", pattern)  # classes that Python has no name for
    try:
        return patterns.parse(readable).getwidth()[0]
    except (re.error, RecursionError, OverflowError):
        return 0


def _longest_replacement(charsmap: str) -> float:
    """Bytes of the longest text in a map of SentencePiece: a table's size, the table, the texts."""
    data = base64.b64decode(charsmap)
    if len(data) < 4:
        return 1.0
    (size,) = struct.unpack("<I", data[:4])
    return float(max(map(len, data[4 + size :].split(b"\0")), default=1))
