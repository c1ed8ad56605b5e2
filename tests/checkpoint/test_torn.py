"""Whatever happens during a save, the previous checkpoint stays usable and the torn one is ignored,
and said so.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retool import checkpoint
from retool.checkpoint import SaveOptions, latest
from retool.checkpoint import write as write_module
from retool.checkpoint.__main__ import main
from retool.checkpoint.format.folder import MARK
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.ranks import _context, free_port, run_ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with complete checkpoints of steps 5 and 6, the tracker naming 6."""
    states.source_model(tmp_path / "source")
    mesh = make_mesh()
    for step in (5, 6):
        _save(tmp_path / "run", step, mesh)
    return tmp_path / "run"


def _save(root: Path, step: int, mesh=None, **options) -> checkpoint.SaveResult:
    mesh = mesh or make_mesh()
    return checkpoint.save(
        root,
        states.state(mesh, step=step),
        mesh,
        checkpoint.TrainingState(step=step, data_state={"position": step}),
        model_folder=root.parent / "source",
        options=SaveOptions(**options),
    ).wait()


def _load(folder: Path) -> int:
    return states.load_and_compare(str(folder))["step"]


def test_an_unfinished_save_is_ignored_and_said(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run / "global_step_6", run / "global_step_7.tmp")
    (run / "global_step_7.tmp" / MARK).touch()  # as a save that is cut off leaves it
    assert latest(run) == run / "global_step_6"
    assert "global_step_7.tmp is an unfinished save: ignored" in caplog.text
    _save(run, 8)
    assert not list(run.glob("*.tmp")), "the next save clears it away"


