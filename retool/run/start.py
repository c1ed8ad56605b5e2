"""What a command does around `train`: it locks the run's folder, gets one verdict of all ranks, and
returns the exit status.

`main` of `retool.sft` and `retool.rl` spell it out: preflight, `alone_in_folder`, `verdict_of_all`,
the plan, `train` under `ended_well`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from retool.config import Fault
from retool.config.redact import redact
from retool.files.lock import sole_user
from retool.parallel.lost_peer import LINGER_S, follow, lost_peer
from retool.parallel.meeting import shares_store
from retool.preflight.plan import RunReport
from retool.preflight.ranks.verdict import Show, verdict
from retool.preflight.same_everywhere import shared_by_all
from retool.preflight.show import show_faults

R = TypeVar("R", bound=RunReport)


@contextmanager
def alone_in_folder(report: R, checking: bool) -> Iterator[R]:
    """Hold the run's folder while this lasts; the report has a fault if another run does.

    Rank 0 alone holds it, and only where something will be written.
    """
    rank = int(os.environ.get("RANK", 0))
    with ExitStack() as held:
        if not (checking or report.faults or rank):
            folder = report.options.trainer.default_local_dir
            try:
                held.enter_context(sole_user(Path(folder)))
            except ValueError as error:
                way_out = "Wait for it or stop it, or choose another folder."
                taken = Fault(f"trainer.default_local_dir={folder}", str(error), way_out)
                report = report.blame(taken)
        yield report


def verdict_of_all(
    report: RunReport, checking: bool, show: Show | None = None
) -> tuple[tuple[Fault, ...], Any]:
    """(every rank's faults, which one rank has shown; what to keep until there is a process group).

    `show`: how, where it isn't on the screen.

    Collective, but for a check without a launcher's store: that has nobody to meet.
    """
    met = not checking or shares_store(os.environ)
    options = report.options
    folder = Path(options.trainer.default_local_dir) if options.saves else None
    environment = os.environ if met else {}
    alone = int(environment.get("WORLD_SIZE", 1)) == 1
    shared = () if alone else shared_by_all(report)
    return verdict(report.faults, environment, show or _show, folder=folder, shared=shared)


def _show(faults: Sequence[Fault]) -> None:
    show_faults(faults)
    sys.stdout.flush()  # the launcher may end this process as soon as another rank ends
    tell_launcher("\n".join([f"{len(faults)} fault(s), nothing started", *map(str, faults)]))


@dataclass
class Ending:
    """A command's exit status: 0 done, 1 something to mend, another where a peer was lost."""

    status: int = 0


@contextmanager
def ended_well() -> Iterator[Ending]:
    """Around a command's training: what ended it, said once, and as an exit status."""
    rank = int(os.environ.get("RANK", 0))
    ending = Ending()
    try:
        yield ending
    except ValueError as error:  # the user's to mend: the sentence is enough
        if rank > 0:
            # All ranks may have it: rank 0's end then ends the others while they wait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(LINGER_S)
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        ending.status = 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        ending.status = follow(rank, error)


def tell_launcher(text: str) -> None:
    """Have torchrun close its own report, the last thing on the screen, with these words.

    Other launchers don't ask for any.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": redact(text), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
