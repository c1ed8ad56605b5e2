"""Who talks to whom, what sizes fit, and the allocator of a process with a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from retool.parallel.mesh import grow_segments, make_mesh
from tests.ranks import need_gpus, run_ranks


def members(sp: int, fsdp_size: int) -> list[list[int]]:
    """Ranks of this one's groups (sp, shards, replicas), by an exchange in each."""
    mesh = make_mesh(sp=sp, fsdp_size=fsdp_size)
    out = []
    for group in (mesh.sp_group, mesh.shard_group, mesh.replica_group):
        ranks = [
            torch.zeros(1, dtype=torch.int64)
            for _ in range(1 if group is None else dist.get_world_size(group))
        ]
        if group is None:
            ranks[0][0] = mesh.rank
        else:
            dist.all_gather(ranks, torch.tensor([mesh.rank]), group=group)
        out.append([int(r) for r in ranks])
    assert (mesh.dp * mesh.sp, mesh.replicas * mesh.shards) == (
        4,
        4,
    ) and mesh.dp_rank * mesh.sp + mesh.sp_rank == mesh.rank
    return out


def nearby(ranks_of_machines: list[list[int]]) -> list[bool]:
    """Whether two ranks that share the parameters are on one machine, for these machines' sizes by rank."""
    found = []
    for sizes in ranks_of_machines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", str(sizes[int(os.environ["RANK"])]))
            found.append(make_mesh(fsdp_size=2).shards_nearby)
    return found


def test_ranks_of_unlike_machines_agree_on_how_gradients_travel() -> None:
    machines = [[1, 2, 2, 1], [2, 2, 2, 2], [3, 3, 3, 1]]
    assert run_ranks(nearby, 4, machines) == [[False, True, False]] * 4


@pytest.mark.parametrize(("sp", "fsdp_size"), [(2, 2), (1, 2), (4, 1), (2, -1), (1, 4)])
def test_groups(sp: int, fsdp_size: int) -> None:
    shards = 4 if fsdp_size == -1 else fsdp_size
    for rank, (same_sequence, same_weights, same_part) in enumerate(
        run_ranks(members, 4, sp, fsdp_size)
    ):
        assert same_sequence == list(range(rank // sp * sp, rank // sp * sp + sp))
        assert same_weights == list(
            range(rank // shards * shards, rank // shards * shards + shards)
        )
        assert same_part == np.arange(4)[rank % shards :: shards].tolist()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"sp": 4},
            r"ulysses_sequence_parallel_size=4 does not fit 6 processes: it must divide the world size\. Use one of 1, 2, 3, 6\.",
        ),
        ({"sp": 0}, "ulysses_sequence_parallel_size=0 does not fit"),
        ({"fsdp_size": 5}, r"model\.fsdp_config\.fsdp_size=5 does not fit 6 processes"),
        (
            {"ep": 2, "fsdp_size": 3},
            r"model\.fsdp_config\.expert_parallel_size=2 does not fit 3 ranks that share the parameters.*1, 3\.",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told."""
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return said


def test_segments_grow(settings: list[str]) -> None:
    grow_segments(torch.device("cpu"))
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_says_of_the_allocator_counts(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "expandable_segments:False")
    grow_segments(torch.device("cpu"))
    assert settings == []


def test_segments_that_can_not_grow(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.warns(
        UserWarning,
        match=r"segments can't grow here \(CUDA driver error: operation not supported\)",
    ):
        grow_segments(torch.device("cpu"))
    assert settings == ["expandable_segments:True", "expandable_segments:False"]


def in_a_segment_that_grows() -> bool:
    block = torch.empty(64 << 20, device=make_mesh(device="cuda").device)
    (segment,) = [
        s
        for s in torch.cuda.memory_snapshot()
        if s["address"] <= block.data_ptr() < s["address"] + s["total_size"]
    ]
    return segment["is_expandable"]


@pytest.mark.gpu
def test_segments_of_a_gpu_grow() -> None:
    need_gpus(1)
    assert run_ranks(in_a_segment_that_grows, 1) == [True], (
        "in a process of its own: another test's segments stay as they are"
    )
