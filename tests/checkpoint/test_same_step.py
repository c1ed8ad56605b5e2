"""Files of two steps in one folder: without checksums nothing but the steps in the files tells, and
a mix must not be read.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.checkpoint import load
from retool.checkpoint.__main__ import main
from retool.checkpoint.convert import convert
from retool.checkpoint.flat.rows import all_rows
from retool.checkpoint.format.checksums import checksums_of
from retool.checkpoint.format.folder import DATA, shard_name, write_config
from retool.checkpoint.format.state_dicts import Place, model_content, optimizer_content
from retool.checkpoint.merge import merge
from retool.checkpoint.verify import verify
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.checkpoint.test_merge import SHARDS, needs_shards

# two copies of each row: ranks 0 and 2, 1 and 3
WORLD = 4
SHARDS_EACH = 2


def _write(folder: Path, step: int) -> None:
    """A checkpoint of four ranks as they would save it at a step; weights and counts of updates are
    each step's own.
    """
    states.source_model(folder / "huggingface")
    layout = states.layout(SHARDS_EACH)
    for rank in range(WORLD):
        place = Place(rank, SHARDS_EACH, WORLD // SHARDS_EACH)
        rows = all_rows(layout, place.shard_rank)
        buffers = [
            torch.cat([whole[r.member.name].view(-1)[r.start : r.stop] for r in rows])
            for whole in (states.truth(torch.float32, i) for i in range(3))
        ]
        contents = {
            "model": model_content(layout, place, buffers[0] + step, step),
            "optim": optimizer_content(layout, place, (buffers[1], buffers[2]), step, {}),
            "extra_state": {"epoch": 2, "step": step},
        }
        for kind, content in contents.items():
            torch.save(content, folder / shard_name(kind, WORLD, rank))
    torch.save({"position": step}, folder / DATA)
    write_config(
        folder,
        WORLD,
        SHARDS_EACH,
        step,
        {path.name: checksums_of(path) for path in folder.glob("*.pt")},
    )


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    for step in (5, 10):
        _write(run / f"global_step_{step}", step)
    return run


def quiet(what: str, done: int) -> None:
    del what, done


@pytest.fixture
def unvouched(two_steps: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint without its checksums, and the older one to take files from."""
    shutil.copytree(two_steps / "global_step_10", tmp_path / "global_step_10")
    (tmp_path / "global_step_10" / "checksums.json").unlink()
    return tmp_path / "global_step_10", two_steps / "global_step_5"


def readers(folder: Path, out: Path) -> dict[str, Any]:
    return {
        "verify": lambda: "\n".join(verify(folder, quiet)),
        "merge": lambda: merge(folder, out / "merged", torch.float32),
        "convert": lambda: convert(folder, 2, out / "converted"),
        "load": lambda: load(folder, states.blank(make_mesh()), make_mesh(), seed=1),
    }


def told(read: Any) -> str:
    """What a reader refuses; `verify` lists it."""
    try:
        return str(read())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "kinds",
    [("model", "optim", "extra_state"), ("model",), ("optim",), ("extra_state",)],
    ids=lambda kinds: "+".join(kinds),
)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_mix_of_two_steps_is_refused(
    unvouched: tuple[Path, Path], tmp_path: Path, kinds: tuple[str, ...], rank: int
) -> None:
    folder, older = unvouched
    for kind in kinds:
        shutil.copy(older / f"{kind}_world_size_4_rank_{rank}.pt", folder)
    for name, read in readers(folder, tmp_path).items():
        said = told(read)
        assert (
            "files of two checkpoints are mixed" in said
            and "_rank_" in said
            and "python -m retool.checkpoint ls" in said
        ), (name, said)
    assert (
        not list((tmp_path / "merged").glob("*.safetensors"))
        and not (tmp_path / "converted").exists()
    )


def test_with_checksums_a_mix_is_damage(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps / "global_step_10", tmp_path / "global_step_10")
    shutil.copy(
        two_steps / "global_step_5" / "model_world_size_4_rank_1.pt", tmp_path / "global_step_10"
    )
    for name, read in readers(tmp_path / "global_step_10", tmp_path).items():
        assert "model_world_size_4_rank_1.pt" in told(read), name


def test_copies_of_the_same_rows_must_be_equal(unvouched: tuple[Path, Path]) -> None:
    """Hybrid sharding: ranks 0 and 2 hold the same rows.

    A copy that differs is damage, even where its own checksums are right.
    """
    folder, _ = unvouched
    content = torch.load(folder / "model_world_size_4_rank_2.pt", weights_only=False)
    content["model.norm.weight"]._local_tensor.add_(1)
    torch.save(content, folder / "model_world_size_4_rank_2.pt")
    (problem,) = verify(folder, quiet)
    assert (
        "model_world_size_4_rank_2.pt: model.norm.weight differs from its copy in model_world_size_4_rank_0.pt"
        in problem
    )


def test_without_checksums_nothing_vouches(
    unvouched: tuple[Path, Path],
    two_steps: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _ = unvouched
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert (
        "undamaged" not in said
        and "it has no checksums.json, so nothing vouches for its files belonging together" in said
    )
    assert main(["verify", str(two_steps / "global_step_10")]) == 0
    assert capsys.readouterr().out.endswith("global_step_10: complete, undamaged, finite\n")
    assert (
        main(["ls", str(folder.parent)]) == 0
        and "complete, without checksums" in capsys.readouterr().out
    )
    with caplog.at_level(logging.WARNING):
        fresh = states.blank(make_mesh())
        loaded = load(folder, fresh, make_mesh(), seed=1)
    assert "nothing vouches" in caplog.text
    # What we wrote is resumed whole all the same: the position in the data and the step are not
    # forgotten.
    assert (
        loaded.data_state == {"position": 10} and loaded.step == 10 and loaded.extra == {"epoch": 2}
    )
    assert torch.equal(fresh.params[:8], states.state(make_mesh()).params[:8] + 10)


def test_another_config_is_a_mix(unvouched: tuple[Path, Path]) -> None:
    folder, older = unvouched
    shutil.copy(older / "fsdp_config.json", folder)
    assert json.loads((folder / "fsdp_config.json").read_text())["step"] == 5
    assert "is of step 10" in told(
        lambda: load(folder, states.blank(make_mesh()), make_mesh(), seed=1)
    )


@needs_shards
def test_other_programs_updates_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real shards tell no training step; AdamW's count of updates is in each rank's file."""
    shutil.copytree(SHARDS / "torch2.8" / "w3", tmp_path / "w3")
    tmp_path.joinpath("w3").chmod(0o755)
    assert (
        main(["verify", str(tmp_path / "w3")]) == 0 and "nothing vouches" in capsys.readouterr().out
    )
    path = tmp_path / "w3" / "optim_world_size_3_rank_1.pt"
    content = torch.load(path, weights_only=False)
    for state in content["state"].values():
        state["step"] += 1
    path.unlink()
    torch.save(content, path)
    assert main(["verify", str(tmp_path / "w3")]) == 1
    said = capsys.readouterr().out
    assert (
        "optim_world_size_3_rank_1.pt is of update 8 of parameter 0" in said
        and "optim_world_size_3_rank_0.pt of update 7" in said
    )
    assert (
        main(["merge", str(tmp_path / "w3"), "--out", str(tmp_path / "out")]) == 1
        and "mixed" in capsys.readouterr().err
    )
