"""A damaged newest checkpoint doesn't block a resume: the newest whole one is taken, on every rank
the same, and it is said which was skipped and why.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retool import checkpoint
from retool.checkpoint import latest, load_whole, read
from retool.checkpoint.format.tracker import candidates
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.ranks import run_ranks

WORLD = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with complete checkpoints of steps 1, 2 and 3 by two ranks."""
    root = tmp_path_factory.mktemp("whole")
    states.source_model(root / "source")
    assert (
        run_ranks(states.save, WORLD, str(root / "run"), -1, states.torch.float32, (1, 2, 3))
        == [[None] * 3] * WORLD
    )
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def flip(path: Path, at: float = 0.5) -> None:
    """Another bit in the middle of a file, or wherever."""
    data = bytearray(path.read_bytes())
    word = data.find(b"position")  # much of data.pt is padding that nobody reads
    data[word if word > 0 else int(len(data) * at)] ^= 0x10
    path.write_bytes(bytes(data))


def _load(root: str) -> tuple[str, int]:
    """What all ranks load together: its name, its step."""
    mesh = make_mesh()
    folders = [Path(folder) for folder in map(str, candidates(Path(root), say=False))]
    folder, loaded = load_whole(folders, states.blank(mesh), mesh, seed=0)
    return folder.name, loaded.step


@pytest.mark.parametrize(
    "name",
    [
        "model_world_size_2_rank_1.pt",
        "optim_world_size_2_rank_0.pt",
        "extra_state_world_size_2_rank_1.pt",
        "data.pt",
    ],
)
def test_a_flipped_bit_on_one_rank_takes_all_to_the_one_before(run: Path, name: str) -> None:
    flip(run / "global_step_3" / name)
    flip(run / "global_step_2" / "model_world_size_2_rank_0.pt")
    assert run_ranks(_load, WORLD, str(run)) == [("global_step_1", 1)] * WORLD


def test_it_is_said_which_was_skipped_and_why(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(run / "global_step_3" / "model_world_size_2_rank_1.pt")
    mesh = make_mesh()
    folder, loaded = load_whole(candidates(run), states.blank(mesh), mesh, seed=0)
    assert folder == run / "global_step_2" and loaded.step == 2
    assert (
        "global_step_3 is damaged and skipped" in caplog.text
        and "model_world_size_2_rank_1.pt" in caplog.text
    )


def test_where_none_is_whole_every_reason_is_given(run: Path) -> None:
    mesh = make_mesh()
    for step in (1, 2, 3):
        flip(run / f"global_step_{step}" / "model_world_size_2_rank_1.pt")
    with pytest.raises(
        ValueError,
        match=r"none of the 3 checkpoints in .* can be loaded.*global_step_3.*global_step_2.*global_step_1",
    ):
        load_whole(candidates(run), states.blank(mesh), mesh, seed=0)
    with pytest.raises(ValueError, match=r"model_world_size_2_rank_1\.pt"):
        load_whole([run / "global_step_3"], states.blank(mesh), mesh, seed=0)


def test_one_without_an_optimizer_is_refused_not_skipped(run: Path) -> None:
    mesh = make_mesh()
    result = checkpoint.save(
        run,
        states.state(mesh),
        mesh,
        checkpoint.TrainingState(step=4),
        model_folder=run.parent / "source",
        options=checkpoint.SaveOptions(contents=("model", "extra")),
    ).wait()
    assert result.error is None
    with pytest.raises(ValueError, match="saved without the optimizer"):
        load_whole(candidates(run), states.blank(mesh), mesh, seed=0)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the data's position": lambda folder: flip(folder / "data.pt"),
    "a bit of the configuration": lambda folder: flip(folder / "fsdp_config.json"),
    "a bit of the random states": lambda folder: flip(
        folder / "extra_state_world_size_2_rank_1.pt"
    ),
    "the first rank's directory": lambda folder: flip(
        folder / "model_world_size_2_rank_0.pt", 0.999
    ),
    "no list of checksums": lambda folder: (folder / "checksums.json").write_text("{}"),
    "an odd list of checksums": lambda folder: (folder / "checksums.json").write_text(
        '{"block": 1048576, "files": {"data.pt": {"size": 1}}}'
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_cheap_looks_find_it_before_the_run(
    run: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[what](run / "global_step_3")
    assert latest(run) == run / "global_step_2" and "global_step_3 is not complete" in caplog.text
    assert latest(run, fallback=False) == run / "global_step_3", (
        "who insists gets the newest, and its fault"
    )


def _load_what_one_rank_cannot(root: str, part: int) -> tuple[str, int]:
    """Rank 1 alone fails in a part of the newest: its weights, a moment."""
    real = read.load_flat
    parts = itertools.count()

    def load_flat(*args: Any) -> None:
        if next(parts) == part and os.environ["RANK"] == "1":
            raise ValueError("bytes differ from checksums.json")
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "load_flat", load_flat)
        return _load(root)


@pytest.mark.parametrize("part", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damage_that_one_rank_alone_reads_takes_all_to_the_one_before(run: Path, part: int) -> None:
    """In a large file the ranks read different blocks."""
    found = run_ranks(_load_what_one_rank_cannot, WORLD, str(run), part)
    assert found == [("global_step_2", 2)] * WORLD


def _load_apart(root: str) -> str:
    """What is said where rank 1, a replica, has read another moment than rank 0."""
    mesh = make_mesh(fsdp_size=1)
    state = states.blank(mesh)
    real = read._fill

    def fill(*args: Any) -> Any:
        loaded = real(*args)
        assert state.exp_avg_sq is not None
        state.exp_avg_sq[7] += mesh.rank
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_fill", fill)
        with pytest.raises(ValueError) as refused:
            load_whole([Path(root) / "global_step_3"], state, mesh, seed=0)
    return str(refused.value)


@pytest.mark.slow
def test_replicas_go_on_from_the_same_moments(run: Path) -> None:
    first, second = run_ranks(_load_apart, WORLD, str(run))
    assert first == second and "isn't the same on all machines: ranks 0 and 1 read" in first
