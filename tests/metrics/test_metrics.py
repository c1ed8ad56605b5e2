"""Metrics: nothing lost, nothing twice, nothing that ends a run."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from retool import metrics
from retool.config import options
from retool.metrics import (
    ConsoleLogger,
    JsonlLogger,
    Loggers,
    RunInfo,
    missing_extras,
    open_loggers,
    phases,
    printable,
    read_jsonl,
)
from retool.metrics.console import headline, validation_lines


def info(folder: Path, first_step: int = 0, total_steps: int = 10) -> RunInfo:
    return RunInfo(
        folder,
        "project",
        "experiment",
        {"optim": {"lr": 1.0}, "api_key": "s3cr3t"},
        first_step,
        total_steps,
    )


def write(folder: Path, steps: range, first_step: int = 0, value: float = 1.0) -> None:
    logger = JsonlLogger(info(folder, first_step))
    for step in steps:
        logger.log(step, {"train/loss": value * step})
    logger.close()


def test_one_object_a_step_and_one_a_validation(tmp_path: Path) -> None:
    logger = JsonlLogger(info(tmp_path))
    logger.log(1, {"train/loss": 2.5, "train/grad_norm": float("nan")})
    logger.log(1, {"val/loss": 2.0})
    # On disk before it is closed
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries == [
        {"step": 1, "train/loss": 2.5, "train/grad_norm": None},
        {"step": 1, "val/loss": 2.0},
    ]
    logger.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "train/lo', b'{"step": 9}', b"\x00\xff"])
def test_resume_neither_repeats_nor_misses(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, range(1, 9))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)  # killed in the middle of a line
    assert [e["step"] for e in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    write(tmp_path, range(6, 11), first_step=5, value=10)
    entries = read_jsonl(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in entries] == list(range(1, 11))
    assert [e["train/loss"] for e in entries] == [
        *map(float, range(1, 6)),
        *(10.0 * s for s in range(6, 11)),
    ]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_a_fresh_start_keeps_the_older_run_beside_it(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3))
    write(tmp_path, range(1, 2))
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert (
        len(read_jsonl(tmp_path / "metrics.1.jsonl")) == 3
        and len(read_jsonl(tmp_path / "metrics.2.jsonl")) == 2
    )


def test_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = JsonlLogger(info(tmp_path))
    loggers = Loggers([("jsonl", logger)], said.append)
    real = os.pwrite
    loggers.log(1, {"a": 1.0})
    # The disk takes five bytes more
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: real(f, data[:5], at))
    loggers.log(2, {"a": 2.0})
    loggers.log(3, {"a": 3.0})
    assert [e["step"] for e in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    monkeypatch.setattr(os, "pwrite", real)
    loggers.log(4, {"a": 4.0})
    loggers.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    assert [e["step"] for e in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(said) == 1


class Broken:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("no\x1b[31m network")

    def close(self) -> None:
        raise RuntimeError("worse")


def test_a_failing_logger_warns_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    loggers = Loggers([("broken", Broken()), ("jsonl", JsonlLogger(info(tmp_path)))], said.append)
    for step in (1, 2, 3):
        loggers.log(step, {"a": 1.0})
    loggers.close()
    assert len(said) == 1 and "broken" in said[0] and "no" in said[0] and "\x1b" not in said[0]
    assert "all numbers in its folder's metrics.jsonl" in said[0]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_logger_whose_failures_take_long_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose server is away tries for minutes, at every step anew."""
    calls: list[int] = []

    class Away(Broken):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            calls.append(step)
            time.sleep(0.03)
            super().log(step, metrics)

    monkeypatch.setattr("retool.metrics.loggers.MAX_FAILING_SECONDS", 0.05)
    said: list[str] = []
    loggers = Loggers([("away", Away()), ("jsonl", JsonlLogger(info(tmp_path)))], said.append)
    for step in range(1, 9):
        loggers.log(step, {"a": 1.0})
    loggers.close()
    assert calls == [1, 2] and len(said) == 2
    assert "left out from here on" in said[1] and "metrics.jsonl" in said[1]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 8


