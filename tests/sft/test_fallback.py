"""`python -m retool.sft` goes on from the newest checkpoint that is whole, and can be told to
insist on the newest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retool.checkpoint.format.tracker import TRACKER
from retool.metrics import read_jsonl
from retool.sft.__main__ import main
from tests.checkpoint.test_resume import flip
from tests.sft.conftest import make
from tests.sft.test_command import words

# Whatever the number of steps
ALIKE = {
    "trainer__save_freq": 1,
    "optim__lr_scheduler": "constant",
    "optim__warmup_steps_ratio": 0,
}
MODEL = "model_world_size_1_rank_0.pt"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damage in the middle of its weights is far from what preflight reads."""
    return make(tmp_path_factory.mktemp("fallback"), small=False)


@pytest.fixture(scope="module")
def made(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, a checkpoint of each."""
    out = tmp_path_factory.mktemp("fallback") / "run"
    assert main(words(work, out, trainer__total_training_steps=4, **ALIKE)) == 0
    return out


def _go_on(work: Path, out: Path, **more: object) -> int:
    return main(words(work, out, trainer__total_training_steps=6, **ALIKE, **more))


def test_a_damaged_newest_checkpoint_does_not_block_a_resume(
    work: Path,
    made: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    shutil.copytree(made, whole)
    shutil.copytree(made, out)
    flip(out / "global_step_4" / MODEL)
    assert _go_on(work, whole) == 0 and _go_on(work, out) == 0
    assert "global_step_4 is damaged and skipped" in caplog.text and MODEL in caplog.text
    assert f"resumed from {out / 'global_step_3'} (step 3)" in capfd.readouterr().out
    losses = [
        [(e["step"], e["train/loss"]) for e in read_jsonl(folder / "metrics.jsonl")]
        for folder in (whole, out)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[1]] == [1, 2, 3, 4, 5, 6]
    assert (whole / "global_step_4" / MODEL).read_bytes() == (
        out / "global_step_4" / MODEL
    ).read_bytes(), "step 4 is trained and saved again"


def test_who_insists_is_refused(
    work: Path, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(made, out)
    flip(out / "global_step_4" / MODEL)
    assert _go_on(work, out, trainer__resume_fallback="false") == 1
    assert "global_step_4" in capfd.readouterr().err
    (out / "global_step_4" / MODEL).write_bytes(b"short")
    assert _go_on(work, out, trainer__resume_fallback="false") == 1
    assert (
        "or have the newest whole one taken: trainer.resume_fallback=true" in capfd.readouterr().out
    )


def test_a_run_never_begins_anew_beside_its_checkpoints(
    work: Path, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(made, out)
    for folder in out.glob("global_step_*"):
        (folder / "data.pt").unlink()
    assert _go_on(work, out) == 1
    said = capfd.readouterr().out
    assert (
        "none to go on from (global_step_4: data.pt is missing" in said
        and "trainer.resume_mode=disable" in said
    )
    shutil.rmtree(out)
    shutil.copytree(made, out)
    (out / TRACKER).write_text("0")
    assert _go_on(work, out) == 1 and "names a step before all of them" in capfd.readouterr().out
    assert (
        _go_on(work, out, trainer__resume_mode="disable") == 0
        and (out / "previous_1" / "global_step_4").is_dir()
    )
