"""A run whose folder or data cache is taken away while it trains ends on every rank, with that as
its error.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from retool.data import cache, integrity
from retool.sft import train
from retool.sft.__main__ import main
from tests.ranks import run_ranks
from tests.sft.test_command import words


def _lose_the_folder(work: str, out: str, how: str) -> tuple[int, str]:
    """Train until the run's folder goes after the second step: the exit status, and what the
    launcher is told.
    """
    rank = os.environ["RANK"]
    real = train.one_step
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{out}.error.{rank}"

    def one_step(run, state, *rest):
        real(run, state, *rest)
        if state.step == 2 and rank == "0":
            shutil.rmtree(out) if how == "removed" else Path(out).rename(f"{out}.away")
            if how == "replaced":
                Path(out).mkdir()

    train.one_step = one_step
    keys = words(
        Path(work),
        Path(out),
        trainer__total_training_steps=50,
        trainer__save_freq=25,
        trainer__device="cpu",
    )
    return main(keys), json.loads(Path(f"{out}.error.{rank}").read_text())["message"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_run_ends_when_its_folder_goes(work: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    for status, said in run_ranks(_lose_the_folder, 2, str(work), str(out), how):
        assert (
            status == 1
            and "while the run was using it" in said
            and "start the same command again" in said
        )
    assert not out.exists() if how == "removed" else not any(out.iterdir()), (
        "nothing is written where another run may be by now"
    )
    if how == "replaced":
        (out).rmdir()
        Path(f"{out}.away").rename(out)
        assert main(words(work, out, trainer__total_training_steps=3)) == 0, (
            "put back, the run goes on"
        )


def test_metrics_go_on_where_their_file_was_removed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    real = train.one_step

    def one_step(run, state, *rest):
        real(run, state, *rest)
        if state.step == 2:
            (out / "metrics.jsonl").unlink()

    monkeypatch.setattr(train, "one_step", one_step)
    assert main(words(work, out, trainer__total_training_steps=4)) == 0
    found = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        found == [2, 3, 4]
        and "metrics.jsonl was removed or replaced" in caplog.text
        and "from step 2" in caplog.text
    )


def test_a_cache_found_damaged_in_mid_run_ends_it_and_is_made_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keys = {
        "trainer__total_training_steps": 4,
        "trainer__save_freq": 1,
        "data__cache_dir": tmp_path / "cache",
    }
    assert main(words(work, tmp_path / "calm", **keys)) == 0
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    data = bytearray(tokens.read_bytes())
    data[1] ^= 1
    tokens.write_bytes(bytes(data))
    monkeypatch.setattr(integrity, "WAIT_FOR_BYTES", 0)
    monkeypatch.setattr(cache, "BackgroundCheck", lambda folder: _checked(folder))
    capfd.readouterr()
    assert main(words(work, out, **keys)) == 1
    said = capfd.readouterr().err
    assert (
        "the token cache" in said
        and "tokens.bin holds other bytes" in said
        and "Start the same command again" in said
    )
    assert main(words(work, tmp_path / "again", **keys)) == 0
    losses = [
        [
            json.loads(line)["train/loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("calm", "again")
    ]
    assert losses[0] == losses[1]


def _checked(folder: Path) -> integrity.BackgroundCheck:
    check = integrity.BackgroundCheck(folder)
    check.wait()
    return check
