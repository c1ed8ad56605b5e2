"""The command line over our shards and over real FSDP2 shards of two torch releases, against the
dense truth.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retool.checkpoint.__main__ import main
from retool.checkpoint.flat.fill import load_flat
from retool.checkpoint.format.folder import world_size
from retool.checkpoint.merge import merge
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_step
from retool.checkpoint.shards.source import ShardSource
from retool.parallel.fsdp.layout import make_layout
from tests.checkpoint import states
from tests.checkpoint.test_hf import gathered
from tests.checkpoint.test_round_trip import saved
from tests.ranks import run_ranks
from tests.real_data import REAL

SHARDS = REAL / "shards"
FOLDERS = [f"torch{release}/w{world}" for release in ("2.8", "2.13") for world in (1, 2, 3, 4)]
needs_shards = pytest.mark.skipif(not SHARDS.is_dir(), reason=f"{SHARDS} is not there")


@needs_shards
@pytest.mark.parametrize("folder", FOLDERS)
def test_foreign_shards_merge_to_the_truth(tmp_path: Path, folder: str) -> None:
    truth = load_file(SHARDS / "truth.safetensors")
    for dtype, code in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        assert (
            main(["merge", str(SHARDS / folder), "--out", str(tmp_path / code), "--dtype", code])
            == 0
        )
        merged = load_file(tmp_path / code / "model.safetensors")
        assert merged.keys() == {
            name for name in truth if not name.startswith("exp_avg") and name != "lm_head.weight"
        }
        for name, value in merged.items():
            assert torch.equal(value, truth[name].to(dtype)), name
    assert main(["verify", str(SHARDS / folder)]) == 0


@needs_shards
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("shards", [1, 3])
def test_foreign_weights_and_moments_load_onto_any_number_of_ranks(
    folder: str, shards: int
) -> None:
    truth = load_file(SHARDS / "truth.safetensors")
    names = [n for n in truth if not n.startswith("exp_avg") and n != "lm_head.weight"]
    shapes = {n: tuple(truth[n].shape) for n in names}
    layout = make_layout(
        [(n, [(n, s, [(n, s)], True)]) for n, s in shapes.items()],
        shards,
        (("lm_head.weight", "model.embed_tokens.weight"),),
    )
    for which, prefix in (("model", ""), ("exp_avg", "exp_avg."), ("exp_avg_sq", "exp_avg_sq.")):
        flats = [torch.full((layout.shard_numel,), float("nan")) for _ in range(shards)]
        for rank, flat in enumerate(flats):
            load_flat(layout, rank, ShardSource(SHARDS / folder, which), flat)
        for name, value in gathered(layout, flats).items():
            assert torch.equal(value, truth[prefix + name]), (which, name)
    assert optimizer_step(Shards(SHARDS / folder, "optim")) == 7


@pytest.mark.parametrize("world", [1, 3])
def test_merging_our_shards_gives_the_export(tmp_path: Path, world: int) -> None:
    folder = saved(tmp_path, world)
    assert main(["merge", str(folder), "--out", str(tmp_path / "out")]) == 0
    merged = states.exported(tmp_path / "out")
    export = states.exported(folder / "huggingface")
    assert merged.keys() == export.keys() and all(torch.equal(merged[n], export[n]) for n in export)
    assert (tmp_path / "out/config.json").read_text() == (
        folder / "huggingface/config.json"
    ).read_text()
    assert main(["merge", str(folder), "--out", str(tmp_path / "out")]) == 1, (
        "it must not mix two exports"
    )
    files = merge(folder, tmp_path / "split", torch.float32, limit=1000)
    assert len(files) > 3 and all(
        torch.equal(v, states.truth(torch.float32, 0)[n])
        for n, v in states.exported(tmp_path / "split").items()
    )


def test_a_head_is_the_embedding_where_the_model_type_has_it_so(tmp_path: Path) -> None:
    """Gemma's config.json doesn't say that they are tied."""
    source = states.source_model(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "gemma2"}')
    assert states.save(str(tmp_path / "run")) == [None]
    folder = tmp_path / "run/global_step_5"
    two = tmp_path / "two"
    assert main(["convert", str(folder), "--world-size", "2", "--out", str(two)]) == 0
    assert main(["merge", str(two), "--out", str(tmp_path / "out")]) == 0
    merged = states.exported(tmp_path / "out")
    export = states.exported(folder / "huggingface")
    assert merged.keys() == export.keys() and all(torch.equal(merged[n], export[n]) for n in export)


@pytest.mark.parametrize(
    ("writers", "world"),
    [
        (3, 2),
        *(pytest.param(*ranks, marks=pytest.mark.slow) for ranks in ((1, 3), (3, 1), (2, 4))),
    ],
)
def test_converted_shards_are_those_that_so_many_ranks_write(
    tmp_path: Path, writers: int, world: int
) -> None:
    folder = saved(tmp_path, writers)
    expected = saved(tmp_path / "direct", world)
    assert (
        main(["convert", str(folder), "--world-size", str(world), "--out", str(tmp_path / "out")])
        == 0
    )
    assert main(["convert", str(folder), "--world-size", str(world)]) == 0  # in place
    for result in (tmp_path / "out", folder):
        assert main(["verify", str(result)]) == 0
        assert {p.name for p in result.iterdir()} == {p.name for p in expected.iterdir()}
        for rank in range(world):
            for kind in ("model", "optim"):
                a, b = (
                    torch.load(f / f"{kind}_world_size_{world}_rank_{rank}.pt", weights_only=False)
                    for f in (result, expected)
                )
                for x, y in zip(_tensors(a), _tensors(b), strict=True):
                    assert type(x) is type(y) and torch.equal(
                        getattr(x, "_local_tensor", x), getattr(y, "_local_tensor", y)
                    )
        for readers in (world, 2):
            for loaded in run_ranks(states.load_and_compare, readers, str(result)):
                assert (
                    loaded["step"],
                    loaded["updates"],
                    loaded["extra"]["epoch"],
                    loaded["data"],
                ) == (5, 7, 2, {"position": 17})
    assert not list(folder.parent.glob("*.tmp")) and not list(folder.parent.glob("*.old"))


def _tensors(content):
    """Every tensor of a state dict, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = (
        content.values()
        if isinstance(content, dict)
        else content
        if isinstance(content, (list, tuple))
        else ()
    )
    return [t for part in parts for t in _tensors(part)]


