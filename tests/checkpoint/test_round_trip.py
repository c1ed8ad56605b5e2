"""What n ranks write, m ranks read: every element, whatever n, m, dtype and replication."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from retool.checkpoint import latest, load_flat
from retool.checkpoint.format.checksums import checksums_of, write_archive
from retool.checkpoint.format.stored_tensors import StoredTensor
from retool.checkpoint.format.torch_file import TorchFile
from retool.checkpoint.rng import derive
from retool.checkpoint.shards.source import ShardSource
from retool.parallel.fsdp.layout import local_pieces
from tests.checkpoint import states
from tests.ranks import run_ranks


def saved(tmp_path: Path, world: int, *args, **options) -> Path:
    states.source_model(tmp_path / "source")
    root = tmp_path / "run"
    errors = run_ranks(_save, world, str(root), args, options)
    assert errors == [[None]] * world
    found = latest(root)
    assert found == root / "global_step_5"
    return found


def _save(root, args, options):
    return states.save(root, *args, **options)


def test_the_folder_has_every_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    assert (folder.parent / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *(
            f"{kind}_world_size_2_rank_{rank}.pt"
            for kind in ("model", "optim", "extra_state")
            for rank in range(2)
        ),
        "fsdp_config.json",
        "checksums.json",
        "data.pt",
        "huggingface/config.json",
        "huggingface/generation_config.json",
        "huggingface/vocab.json",
        "huggingface/tokenizer_config.json",
        "huggingface/model.safetensors",
    }
    config = json.loads((folder / "fsdp_config.json").read_text())
    assert (config["FSDP_version"], config["world_size"]) == (2, 2)
    assert not list(folder.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "writers", [1, 3, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 4))]
)
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int) -> None:
    folder = saved(tmp_path, writers)
    for readers in (1, 2, 3, 4):
        results = run_ranks(states.load_and_compare, readers, str(folder))
        for rank, result in enumerate(results):
            assert (result["step"], result["updates"], result["data"], result["same"]) == (
                5,
                7,
                {"position": 17},
                readers == writers,
            )
            assert result["extra"] == {
                "mine": [rank if readers == writers else 0, "x"],
                "epoch": 2,
                "lr_scheduler": {},
            }
            if readers == writers:  # the random states go on where they were
                torch.manual_seed(1000 + rank)
                np.random.seed(rank)
                assert result["numbers"] == [torch.rand(2).tolist(), np.random.rand(2).tolist()]
        if readers != writers:
            assert len({json.dumps(r["numbers"]) for r in results}) == readers
            assert results == run_ranks(states.load_and_compare, readers, str(folder))


def test_bfloat16_masters_are_written_and_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, -1, torch.bfloat16)
    stored = torch.load(folder / "model_world_size_2_rank_0.pt", weights_only=False)[
        "model.embed_tokens.weight"
    ]
    assert torch.equal(
        stored.to_local(), states.truth(torch.bfloat16, 0)["model.embed_tokens.weight"][:6]
    )
    states.load_and_compare(str(folder), -1, torch.bfloat16)


def test_replicas_write_and_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, 4, 2)
    for rank in range(4):
        tensor = torch.load(folder / f"model_world_size_4_rank_{rank}.pt", weights_only=False)[
            "model.embed_tokens.weight"
        ]
        assert tensor.placements == (
            Replicate(),
            Shard(0),
        ) and tensor.device_mesh.mesh_dim_names == ("ddp", "fsdp")
        assert tensor.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    for readers, fsdp_size in ((4, 2), (4, 4), (2, 1), (3, -1), (1, -1)):
        run_ranks(states.load_and_compare, readers, str(folder), fsdp_size)


def test_pure_replication_is_not_ambiguous(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 1)
    tensor = torch.load(folder / "model_world_size_2_rank_1.pt", weights_only=False)[
        "model.norm.weight"
    ]
    assert isinstance(tensor, DTensor) and tensor.placements == (Replicate(), Shard(0))
    run_ranks(states.load_and_compare, 3, str(folder))


def test_fp64_stays_fp64(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3, -1, torch.float64)
    assert (
        torch.load(folder / "optim_world_size_3_rank_0.pt", weights_only=False)["state"][0][
            "exp_avg"
        ].dtype
        == torch.float64
    )
    run_ranks(states.load_and_compare, 2, str(folder), -1, torch.float64)


@pytest.mark.parametrize("world", [1, 3])
def test_torch_itself_reads_the_shards(tmp_path: Path, world: int) -> None:
    """The rows are torch.chunk's, names and order are parameters()', the tied head is there: read
    with torch.load alone.
    """
    folder = saved(tmp_path, world)
    weights = states.truth(torch.float32, 0)
    moments = states.truth(torch.float32, 1)
    for rank in range(world):
        model = torch.load(folder / f"model_world_size_{world}_rank_{rank}.pt", weights_only=True)
        optim = torch.load(folder / f"optim_world_size_{world}_rank_{rank}.pt", weights_only=True)
        names = [m.name for _, m in states.layout(1).members]
        assert list(model) == [*names, "lm_head.weight"]
        assert names[1] == "model.norm.weight" and optim["param_groups"][0]["param_names"] == names
        assert optim["param_groups"][0]["params"] == list(range(len(names))) == list(optim["state"])
        assert len({t["step"].data_ptr() for t in optim["state"].values()}) == len(names), (
            "one step tensor for all would count n times"
        )
        for i, name in enumerate([*names, "lm_head.weight"]):
            source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
            pairs = [(model[name], weights[source])] + (
                [(optim["state"][i]["exp_avg"], moments[name])] if i < len(names) else []
            )
            for tensor, whole in pairs:
                if world == 1:
                    assert type(tensor) is torch.Tensor and torch.equal(tensor, whole)
                    continue
                chunks = whole.chunk(world)
                assert (
                    tensor.placements == (Shard(0),)
                    and tensor.device_mesh.mesh_dim_names == ("fsdp",)
                    and tensor.shape == whole.shape
                )
                assert torch.equal(
                    tensor._local_tensor, chunks[rank] if rank < len(chunks) else whole[:0]
                ), (name, rank)
        assert optim["state"][0]["step"].item() == 7.0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_export_is_the_weights_in_bf16(tmp_path: Path, world: int) -> None:
    folder = saved(tmp_path, world, -1, torch.float32, (5,), chat_template="{{ messages }}")
    weights = states.exported(folder / "huggingface")
    assert weights.keys() == states.truth(torch.float32, 0).keys(), "a tied head is not stored"
    for name, value in states.truth(torch.float32, 0).items():
        assert torch.equal(weights[name], value.bfloat16()), name
    assert json.loads((folder / "huggingface/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (folder / "huggingface/chat_template.jinja").read_text() == "{{ messages }}"


def test_contents_choose_the_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, -1, torch.float32, (5,), contents=("hf_model",))
    assert (
        not list(folder.glob("*_rank_*.pt")) and (folder / "huggingface/model.safetensors").exists()
    )
    with pytest.raises(
        ValueError,
        match=r"save_contents: weights is unknown\. Use any of model, optimizer, extra, hf_model",
    ):
        states.SaveOptions(contents=("weights",))


def test_weights_alone_can_not_be_resumed(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, -1, torch.float32, (5,), contents=("model", "extra"))
    with pytest.raises(AssertionError, match=r"Unusable: .*saved without the optimizer"):
        run_ranks(states.load_and_compare, 1, str(folder))


def test_async_saves_write_what_was_there_at_the_call(tmp_path: Path) -> None:
    states.source_model(tmp_path / "source")
    results = run_ranks(_overlapping, 2, str(tmp_path / "run"))
    assert results == [[None, None, None]] * 2
    root = tmp_path / "run"
    assert latest(root) == root / "global_step_3"
    assert sorted(p.name for p in root.glob("global_step_*")) == [
        "global_step_2",
        "global_step_3",
    ], "keep=2"
    for step in (2, 3):
        weights = states.exported(root / f"global_step_{step}" / "huggingface")
        for name, value in states.truth(torch.float32, 0).items():
            assert torch.equal(weights[name], (value + step).bfloat16()), (step, name)


def _overlapping(root: str) -> list[str | None]:
    """Three saves in a row, the weights changed right after each call."""
    mesh = states.make_mesh()
    staging = states.checkpoint.Staging(mesh)
    tensors = states.state(mesh)
    pending = []
    for step in (1, 2, 3):
        tensors.params.copy_(states.flat(tensors.layout, mesh.shard_rank, torch.float32, 0) + step)
        pending.append(
            states.checkpoint.save(
                root,
                tensors,
                mesh,
                states.checkpoint.TrainingState(step=step),
                model_folder=Path(root).parent / "source",
                options=states.SaveOptions(async_save=True, keep=2),
                staging=staging,
            )
        )
        assert all(p.poll() is not None for p in pending[:-1]), "more than one save in flight"
        tensors.params.fill_(float("nan"))
    staging.close()
    return [p.wait().error for p in pending]


def test_extra_holds_plain_data_only(tmp_path: Path) -> None:
    mesh = states.make_mesh()
    with pytest.raises(
        ValueError, match="extra may hold tensors, strings, numbers, lists and dicts only"
    ):
        states.checkpoint.save(
            tmp_path,
            states.state(mesh),
            mesh,
            states.checkpoint.TrainingState(step=1, extra={"bad": np.arange(3)}),
            model_folder=states.source_model(tmp_path / "source"),
        )


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 2), (4, 4)])
def test_each_rank_reads_only_what_it_owns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int, readers: int
) -> None:
    folder = saved(tmp_path, writers)
    counts = []
    real = TorchFile.read

    def counting(file: TorchFile, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
        counts.append(stop - start)
        return real(file, tensor, start, stop)

    monkeypatch.setattr(TorchFile, "read", counting)
    layout = states.layout(readers)
    for rank in range(readers):
        counts.clear()
        load_flat(layout, rank, ShardSource(folder), torch.empty(layout.shard_numel))
        assert sum(counts) == sum(p.stop - p.start for p in local_pieces(layout, rank))


def test_checksums_are_compared_for_the_part_that_is_read(tmp_path: Path) -> None:
    """Damage elsewhere in a large file doesn't stop a rank that reads another part of it; damage in
    its part does.
    """
    content = {"a": torch.arange(2_000_000, dtype=torch.float32)}
    written = write_archive(tmp_path / "x.pt", content)
    assert written == checksums_of(tmp_path / "x.pt")
    blocks = written["crc32"]
    assert len(blocks) == 8
    with (tmp_path / "x.pt").open("r+b") as file:
        file.seek(6 << 20)
        file.write(b"\xff\xff\xff\xff")
    file = TorchFile(tmp_path / "x.pt", blocks)
    assert torch.equal(file.read(file.content["a"], 0, 1_000_000), content["a"][:1_000_000])
    with pytest.raises(
        ValueError, match=r"x\.pt: bytes \[6291456, 7340032\) differ from checksums\.json"
    ):
        file.read(file.content["a"], 1_000_000, 2_000_000)


def test_other_ranks_draw_by_seed_step_and_rank() -> None:
    places = [(3, 5, 0), (4, 5, 0), (3, 6, 0), (3, 5, 1)]
    drawn = []
    for place in [*places, places[0]]:
        derive(*place)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[-1] == drawn[0]
    for numbers in zip(*drawn[:-1], strict=True):
        assert len({*numbers}) == len(places)


def test_buffers_can_be_made_ahead(tmp_path: Path) -> None:
    mesh = states.make_mesh()
    staging = states.checkpoint.Staging(mesh)
    state = states.state(mesh)
    options = states.SaveOptions(contents=("model",))
    staging.prepare(state, mesh, options)
    staging.ready()
    assert list(staging._buffers) == ["params"]
    before = staging._buffers["params"].data_ptr()
    source = states.source_model(tmp_path / "source")
    done = states.checkpoint.save(
        tmp_path,
        state,
        mesh,
        states.checkpoint.TrainingState(step=1),
        model_folder=source,
        options=options,
        staging=staging,
    )
    assert done.wait().error is None and staging._buffers["params"].data_ptr() == before
