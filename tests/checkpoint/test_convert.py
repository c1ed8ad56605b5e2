"""What `convert` brings along, besides the shards that it rewrites."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retool.checkpoint.__main__ import main
from retool.checkpoint.convert import convert
from retool.checkpoint.format.folder import world_size
from retool.checkpoint.shards.states import data_state
from tests.checkpoint import states
from tests.preflight.test_ordinary_user import as_nobody


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of reinforcement learning: its model files are in actor/."""
    states.source_model(tmp_path / "source")
    assert states.save(str(tmp_path / "run"), subfolder="actor") == [None]
    return tmp_path / "run" / "global_step_5"


@pytest.mark.parametrize("given", ["", "actor"])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_position_in_the_data_comes_along(
    checkpoint: Path, tmp_path: Path, given: str, in_place: bool
) -> None:
    out = convert(checkpoint / given, 2, None if in_place else tmp_path / "out")
    assert out == (checkpoint if in_place else tmp_path / "out")
    assert world_size(out / "actor") == 2
    assert data_state(out) == {"position": 17}
    assert main(["verify", str(out)]) == 0


def test_what_is_no_shard_of_it_stays(checkpoint: Path) -> None:
    mine = {
        checkpoint / "actor" / "scores_data.pt": "mine",
        checkpoint / "critic" / "model_world_size_1_rank_0.pt": "another model's",
        checkpoint / "critic" / "fsdp_config.json": "another model's",
    }
    (checkpoint / "critic").mkdir()
    for path, text in mine.items():
        path.write_text(text)
    convert(checkpoint, 2)
    assert {path: path.read_text() for path in mine} == mine
    assert not list((checkpoint / "actor").glob("*_world_size_1_*"))
    assert main(["verify", str(checkpoint)]) == 0


def test_what_may_only_be_read_can_be_converted(checkpoint: Path, tmp_path: Path) -> None:
    for path in (checkpoint, *checkpoint.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for above in (tmp_path, *tmp_path.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055)
    out = tmp_path / "anybody" / "out"
    out.parent.mkdir()
    out.parent.chmod(0o777)
    assert as_nobody(lambda: convert(checkpoint, 2, out)) == out
    assert main(["verify", str(out)]) == 0
    assert all(os.stat(path).st_mode & 0o200 for path in out.rglob("*")), "its owner's"
    for path in (checkpoint, *checkpoint.rglob("*")):
        path.chmod(0o755)  # for who cleans up


def test_a_folder_in_the_checkpoint_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = checkpoint / "actor" / "two"
    assert main(["convert", str(checkpoint), "--world-size", "2", "--out", str(inside)]) == 1
    assert "lies in the checkpoint itself. Give a folder outside" in capsys.readouterr().err
    assert not list(checkpoint.rglob("two*"))
