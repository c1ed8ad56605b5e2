"""A save that never ends, in the foreground or the background, ends the run after a time of its
own, with a report of its own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from retool.checkpoint import latest, write
from retool.run import watchdog
from retool.sft.__main__ import main
from tests.ranks import _context
from tests.sft.conftest import work
from tests.sft.test_command import words

__all__ = ["work"]


def _hang(work: str, out: str, in_background: bool) -> None:
    """Train with saves of which the third never ends."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watchdog.PATIENCE = 0.5
    real = write.write_archive
    saves = [0]

    def write_archive(path: Path, content: object) -> object:
        saves[0] += path.name == "data.pt"
        if saves[0] == 3:
            time.sleep(1000)
        return real(path, content)

    write.write_archive = write_archive
    keys = words(
        Path(work),
        Path(out),
        trainer__total_training_steps=9,
        trainer__save_freq=1,
        trainer__watchdog_s=1,
    )
    raise SystemExit(main([*keys, f"trainer.checkpoint.async_save={str(in_background).lower()}"]))


@pytest.mark.parametrize("in_background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_save_that_never_ends(work: Path, tmp_path: Path, in_background: bool) -> None:
    out = tmp_path / "run"
    begin = time.monotonic()
    process = _context.Process(target=_hang, args=(str(work), str(out), in_background), daemon=True)
    process.start()
    process.join(100)
    said = Path(f"{out}.log").read_text()
    assert process.exitcode == watchdog.EXIT and time.monotonic() - begin < 60, said[-3000:]
    report = (out / "hang" / "report.txt").read_text()
    assert (
        report in said
        and "A save hung" in report
        and "trainer.watchdog_s and 4 times the" in report
    )
    assert "write_archive" in (out / "hang" / "rank_0.txt").read_text(), (
        "where the save hangs is among the stacks"
    )
    assert latest(out) == out / "global_step_2"


def test_every_save_has_a_limit_and_so_has_the_end(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = list[tuple[float, str]]()
    real = watchdog.Watchdog.saving
    monkeypatch.setattr(
        watchdog.Watchdog,
        "saving",
        lambda self, limit, why: limits.append((limit, why)) or real(self, limit, why),
    )
    assert (
        main(words(work, tmp_path / "run", trainer__total_training_steps=2, trainer__save_freq=1))
        == 0
    )
    assert len(limits) == 3 and all(600 < limit < 700 for limit, _ in limits)
    assert "at 5 MB/s, as none was measured yet" in limits[0][1] and "4 times the" in limits[1][1]
