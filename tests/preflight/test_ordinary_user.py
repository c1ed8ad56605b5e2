"""Folders that an ordinary user may only read, or not even that: a run works there, or is refused
with the way out. Root may do everything, so it becomes nobody first.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retool.checkpoint.__main__ import main as checkpoint_main
from retool.config import read
from retool.report.__main__ import main as report_main
from retool.sft.__main__ import main
from retool.sft.config import SFTConfig
from retool.sft.preflight import preflight
from tests.bounded import bounded
from tests.sft.conftest import make
from tests.sft.test_command import words

NOBODY = 65534
Said = list[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work/`, and `base/`, a run of two steps; everybody may read all of it."""
    root = tmp_path_factory.mktemp("user")
    work = make(root / "work")
    steps = {"trainer__total_training_steps": 2, "trainer__save_freq": 1}
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words(work, root / "base", data__cache_dir=root / "cache", **steps)) == 0
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in root.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    return root


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Path:
    """A folder that anybody may write to."""
    tmp_path.chmod(0o777)
    return tmp_path


def as_nobody(call: Callable[[], Any]) -> Any:
    """`call()` by a user without rights, in a process of its own."""

    def become() -> Any:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return call()

    outcome = bounded(become, seconds=60, megabytes=4000)
    assert not outcome.error, outcome.error
    return outcome.value


def faults(root: Path, out: Path, **changed: Any) -> Said:
    """What is said of a run in `out` by somebody without rights."""
    keys = {"data__cache_dir": out.parent / "cache", **changed}
    given = words(root / "work", out, **keys)

    def ask() -> Said:
        parsed = read(SFTConfig, given)
        return [str(fault) for fault in preflight(parsed, planning=True).faults]

    return as_nobody(ask)


def closed(folder: Path, mode: int) -> Path:
    """A folder that its owner alone may write to, or look into."""
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)
    return folder


def test_folders_that_are_only_read_may_be_read_only(
    root: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(closed(place / "home", 0o555)))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    steps = {"trainer__total_training_steps": 1}
    given = words(root / "work", place / "run", data__cache_dir=place / "cache", **steps)

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            return main(given)

    assert as_nobody(run) == 0 and (place / "run" / "global_step_1").is_dir()


def test_a_run_s_folder_that_cannot_be_used_is_told(root: Path, place: Path) -> None:
    for out in (
        closed(place / "read_only", 0o555),
        closed(place / "locked", 0o500 if os.getuid() else 0o700) / "run",
        closed(place / "deep", 0o500 if os.getuid() else 0o700) / "a" / "run",
    ):
        (said,) = faults(root, out, data__cache_dir=place / "cache")
        assert said.startswith(f"trainer.default_local_dir={out}: can't be written")
        assert "Choose another trainer.default_local_dir" in said
    (said,) = faults(root, closed(place / "blind", 0o333), data__cache_dir=place / "cache")
    assert "can be written by this user, and not read" in said and "chmod" in said


def test_a_home_that_nobody_may_look_into_is_none(
    root: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(closed(place / "home", 0o000) / "me"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert not faults(root, place / "run", data__cache_dir="null")


def test_caches_and_data_that_cannot_be_used_are_told(root: Path, place: Path) -> None:
    cache = closed(place / "cache", 0o555)
    (said,) = faults(root, place / "run", data__cache_dir=cache)
    assert f"data.cache_dir={cache} can't be written" in said and "choose another" in said
    data = Path(shutil.copy(root / "work" / "train.parquet", place / "own.parquet"))
    data.chmod(0o000)
    (said,) = faults(root, place / "run", data__train_files=data)
    assert f"{data} can't be read by this user" in said and "chmod" in said
    hidden = closed(place / "hidden", 0o000)
    (said,) = faults(root, place / "run", data__train_files=hidden / "own.parquet")
    assert f"this user may not look into {hidden}" in said


def test_a_model_that_cannot_be_read_is_told(root: Path, place: Path) -> None:
    model = shutil.copytree(root / "work" / "model", place / "model")
    for name in ("tokenizer_config.json", "model.safetensors", "config.json"):
        (model / name).chmod(0o000)
        (said,) = faults(root, place / "run", model__partial_pretrain=model)
        assert str(model) in said and name in said and "can't be read" in said
        (model / name).chmod(0o644)
    model.chmod(0o000)
    (said,) = faults(root, place / "run", model__partial_pretrain=model)
    assert "can't be read by this user" in said and "chmod" in said
    locked = closed(place / "locked", 0o000)
    said = faults(root, place / "run", model__partial_pretrain=locked / "model")[0]
    assert str(locked / "model") in said


def test_another_user_s_run_is_gone_on_with_or_refused(root: Path, place: Path) -> None:
    """Its files may be read, and the folder written: ours take their place."""
    out = shutil.copytree(root / "base", place / "run")
    out.chmod(0o777)
    if os.getuid() == 0:
        given = words(
            root / "work",
            out,
            data__cache_dir=place / "cache",
            trainer__total_training_steps=3,
            trainer__save_freq=1,
        )

        def run() -> int:
            with contextlib.redirect_stdout(io.StringIO()):
                return main(given)

        assert as_nobody(run) == 0
        assert (out / "metrics.jsonl").stat().st_uid == NOBODY
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    os.chown(out / "metrics.jsonl", os.getuid(), -1)
    (out / "metrics.jsonl").chmod(0o000)
    (said,) = faults(root, out, trainer__total_training_steps=4)
    assert "holds metrics.jsonl of another user" in said and "chown" in said


def test_commands_about_folders_of_others_end_with_a_sentence(root: Path, place: Path) -> None:
    step = root / "base" / "global_step_2"
    locked = closed(place / "locked", 0o000)
    read_only = closed(place / "read_only", 0o555)

    def call(command: Callable[[list[str]], int], *given: object) -> tuple[int, str]:
        def run() -> tuple[int, str]:
            text = io.StringIO()
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                status = command([str(word) for word in given])
            return status, text.getvalue()

        return as_nobody(run)

    assert call(checkpoint_main, "verify", step)[0] == 0
    assert call(checkpoint_main, "ls", root / "base")[0] == 0
    for status, said in (
        call(checkpoint_main, "verify", locked),
        call(checkpoint_main, "ls", locked),
        call(checkpoint_main, "merge", step, "--out", read_only / "merged"),
        call(report_main, locked),
        call(report_main, root / "base"),
    ):
        assert status == 1 and "error: " in said and "ermission denied" in said, said