@needs_shards
def test_foreign_shards_convert(tmp_path: Path) -> None:
    shutil.copytree(SHARDS / "torch2.8/w3", tmp_path / "global_step_9")
    assert (
        main(
            [
                "convert",
                str(tmp_path / "global_step_9"),
                "--world-size",
                "2",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    truth = load_file(SHARDS / "truth.safetensors")
    source = ShardSource(tmp_path / "out", "exp_avg")
    for name in source.names():
        assert torch.equal(
            source.read(name, 0, truth[name].numel()), truth[f"exp_avg.{name}"].view(-1)
        )


def test_verify_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, 2)

    def verdict() -> str:
        status = main(["verify", str(folder)])
        output = capsys.readouterr()
        assert status == (0 if "complete, undamaged, finite" in output.out else 1)
        return output.out + output.err

    assert "complete, undamaged, finite" in verdict()
    for name in (
        "model_world_size_2_rank_1.pt",
        "optim_world_size_2_rank_0.pt",
        "extra_state_world_size_2_rank_1.pt",
        "data.pt",
        "huggingface/model.safetensors",
        "huggingface/vocab.json",
    ):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(
            whole[: len(whole) // 2]
            + bytes([whole[len(whole) // 2] ^ 4])
            + whole[len(whole) // 2 + 1 :]
        )
        assert str(path) in verdict(), name
        path.write_bytes(whole[:-1])
        assert Path(name).name in verdict()
        path.unlink()
        assert f"{name} is missing" in verdict()
        path.write_bytes(whole)
    assert "complete, undamaged, finite" in verdict()


def test_verify_finds_values_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states.source_model(tmp_path / "source")
    mesh = states.make_mesh()
    state = states.state(mesh)
    state.exp_avg[3], state.params[2] = float("nan"), float("inf")  # type: ignore[index]
    states.checkpoint.save(
        tmp_path / "run",
        state,
        mesh,
        states.checkpoint.TrainingState(step=1),
        model_folder=tmp_path / "source",
    )
    assert main(["verify", str(tmp_path / "run/global_step_1")]) == 1
    output = capsys.readouterr().out
    assert "model of model.embed_tokens.weight has 1 values that are not finite" in output
    assert "exp_avg of model.embed_tokens.weight has 1 values" in output


def test_ls_marks_what_a_resume_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states.source_model(tmp_path / "source")
    run_ranks(states.save, 2, str(tmp_path / "run"), -1, torch.float32, (5, 6))
    (tmp_path / "run/global_step_6/optim_world_size_2_rank_1.pt").unlink()
    assert main(["ls", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("*" in line and " 5 " in line and "complete" in line for line in lines)
    assert any(
        "*" not in line and " 6 " in line and "optim_world_size_2_rank_1.pt is missing" in line
        for line in lines
    )
    assert main(["ls", str(tmp_path / "nowhere")]) == 1


def test_wrong_usage_ends_with_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["merge"], ["convert", "x", "--world-size", "many"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    assert main(["convert", "nowhere", "--world-size", "2"]) == 1
    assert "nowhere is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["verify", "--help"])
    assert end.value.code == 0


def test_a_run_instead_of_a_checkpoint_is_told_which_to_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "global_step_7").mkdir()
    with pytest.raises(
        ValueError,
        match=r"holds no model shards\. It is a run; its newest checkpoint is .*global_step_7\.$",
    ):
        world_size(tmp_path)
    with pytest.raises(ValueError, match=r"holds no model shards\.$"):
        world_size(tmp_path / "global_step_7")
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.endswith("its newest checkpoint is " + str(tmp_path / "global_step_7") + ".\n")