@pytest.mark.parametrize(
    "name",
    [
        "model_world_size_1_rank_0.pt",
        "huggingface/model.safetensors",
        "extra_state_world_size_1_rank_0.pt",
        "fsdp_config.json",
        "data.pt",
    ],
)
@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_folder_falls_back_to_the_one_before(
    run: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    path = run / "global_step_6" / name
    if how == "short":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    assert latest(run) == run / "global_step_5"
    assert "global_step_6 is not complete" in caplog.text and Path(name).name in caplog.text


def test_the_tracker_decides(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    assert latest(run) == run / "global_step_5"
    assert (
        "global_step_6 is newer than what latest_checkpointed_iteration.txt names (step 5): ignored"
        in caplog.text
    )
    for broken in ("", "six", "6\x00\x01"):
        (run / "latest_checkpointed_iteration.txt").write_text(broken)
        assert latest(run) == run / "global_step_6"
    (run / "latest_checkpointed_iteration.txt").unlink()
    assert latest(run) == run / "global_step_6"
    assert latest(run / "nowhere") is None


def test_a_step_saved_again_replaces_the_old_one(run: Path) -> None:
    (run / "global_step_6" / "mark").touch()
    assert _save(run, 6).error is None
    assert latest(run) == run / "global_step_6" and not (run / "global_step_6/mark").exists()
    assert not list(run.glob("*.old"))


def test_a_replacement_cut_off_between_its_renames_loses_nothing(run: Path) -> None:
    (run / "global_step_6").rename(run / "global_step_6.old")
    found = latest(run)
    assert found == run / "global_step_6.old" and _load(found) == 6


def test_only_the_newest_stay(run: Path) -> None:
    for step in (7, 8, 9):
        assert _save(run, step, keep=2).error is None
    assert sorted(p.name for p in run.glob("global_step_*")) == ["global_step_8", "global_step_9"]


def _one_rank_fails(root: str, bad: int, where: str) -> tuple[str | None, float]:
    """A save whose `where` (module.function) raises on rank `bad`: its error, its seconds."""
    mesh = make_mesh()
    staging = checkpoint.Staging(mesh)

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if mesh.rank == bad:
        module, name = where.rsplit(".", 1)
        setattr(
            staging if module == "staging" else sys.modules[f"retool.checkpoint.{module}"],
            name,
            broken,
        )
    begin = time.monotonic()
    pending = checkpoint.save(
        root,
        states.state(mesh),
        mesh,
        checkpoint.TrainingState(step=9),
        model_folder=Path(root).parent / "source",
        staging=staging,
        options=SaveOptions(async_save=True),
    )
    return pending.wait().error, time.monotonic() - begin


@pytest.mark.parametrize(
    ("world", "bad", "where"),
    [
        (3, 0, "write.write_archive"),
        (3, 2, "write.write_archive"),
        (2, 1, "hf.export.unit_numel"),
        (2, 0, "hf.export._write_unit"),
        (2, 0, "hf.export.WeightsWriter"),
        (2, 1, "staging.buffer"),
        (2, 0, "write._commit"),
    ],
)
def test_all_ranks_hear_of_one_rank_s_failure(run: Path, world: int, bad: int, where: str) -> None:
    for error, seconds in run_ranks(_one_rank_fails, world, str(run), bad, where):
        assert error is not None and error.startswith(
            f"rank {bad}: OSError: [Errno 28] No space left on device"
        )
        assert seconds < 10
    assert latest(run) == run / "global_step_6" and not list(run.glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 KB, mounted for the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_fails_loudly_and_keeps_the_old_one(
    small_disk: Path, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    states.source_model(small_disk / "source")
    root = small_disk / "run"
    errors = run_ranks(states.save, world, str(root), -1, torch.float32, (1, 2, 3, 4, 5, 6, 7, 8))
    assert (
        errors[0][0] is None and errors[0][-1] is not None and "No space left" in errors[0][-1]
    ), errors
    kept = latest(root)
    assert (
        kept is not None
        and main(["verify", str(kept)]) == 0
        and kept.name == f"global_step_{errors[0].index(next(e for e in errors[0] if e))}"
    )
    assert not list(root.glob("*.tmp")), (
        "what the failed save wrote must go: it is the space that the next one needs"
    )
    _remount(small_disk, "size=4m")
    assert run_ranks(states.save, world, str(root), -1, torch.float32, (9,))[0] == [None], (
        "with room again, the next save works"
    )
    assert latest(root) == root / "global_step_9"


def test_a_read_only_folder_fails_loudly(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states.source_model(small_disk / "source")
    root = small_disk / "run"
    assert _save(root, 1).error is None
    _remount(small_disk, "ro")
    with caplog.at_level(logging.ERROR):
        error = _save(root, 2).error
    assert (
        error is not None
        and "Read-only file system" in error
        and "global_step_2 was not saved" in caplog.text
    )
    assert latest(root) == root / "global_step_1"


def test_a_vanished_folder_is_made_again(run: Path) -> None:
    shutil.rmtree(run)
    assert _save(run, 7).error is None and latest(run) == run / "global_step_7"


def test_a_folder_that_vanishes_during_the_save_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_module.write_archive

    def vanish(path: Path, content: object) -> None:
        shutil.rmtree(run)
        real(path, content)

    monkeypatch.setattr(write_module, "write_archive", vanish)
    error = _save(run, 7).error
    assert error is not None and "No such file or directory" in error


def test_a_missing_source_model_is_an_error_not_a_crash(run: Path) -> None:
    shutil.rmtree(run.parent / "source")
    error = _save(run, 7).error
    assert error is not None and "source" in error and latest(run) == run / "global_step_6"


def _endless(root: str, rank: int, world: int, port: int, first: int) -> None:
    """Save step after step until killed; notes each completed one in a file."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    mesh = make_mesh(timeout_s=30)
    staging = checkpoint.Staging(mesh, timeout_s=30)
    step = first
    note = os.open(f"{root}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(note, b"0\n")
    while True:
        pending = checkpoint.save(
            root,
            states.state(mesh, step=step),
            mesh,
            checkpoint.TrainingState(step=step, data_state={"position": step}),
            staging=staging,
            model_folder=Path(root).parent / "source",
            options=SaveOptions(async_save=True, keep=2),
        )
        if pending.wait().error is not None:
            return  # the other rank is gone
        os.write(note, b"%d\n" % step)
        step += 1


def _noted(root: Path, rank: int) -> int:
    """The last step that a rank knows complete; -1 before it begins."""
    note = Path(f"{root}.{rank}")
    return int(note.read_text().split()[-1]) if note.exists() and note.stat().st_size else -1


def _kill_during_saves(tmp_path: Path, kills: int, world: int, seed: int) -> int:
    """Kill one or all of the saving processes again and again; how many of the saves were torn."""
    states.source_model(tmp_path / "source")
    root = tmp_path / "run"
    chance = random.Random(seed)
    completed = 0
    torn = 0
    for _ in range(kills):
        for rank in range(world):
            Path(f"{root}.{rank}").unlink(missing_ok=True)
        port = free_port()
        since = time.time()
        ranks = [
            _context.Process(
                target=_endless, args=(str(root), r, world, port, completed + 1), daemon=True
            )
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        while min(_noted(root, rank) for rank in range(world)) < 0:
            time.sleep(0.01)
        if chance.random() < 0.5:  # inside a save for certain, however slow the machine is
            while not states.under_way(root, since):
                time.sleep(0.0005)
        time.sleep(chance.random() * chance.choice((0.01, 0.15)))
        for process in ranks if chance.random() < 0.5 else [chance.choice(ranks)]:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join(timeout=60)
            assert not process.is_alive(), "a rank outlives its dead peer"
        completed = max(completed, *(_noted(root, rank) for rank in range(world)))
        torn += bool(list(root.glob("*.tmp")))
        found = latest(root)
        assert found is not None or not completed, f"step {completed} was complete; nothing is left"
        if found is not None:
            step = int(found.name.split("_")[2].partition(".")[0])
            assert step >= completed, f"step {completed} was complete; left is {found}"
            assert main(["verify", str(found)]) == 0
            loaded = checkpoint.load(found, states.blank(make_mesh()), make_mesh(), seed=0)
            assert (loaded.step, loaded.optimizer_step, loaded.data_state) == (
                step,
                step,
                {"position": step},
            )
            completed = step
    return torn


def test_killed_saves_never_lose_a_completed_checkpoint(tmp_path: Path) -> None:
    assert _kill_during_saves(tmp_path, kills=6, world=1, seed=1) > 0, (
        "no kill hit a save: the test tests nothing"
    )
    assert _kill_during_saves(tmp_path / "two", kills=4, world=2, seed=2) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_killed_saves(tmp_path: Path) -> None:
    assert _kill_during_saves(tmp_path, kills=100, world=1, seed=3) > 25
    assert _kill_during_saves(tmp_path / "two", kills=100, world=2, seed=4) > 25
