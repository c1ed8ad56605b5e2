"""From a preflight report to training, or to the reason why not: what both commands do last."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from retool.config import Fault
from retool.files.lock import sole_user
from retool.preflight.plan import RunReport
from retool.preflight.show import show_faults, show_plan
from retool.preflight.verdict import verdict
from retool.run.folder import exit_status, tell_launcher


def start(
    report: RunReport,
    in_words: Callable[[], Iterable[tuple[str, str]]],
    train: Callable[[], None],
    checking: bool,
    close: Callable[[], None] = lambda: None,
) -> int:
    """Show what preflight found and train, unless a rank found a fault or this is only a check.

    The exit status.

    `in_words` makes the plan for a report without faults; `close` lets go of what preflight opened,
    where nothing is trained.
    """
    rank = int(os.environ.get("RANK", 0))
    # A check needs nobody to meet
    alone = checking and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with ExitStack() as held:
        mine = list(report.faults)
        if not (checking or mine or rank):
            mine += _hold(Path(report.options.trainer.default_local_dir), held)
        # The store stays open while this function runs
        faults, _store = verdict(mine, {} if alone else os.environ, _show)
        if not faults and rank == 0:
            show_plan(in_words(), report.notes)
        if faults or checking:
            close()
            return int(bool(faults))
        return exit_status(train, rank)


def _hold(folder: Path, held: ExitStack) -> Iterator[Fault]:
    """The run's folder, for this run alone."""
    try:
        held.enter_context(sole_user(folder))
    except ValueError as error:
        yield Fault(
            f"trainer.default_local_dir={folder}",
            str(error),
            "Wait for it or stop it, or choose another folder.",
        )


def _show(faults: Sequence[Fault]) -> None:
    show_faults(faults)
    sys.stdout.flush()  # the launcher may end this process as soon as another rank ends
    tell_launcher("\n".join([f"{len(faults)} fault(s), nothing started", *map(str, faults)]))
