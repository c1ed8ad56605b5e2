"""How a run begins and ends: nothing that was being saved is lost, and whatever was opened is
closed, however it ends.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from retool.checkpoint import Staging, write
from retool.metrics import Loggers, read_jsonl
from retool.rl import train
from retool.rl.__main__ import main
from tests.rl.test_command import ARR, words

IN_BACKGROUND = f"{ARR}actor.checkpoint.async_save=true"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was prepared, sampled, closed, in this order."""
    found: list[str] = []

    def spy(owner: Any, name: str, event: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            found.append(event)
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, call)

    spy(Staging, "prepare", "staging prepared")
    spy(train, "collect", "sampled")
    spy(Loggers, "close", "loggers closed")
    spy(train, "close_tools", "tools closed")
    return found


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = write.write_archive

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.4)
        return inner(*args, **options)

    monkeypatch.setattr(write, "write_archive", slowly)


def test_a_run_prepares_its_staging_and_closes_what_it_opened(work, tmp_path, events) -> None:
    assert main(words(work, tmp_path, "trainer.total_training_steps=1")) == 0
    assert events == ["staging prepared", "sampled", "tools closed", "loggers closed"]


def test_a_run_that_saves_nothing_prepares_nothing(work, tmp_path, events) -> None:
    assert (
        main(words(work, tmp_path, "trainer.val_only=true", f"data.val_files={work}/val.jsonl"))
        == 0
    )
    assert events == ["tools closed", "loggers closed"]


def test_too_many_skipped_updates_end_the_run_after_the_save_in_flight(
    work, tmp_path, events, monkeypatch, capsys
) -> None:
    def overflowing(*args: Any) -> Any:
        done = inner(*args)
        return replace(done, skipped=events.count("sampled") > 2)

    inner = train.update_step
    monkeypatch.setattr(train, "update_step", overflowing)
    slow_disk(monkeypatch)
    more = [
        "trainer.max_grad_skips=2",
        "trainer.save_freq=3",
        "trainer.total_training_steps=9",
        IN_BACKGROUND,
    ]
    assert main(words(work, tmp_path, *more)) == 1
    said = capsys.readouterr()
    assert (
        "2 optimizer steps in a row had a non-finite gradient norm" in said.err
        and "global_step_3 (" in said.out
    )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert events[-2:] == ["tools closed", "loggers closed"]
    assert [entry["step"] for entry in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_an_error_of_ours_loses_no_save_and_leaves_nothing_open(
    work, tmp_path, events, monkeypatch
) -> None:
    def breaking(*args: Any) -> Any:
        if events.count("sampled") == 2:
            raise RuntimeError("out of memory")
        return inner(*args)

    inner = train.update_step
    monkeypatch.setattr(train, "update_step", breaking)
    slow_disk(monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(
            words(
                work,
                tmp_path,
                "trainer.save_freq=1",
                "trainer.total_training_steps=9",
                IN_BACKGROUND,
            )
        )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert events[-2:] == ["tools closed", "loggers closed"]


def test_an_engine_that_cannot_close_hides_no_cause_and_keeps_nothing_open() -> None:
    closed: list[str] = []

    def gone() -> None:
        closed.append("engine")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run_of() -> Any:
        return SimpleNamespace(
            engine=SimpleNamespace(close=gone),
            judges=SimpleNamespace(close=lambda: closed.append("judges")),
            rollout=SimpleNamespace(let_go=lambda: closed.append("rollout")),
            loop=asyncio.new_event_loop(),
            session=SimpleNamespace(report=SimpleNamespace(tools=())),
        )

    with pytest.raises(KeyError, match="the cause"), train.let_go(run_of()):
        raise KeyError("the cause")
    # Where nothing else went wrong, this did
    with pytest.raises(RuntimeError, match="illegal memory"), train.let_go(run_of()):
        pass
    assert closed == ["engine", "judges", "rollout"] * 2
