"""A run that hangs says where, and ends. Every rank beats once a step; the first one that stays
silent for too long makes all of them write down where they are.

    RUN_DIR/hang/rank_N.txt   Python stacks of every thread, the phase, the last collectives that torch recorded
    RUN_DIR/hang/report.txt   which ranks said what, in a few lines; the same goes to stderr

[Note: who watches whom] A rank that hangs in Python or in a collective lets go of the interpreter's
lock, so that a thread of its own can still write. The first to notice touches `hang/alarm`; the
others look for it every few seconds, so that all stacks are of one moment, and nobody ends the run
before all have written. A rank that holds the lock for ever (a C extension) can't run a thread:
`faulthandler`'s timer, which needs no lock, then writes its stacks and ends it.

A save has no beats of its own and takes what the disk takes: while one lasts (`saving`), a limit of
its own holds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from retool.parallel.network import Place, unreachable
from retool.perf import StepTimer

T = TypeVar("T")
EXIT = 70  # the exit status of a run that was ended for its silence
PATIENCE = 15.0  # seconds that the others have to write down where they are
SHOWN = 5  # collectives
CUT_OFF = "does not answer any more: it is down, or the network between is."
# torch's flight recorder: of NCCL, and of whatever else there is
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


class Watchdog:
    """Watches one rank while it is entered.

    `beat` as often as it gets on; `silence_s` without a beat ends the run.

    0 watches nothing. A rank that only follows another one may be given an infinite silence: it
    answers an alarm and raises none. `places` are the ranks' machines, by rank.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        silence_s: float,
        timer: StepTimer | None = None,
        end: Callable[[int], None] = os._exit,
        places: Sequence[Place] = (),
    ) -> None:
        self.folder = folder / "hang"
        self.rank = rank
        self.world = world
        self.silence_s = silence_s
        self.timer = timer
        self._places = places
        # Machines that never answer tell nothing when they don't
        self._silent_ever: list[Place] = []
        self._end = end
        self._beats = 0
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._alarm = self.folder / "alarm"
        # An earlier run's alarm isn't ours, nor are its stacks
        self._heard = _modified(self._alarm)
        self._old = [_modified(self._stacks_of(r)) for r in range(world)]
        self._spare: Any = None
        self._armed = -math.inf
        # Seconds that the save at work may take, and why
        self._save: tuple[float, str] | None = None
        self._following = False

    def __enter__(self) -> Watchdog:
        if self.silence_s > 0:
            self._spare = open(os.dup(sys.stderr.fileno() if _real(sys.stderr) else 2), "w")
            self.beat()
            threading.Thread(target=self._watch, name="retool-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def beat(self) -> None:
        """This rank gets on."""
        self._beats += 1
        self._last = time.monotonic()
        if self._spare is None or self._following or self.silence_s == math.inf:
            return
        # Not at every beat, as faulthandler starts a thread each time.
        if self._last > self._armed + min(1.0, self.silence_s):
            self._armed = self._last
            # Later than the thread's own alarm, which tells more: the timer is for a rank whose
            # thread can't run.
            patience = 2 * self._limit + 4 * PATIENCE
            faulthandler.dump_traceback_later(patience, exit=True, file=self._spare)

    @property
    def _limit(self) -> float:
        """Seconds without a beat that end the run now."""
        if self._following:
            return math.inf
        return self.silence_s if self._save is None else self._save[0]

    @contextlib.contextmanager
    def saving(self, limit_s: float, why: str) -> Iterator[None]:
        """While this lasts the run may be silent for `limit_s`, on ranks that only follow, too;
        `why` is told where it is longer.
        """
        before = self._save
        self._save = (limit_s, why)
        self._armed = -math.inf  # the timer is set anew
        self.beat()
        try:
            yield
        finally:
            self._save = before
            self._armed = -math.inf
            self.beat()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """While this lasts the rank only waits for others: it answers an alarm and raises none."""
        if self._spare is not None:
            faulthandler.cancel_dump_traceback_later()
        self._following = True
        try:
            yield
        finally:
            self.beat()  # first: the silence was no silence
            self._following = False
            self._armed = -math.inf
            self.beat()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a beat for each."""
        for item in items:
            self.beat()
            yield item

    def stop(self) -> None:
        """The run is over."""
        self._stopped.set()
        if self._spare is not None:
            faulthandler.cancel_dump_traceback_later()
            self._spare.close()
            self._spare = None

    def _watch(self) -> None:
        self._silent_ever = self._unreachable()
        while not self._stopped.wait(min(2.0, self.silence_s / 5)):
            phase = self.timer.current if self.timer is not None else ""
            silent = time.monotonic() - self._last
            if silent > self._limit or _modified(self._alarm) != self._heard:
                self._raise_alarm(silent, phase)
                return

    def _raise_alarm(self, silent: float, phase: str) -> None:
        """Write down where this rank is, wait for the others, say it all, end."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            called = _modified(self._alarm) != self._heard
            mine = self._stacks_of(self.rank)
            temporary = mine.with_suffix(".tmp")
            where = self._where(silent, phase)
            temporary.write_text(where, encoding="utf-8", errors="replace")
            temporary.replace(mine)
            if not called:
                self._alarm.touch()
                os.utime(self._alarm)
            self._say(self._wait_for_others())
        except OSError as error:  # a full or vanished disk: stderr is what is left
            print(f"watchdog: {error}\n{self._where(silent, phase)}", file=sys.stderr, flush=True)
        finally:
            self._end(EXIT)

    def _where(self, silent: float, phase: str) -> str:
        doing = "a save" if self._save is not None else phase or "no timed phase"
        who = f"rank {self.rank} of {self.world}"
        said = f"{who}: no beat for {silent:.0f} s, {self._beats} before; in {doing}"
        now_silent = [place for place in self._unreachable() if place not in self._silent_ever]
        cut_off = [
            f"seen from {self._places[self.rank].host}, {place.host} ({place.address}) {CUT_OFF}"
            for place in now_silent
        ]
        collectives = [f"collective: {line}" for line in last_collectives()]
        return "\n".join([said, *cut_off, *collectives, "", stacks()])

    def _unreachable(self) -> list[Place]:
        """Other machines of the run that don't answer this one."""
        return unreachable(self._places, self._places[self.rank]) if self._places else []

    def _what_hung(self) -> str:
        if self._save is None:
            return f"The run hung: no progress for {self.silence_s:g} s (trainer.watchdog_s)."
        limit, why = self._save
        return (
            f"A save hung: it wasn't done after {limit:.0f} s ({why}). The checkpoint before it is "
            "complete."
        )

    def _stacks_of(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def _wait_for_others(self) -> list[int]:
        """Ranks that have written, once all have or patience ends.

        Ranks of machines that share no folder never appear.
        """
        until = time.monotonic() + PATIENCE
        while True:
            there = [r for r in range(self.world) if _modified(self._stacks_of(r)) != self._old[r]]
            if len(there) == self.world or time.monotonic() > until:
                return there
            time.sleep(0.1)

    def _say(self, there: list[int]) -> None:
        """One report for the run, from the lowest rank that is there; stacks of its own from every
        rank.
        """
        print(self._read_stacks(self.rank), file=sys.stderr, flush=True)
        if self.rank == min(there, default=self.rank):
            report = self._report(there)
            (self.folder / "report.txt").write_text(report + "\n", encoding="utf-8")
            print(report, file=sys.stderr, flush=True)
        else:
            # The launcher ends everybody when the first one goes
            time.sleep(min(1.0, PATIENCE / 4))

    def _report(self, there: list[int]) -> str:
        """What hung, and in a few lines where each rank is."""
        lines = [f"{self._what_hung()} Each rank's stacks are in {self.folder}."]
        ranks = list[str]()
        for rank in there:
            said, _, stack = self._read_stacks(rank).partition("\n\n")
            for line in said.splitlines():
                (lines if line.endswith(CUT_OFF) else ranks).append(f"  {line}")
            ranks.append(f"  at {_innermost(stack)}")
        lines = [*dict.fromkeys(lines), *ranks]
        missing = sorted(set(range(self.world)) - set(there))
        if missing:
            lines.append(
                f"  nothing from rank {', '.join(map(str, missing))}: dead, on another machine, or "
                "stuck outside Python."
            )
        lines.append(
            "A rank whose stack differs from the others' is usually the one that they wait for."
        )
        return "\n".join(lines)

    def _read_stacks(self, rank: int) -> str:
        return self._stacks_of(rank).read_text(encoding="utf-8")


def stacks() -> str:
    """Python stacks of all threads, the main thread's first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        blocks = [
            block
            for block in file.read().split("\n\n")
            if block.strip() and " in _watch\n" not in block + "\n"
        ]
    main = f"0x{threading.main_thread().ident or 0:016x}"
    return "\n\n".join(sorted(blocks, key=lambda block: main not in block.splitlines()[0]))


def last_collectives() -> list[str]:
    """The last collectives that torch's flight recorder holds, newest first, in words; none where
    there is no recorder.
    """
    return [_collective(entry) for entry in reversed(_recorded()[-SHOWN:])]


def _recorded() -> list[dict[str, Any]]:
    """The recorder's entries, oldest first."""
    module = getattr(torch._C, "_distributed_c10d", None)
    for name in RECORDERS:
        dump = getattr(module, name, None)
        if dump is None:
            continue
        # private: what it can't tell isn't worth a failure
        with contextlib.suppress(ValueError, TypeError, RuntimeError, AttributeError):
            entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
            if entries:
                return entries
    return []


def _collective(entry: dict[str, Any]) -> str:
    name = entry.get("profiling_name", "?")
    number = entry.get("collective_seq_id", "?")
    sizes = entry.get("input_sizes", "")
    group = " ".join(map(str, entry.get("process_group", [])))
    return f"{name} #{number} of {sizes} in group {group}: {entry.get('state', '?')}"


def _innermost(stack: str) -> str:
    """The innermost line of the first thread's stack that isn't inside torch or the standard
    library.
    """
    lines = [line.strip() for line in stack.split("\n\n")[0].splitlines()]
    frames = [line for line in lines if line.startswith("File")]
    library = f"{os.sep}lib{os.sep}python"
    own = [frame for frame in frames if "site-packages" not in frame and library not in frame]
    return (own or frames or ["an unknown place"])[0]


def _modified(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _real(stream: Any) -> bool:
    """Whether a stream has a file descriptor (a test's capture may not)."""
    try:
        return isinstance(stream.fileno(), int)
    except (AttributeError, OSError, io.UnsupportedOperation):
        return False