def test_a_logger_that_cannot_start_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: RunInfo) -> metrics.Logger:
        raise ConnectionError("no account")

    monkeypatch.setitem(metrics.LOGGERS, "console", refuse)
    loggers = open_loggers(["console"], info(tmp_path))
    loggers.log(1, {"a": 1.0})
    loggers.close()
    assert capsys.readouterr().err.count("no account") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_missing_extras_are_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(metrics.EXTRAS, "wandb", "a_package_that_is_not_there")
    faults = list(missing_extras(["console", "wandb", "tensorboardx"]))
    assert [f.where for f in faults] == ["trainer.logger=wandb", "trainer.logger=tensorboardx"]
    assert (
        faults[0].remedy == "pip install 'retool-train[wandb]'"
        and "tensorboard" in faults[1].remedy
    )
    with pytest.raises(ValueError, match=r"wandb.*\n.*tensorboardx"):
        open_loggers(["wandb", "tensorboardx"], info(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


RL_STEP = {
    "reward/exceptions": 2,
    "reward/timeouts": 0,
    "actor/pg_loss": 1e-9,
    "actor/ppo_kl": 0.00012,
    "actor/entropy": 0.5,
    "actor/grad_norm": 1.25,
    "actor/lr": 1e-6,
    "critic/score/mean": 0.4,
    "critic/score/max": 1.0,
    "critic/acc/mean": 0.7,
    "response_length/mean": 812.0,
    "num_turns/mean": 3.26,
    "stop/aborted": 0,
    "stop/infrastructure": 3,
    "perf/throughput": 12345.6,
    "timing_s/step": 41.2,
    "timing_s/gen": 30,
}
VALIDATION = {
    "val-aux/openai/gsm8k/acc/std@4": 0.1,
    "val-core/openai/gsm8k/acc/mean@4": 0.625,
    "val-core/openai/gsm8k/acc/best@4/mean": 0.75,
    "val-core/openai/gsm8k/acc/maj@4/mean": 0.5,
    "val-core/aime/acc/mean@4": 0.125,
    "val-aux/aime/num_turns/mean": 3,
}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_and_a_validation_are_short_lines_for_people(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    logger = ConsoleLogger(
        info(tmp_path),
        Console(
            file=out,
            width=200,
            force_terminal=terminal,
            markup=False,
            highlight=False,
            soft_wrap=True,
        ),
    )
    logger.log(
        3,
        {
            "train/loss": 1.23456789,
            "train/lr": 1e-5,
            "train/grad_norm": float("nan"),
            "train/skipped_steps": 1,
        },
    )
    logger.log(3, {"val/loss": float("inf")})
    logger.log(4, RL_STEP)
    logger.log(4, VALIDATION)
    logger.close()
    lines = re.findall(r"step \d+/10  .*", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", out.getvalue()))
    assert [line.partition("  eta")[0].rstrip() for line in lines] == [
        "step 3/10  loss 1.2346  grad nan  lr 1.00e-05  skipped 1",
        "step 3/10  val loss inf",
        "step 4/10  score 0.400  acc 0.700  length 812  turns 3.3  entropy 0.500  kl 1.2e-04  grad "
        "1.250  lr 1.00e-06  tok/s/gpu 12,346  s/step 41.20  reward failed 2  lost to "
        "infrastructure 3",
        "step 4/10  val openai/gsm8k acc  mean@4 0.625  best@4 0.750  maj@4 0.500",
        "step 4/10  val aime acc  mean@4 0.125",
    ]


def test_the_time_left_is_at_the_pace_of_steps_and_not_of_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 100 s of compiling, then 2 s a step
    out = io.StringIO()
    now = iter([100.0, 102.0, 102.5, 104.0, 116.0])
    monkeypatch.setattr("retool.metrics.console.time.monotonic", lambda: next(now))
    logger = ConsoleLogger(
        info(tmp_path), Console(file=out, width=20, markup=False, highlight=False, soft_wrap=True)
    )
    for step, name in (
        (1, "train/loss"),
        (2, "train/loss"),
        (2, "val/loss"),
        (3, "train/loss"),
        (10, "train/loss"),
    ):
        logger.log(step, {name: 1.0})
    assert [line.partition("  eta ")[2] for line in out.getvalue().splitlines()] == [
        "",
        "0:00:16",
        "0:00:20",
        "0:00:14",
        "",
    ]


def test_a_terminal_gets_a_bar_with_the_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, markup=False, highlight=False)
    hostile = RunInfo(tmp_path, "p", "[bold]x\x1b]0;title\x07", {}, 0, 4)
    logger = ConsoleLogger(hostile, console)
    logger.log(
        1,
        {
            "train/loss": 1.5,
            "perf/tokens_per_second_per_gpu": 12345.6,
            "train/mfu": 0.412,
            "num_turns/mean": 3.26,
            "timing_s/step": 4.0,
            "timing_s/forward_backward": 3.5,
            "timing_s/data": 0.25,
        },
    )
    logger.log(4, {"train/loss": 1.0})
    logger.close()
    text = out.getvalue()
    assert (
        "step 1/4" in text
        and "loss 1.5000" in text
        and "tok/s/gpu 12,346" in text
        and "mfu 41.2%" in text
    )
    assert "4/4" in text and "eta" in text and "turns 3.3" in text
    assert "last step 4.00 s: forward_backward 3.50 · data 0.25" in text
    assert "[bold]x" in text and "\x1b]0;" not in text


def test_phases_in_words() -> None:
    assert (
        phases({"timing_s/step": 2.0}) == ""
        and phases({"timing_s/gen": 1.0}) == ""
        and phases({"train/loss": 1.0}) == ""
    )
    many = {"timing_s/step": 10.0, **{f"timing_s/p{i}": float(i) for i in range(8)}}
    assert phases(many) == "last step 10.00 s: p7 7.00 · p6 6.00 · p5 5.00 · p4 4.00 · p3 3.00"


WARNING = """
import logging, os, sys, warnings
from retool.metrics import warn_from_first_rank
warn_from_first_rank(int(sys.argv[1]))
warnings.warn("deprecated thing", UserWarning)
logging.getLogger("some.library").warning("slow path")
logging.getLogger("some.library").error("broken")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_come_from_the_first_rank_alone_and_errors_from_all(rank: int) -> None:
    said = subprocess.run(
        [sys.executable, "-c", WARNING, str(rank)], capture_output=True, text=True, check=True
    ).stderr
    assert ("deprecated thing" in said, "slow path" in said, "broken" in said) == (
        rank == 0,
        rank == 0,
        True,
    )


def test_printable() -> None:
    assert printable("a\x1b[31mb\nc\u202ed") == "a [31mb c d"


def test_tensorboard_writes_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = open_loggers(["tensorboard"], info(tmp_path))
    for step in (1, 2, 3):
        loggers.log(step, {"train/loss": 1.0 / step})
    loggers.close()
    loggers = open_loggers(["tensorboard"], info(tmp_path, first_step=2))
    loggers.log(3, {"train/loss": 9.0})
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]


TABLE = [
    {"question": "2 + 2\n| *a* |", "answer": "4", "score": 1.0},
    {"question": "\x1b[31m3 + 3", "answer": "5", "score": -1.0},
]


def test_texts_reach_the_loggers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = open_loggers(["console", "tensorboard"], info(tmp_path))
    loggers.log_table(2, "val/generations", TABLE)
    loggers.log_table(3, "val/generations", [])
    loggers.close()
    assert (
        capsys.readouterr().out
        == "val/generations, step 2: 2 + 2 | *a* | → 4 → 1.0\nval/generations, step 2:  [31m3 + 3 → 5 → -1.0\n"
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("val/generations/text_summary")
    assert event.step == 2 and b"\n    2 + 2\n    | *a* |\n" in event.tensor_proto.string_val[0]


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = open_loggers(["wandb"], info(tmp_path))
    loggers.log(1, {"train/loss": 1.0})
    loggers.log_table(1, "val/generations", TABLE)
    loggers.close()
    assert "logger fails" not in capsys.readouterr().err
    assert (
        list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        and (tmp_path / "wandb_run_id.txt").read_text()
    )
    assert not any(b"s3cr3t" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_mlflow_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for first_step in (0, 1):
        loggers = open_loggers(["mlflow"], info(tmp_path, first_step))
        loggers.log(first_step + 1, {"train/loss": 1.0 + first_step})
        loggers.log_table(1, "val/generations", TABLE)
        loggers.close()
    assert "logger fails" not in capsys.readouterr().err
    run = (tmp_path / "mlflow_run_id.txt").read_text()
    history = mlflow.MlflowClient().get_metric_history(run, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]


def test_swanlab_locally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    loggers = open_loggers(["swanlab"], info(tmp_path))
    loggers.log(1, {"train/loss": 1.0})
    loggers.log_table(1, "val/generations", TABLE)
    loggers.close()
    assert "logger fails" not in capsys.readouterr().err
    assert any((tmp_path / "swanlab").rglob("*"))


def test_a_score_of_any_size_fits_into_the_line() -> None:
    for size in (1e300, -1e300, 1.5e9):
        assert headline({"critic/score/mean": size}) == [f"score {size:.3e}"]
        (line,) = validation_lines({"val-core/a/acc/mean@1": size})
        assert line == f"val a acc  mean@1 {size:.3e}"
    assert headline({"critic/score/mean": math.inf, "perf/throughput": 123456.7}) == [
        "score inf",
        "tok/s/gpu 123,457",
    ]


def test_the_loggers_that_the_configuration_names_are_those_that_there_are() -> None:
    assert set(options.LOGGERS) == set(metrics.LOGGERS)
