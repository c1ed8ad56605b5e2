"""One run is one run: its ranks, its checkpoints, its loggers, and the signs of life that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retool.batch import pack
from retool.data.cache import DatasetReport
from retool.metrics import Loggers
from retool.model.build import ModelOptions, build_decoder
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.preflight.plan import Choice, World, agree
from retool.preflight.training_memory import Prediction
from retool.run import session
from retool.sft import train as training
from retool.sft.__main__ import main
from retool.sft.config import DataConfig, ModelConfig, SFTConfig
from retool.sft.plan import SFTReport, Split
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import run_ranks
from tests.sft.rows import Rows
from tests.sft.test_command import words

CONFIG = SFTConfig(
    data=DataConfig(train_files=("a",), train_batch_size=4, seed=1),
    model=ModelConfig(partial_pretrain="m"),
)


def choice(tokens: int, recompute: Recompute, hold: bool, peak: float) -> Choice:
    return Choice(tokens, recompute, Prediction(0.0, peak, 0.0, 0.0, 0.0, 0.0), True, hold)


def split(lengths: list[int]) -> Split:
    data: Any = SimpleNamespace(
        lengths=np.array(lengths, np.int32), trained=np.array(lengths, np.int32) - 1
    )
    return Split(("a",), data, DatasetReport(samples=len(lengths), content=str(lengths)))


def planned() -> tuple[int, str, bool]:
    """What this rank, with a GPU of its own kind, goes on with."""
    mesh = make_mesh()
    mine = [
        choice(4096, "none", True, 1.0),
        choice(2048, "selective", True, 2.0),
        choice(8192, "none", False, 3.0),
    ][mesh.rank]
    report = SFTReport(CONFIG, World(mesh.world, 1, mesh.world), choice=mine)
    agreed = agree(report, mesh).choice
    assert agreed is not None and agreed.prediction.peak == 3.0
    return agreed.tokens, agreed.recompute, agreed.hold


def test_ranks_take_the_most_careful_plan() -> None:
    assert run_ranks(planned, 3) == [(2048, "selective", False)] * 3


def test_resuming_over_other_data_must_be_asked_for(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(work, out, trainer__total_training_steps=1)) == 0
    other = words(work, out, trainer__total_training_steps=2, data__train_max_samples=40)
    assert main(other) == 1
    said = capfd.readouterr().out
    asked = [word for word in said.split() if word.startswith("trainer.resume_")]
    assert "training samples: then 52, now 40" in said and len(asked) == 2
    assert main([*other, *asked]) == 0
    assert "it goes on all the same" in capfd.readouterr().out and (out / "global_step_2").is_dir()


class Recorder:
    """A logger that remembers whether it was closed."""

    closed = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("fails", [False, True])
def test_loggers_are_closed_once_however_a_run_ends(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no luck")

    logger = Recorder()
    monkeypatch.setattr(session, "open_loggers", lambda *_: Loggers([("recorder", logger)]))
    if fails:
        monkeypatch.setattr(training, "one_step", fail)
    assert main(words(work, tmp_path / "run", trainer__total_training_steps=1)) == int(fails)
    assert logger.closed == 1


def test_every_micro_batch_is_a_sign_of_life() -> None:
    model = build_decoder(decoder_config(4, 2, tied=True), make_mesh(), ModelOptions())
    packs = [pack([Rows()[i]]) for i in range(3)]
    beats = []
    train_step(
        model,
        AdamW(model, AdamWOptions()),
        packs,
        1,
        1e-3,
        StepTimer(model.mesh.device),
        beat=lambda: beats.append(1),
    )
    assert len(beats) == 3
