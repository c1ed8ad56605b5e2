"""What is cleaned up is what saves made, whatever else has such a name; and a clean-up that fails
ends nothing.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from retool import checkpoint
from retool.checkpoint import SaveOptions, latest
from retool.checkpoint.__main__ import main
from retool.checkpoint.format.folder import MARK
from retool.checkpoint.format.tracker import TRACKER
from retool.checkpoint.publish import claim, clear_torn, prune
from retool.files.own_folder import OwnFolder
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with complete checkpoints of steps 1, 2 and 3."""
    root = tmp_path_factory.mktemp("claim")
    states.source_model(root / "source")
    for step in (1, 2, 3):
        assert _save(root / "run", step) is None
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def _save(root: Path, step: int, folder: OwnFolder | None = None, **options) -> str | None:
    mesh = make_mesh()
    return (
        checkpoint.save(
            root,
            states.state(mesh, step=step),
            mesh,
            checkpoint.TrainingState(step=step, data_state={"position": step}),
            model_folder=root.parent / "source",
            options=SaveOptions(**options),
            staging=checkpoint.Staging(mesh, folder=folder),
        )
        .wait()
        .error
    )


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_link_to_an_older_checkpoint_stays_and_no_save_fails_of_it(
    run: Path, tmp_path: Path
) -> None:
    (run / "global_step_1").rename(tmp_path / "big_disk")
    (run / "global_step_1").symlink_to(tmp_path / "big_disk")
    for step in (4, 5, 6):
        assert _save(run, step, keep=2) is None
    assert _names(run) == ["global_step_1", "global_step_5", "global_step_6", TRACKER]
    assert main(["verify", str(run / "global_step_1")]) == 0


def _a_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    path.symlink_to(elsewhere)


def _a_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


KINDS: dict[str, Callable[[Path], object]] = {
    "a link": _a_link,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a file": lambda path: path.write_text("mine"),
    "a folder": _a_folder,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "global_step_4.tmp",
        "global_step_4.old",
        "global_step_1.tmp",
        "global_step_4",
        "global_step_notes.tmp",
    ],
)
def test_what_saves_did_not_make_stays(run: Path, kind: str, name: str) -> None:
    KINDS[kind](run / name)
    before = (run / name).lstat()
    assert _save(run, 4, keep=2) is None and _save(run, 4, keep=2) is None
    assert (
        latest(run) == run / "global_step_4" and main(["verify", str(run / "global_step_4")]) == 0
    )
    kept = run / (f"{name}.old" if name == "global_step_4" else name)
    assert kept.lstat().st_ino == before.st_ino and stat.S_IFMT(
        kept.lstat().st_mode
    ) == stat.S_IFMT(before.st_mode)
    assert set(_names(run)) == {kept.name, "global_step_3", "global_step_4", TRACKER}, (
        "and what they made is gone"
    )


def test_another_programs_checkpoint_is_not_pruned(run: Path) -> None:
    (run / "global_step_1" / "checksums.json").unlink()
    assert _save(run, 4, keep=1) is None
    assert _names(run) == ["global_step_1", "global_step_4", TRACKER]


def test_a_conversion_in_progress_is_not_cleared_away(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retool.checkpoint import convert

    real = convert._write_ranks

    def save_meanwhile(*args):
        done = real(*args)
        assert _save(run, 4) is None
        return done

    monkeypatch.setattr(convert, "_write_ranks", save_meanwhile)
    assert main(["convert", str(run / "global_step_2"), "--world-size", "3"]) == 0
    assert _names(run) == [
        "global_step_1",
        "global_step_2",
        "global_step_3",
        "global_step_4",
        TRACKER,
    ]
    assert (
        main(["verify", str(run / "global_step_2")]) == 0
        and not (run / "global_step_2" / MARK).exists()
    )


def test_a_clean_up_that_fails_ends_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torn = claim(run / "global_step_4")
    (torn / "stuck").mkdir()

    def busy(path: Path, **_: object) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert _save(run, 4, keep=1) is None and latest(run) == run / "global_step_4"
    assert "could not be deleted" in caplog.text and "The run goes on" in caplog.text
    monkeypatch.undo()
    assert _save(run, 5, keep=1) is None
    assert _names(run) == ["global_step_5", TRACKER], "what could not be deleted then goes now"


def test_a_disk_too_full_for_the_mark_is_said_as_that(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in (_save(run, 4) or "")
    assert "global_step_4.tmp" not in _names(run)


def test_the_mark_goes_last(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any instant of a deletion, what is left can be recognised."""
    states_seen = list[bool]()
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        states_seen.append((self.parent / MARK).exists())
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert prune(run, 1) == [run / "global_step_2", run / "global_step_1"] and all(states_seen)
    assert _names(run) == ["global_step_3", TRACKER]


def test_a_replacement_cut_off_between_its_renames_gets_its_name_back(run: Path) -> None:
    (run / "global_step_3" / MARK).touch()
    (run / "global_step_3").rename(run / "global_step_3.old")
    assert latest(run) == run / "global_step_3.old"
    clear_torn(run)
    assert latest(run) == run / "global_step_3" and not (run / "global_step_3" / MARK).exists()


def test_a_tracker_of_another_kind_is_no_end(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / TRACKER).unlink()
    (run / TRACKER).mkdir()
    assert latest(run) == run / "global_step_3" and "does not hold a step" in caplog.text
    assert _save(run, 4) is None and (run / TRACKER).read_text() == "4"
    (run / TRACKER).unlink()
    os.mkfifo(run / TRACKER)
    assert (
        latest(run) == run / "global_step_4"
        and _save(run, 5) is None
        and (run / TRACKER).read_text() == "5"
    )


def _save_elsewhere(root: str) -> str | None:
    """A save after rank 0's run folder was replaced: what this rank hears."""
    mesh = make_mesh()
    own = OwnFolder(Path(root)) if mesh.rank == 0 else None
    staging = checkpoint.Staging(mesh, folder=own)
    torn_out = Path(root + ".away")
    if mesh.rank == 0:
        Path(root).rename(torn_out)
        Path(root).mkdir()
    return (
        checkpoint.save(
            root,
            states.state(mesh),
            mesh,
            checkpoint.TrainingState(step=9),
            model_folder=Path(root).parent / "source",
            staging=staging,
        )
        .wait()
        .error
    )


def test_a_save_into_another_folder_of_the_same_name_is_refused_on_all_ranks(run: Path) -> None:
    for error in run_ranks(_save_elsewhere, 2, str(run)):
        assert (
            error is not None
            and "was replaced by another one while the run was using it" in error
            and "put it back" in error
        )
    assert not any(run.iterdir()), "nothing is written into what may be another run's"


def test_a_folder_is_known_by_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    own = OwnFolder(path)
    assert own.problem() is None
    path.rename(tmp_path / "moved")
    assert "was removed or renamed" in (own.problem() or "")
    path.mkdir()
    assert "was replaced by another one" in (own.problem() or "")
    path.rmdir()
    (tmp_path / "moved").rename(path)
    assert own.problem() is None


@pytest.mark.parametrize(
    "name", [".DS_Store", ".nfs0001", ".latest_checkpointed_iteration.txt.tmp"]
)
def test_a_hidden_file_in_a_run_folder_stops_no_save(tmp_path: Path, name: str) -> None:
    """A desktop's, a file server's, or what a kill left of a file that was being replaced."""
    (tmp_path / name).write_text("5")
    claim(tmp_path / "global_step_3")
    clear_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
