"""The process mesh: made once, passed down. World size 1 is a case, not a special case.

Ranks are numbered dp-major: `rank = dp_rank * sp + sp_rank`. Parameters are sharded over
`fsdp_size` consecutive ranks (all of them by default) and replicated `world / fsdp_size` times
(HSDP). Of these, `ep` consecutive ranks divide a layer's experts among them; those that have the same
experts share each expert's parameters.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from math import gcd

import torch
import torch.distributed as dist

from retool.parallel.collectives import gather_objects
from retool.parallel.meeting import meeting_place
from retool.parallel.network import choose_interface


@dataclass(frozen=True)
class Mesh:
    """Who this process is, and the groups it talks to. A group is None where it has one member."""

    rank: int
    world: int  # ranks
    sp: int  # consecutive ranks that share a pack's tokens (Ulysses)
    shards: int  # consecutive ranks that share the parameters
    device: torch.device
    ep: int = 1  # consecutive ranks that divide a layer's experts
    per_machine: int = 1  # ranks of a machine; where these differ, what divides them all
    sp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    shard_group: dist.ProcessGroup | None = field(default=None, repr=False)
    replica_group: dist.ProcessGroup | None = field(default=None, repr=False)
    world_group: dist.ProcessGroup | None = field(default=None, repr=False)
    ep_group: dist.ProcessGroup | None = field(default=None, repr=False)
    # The ranks among `shard_group` that have the same experts
    part_group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def dp(self) -> int:
        return self.world // self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    @property
    def shard_rank(self) -> int:
        return self.rank % self.shards

    @property
    def replicas(self) -> int:
        return self.world // self.shards

    @property
    def replica_rank(self) -> int:
        return self.rank // self.shards

    @property
    def shards_nearby(self) -> bool:
        """Whether the ranks that share the parameters are on one machine."""
        return self.per_machine % self.shards == 0

    def part(self) -> None:
        """Leave the groups that were made for this mesh; the world's stays."""
        made = (
            self.sp_group,
            self.shard_group,
            self.replica_group,
            self.ep_group,
            self.part_group,
        )
        for group in made:
            if group is not None:
                dist.destroy_process_group(group)


def pick_device(wanted: str = "auto") -> torch.device:
    """This process's device: `cuda:LOCAL_RANK` when there is a GPU, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_sizes(world: int, sp: int, shards: int, ep: int) -> None:
    """ValueError unless sp and shards divide the world, and ep the shards."""
    for name, size in (
        ("ulysses_sequence_parallel_size", sp),
        ("model.fsdp_config.fsdp_size", shards),
    ):
        if size < 1 or world % size:
            legal = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ValueError(
                f"{name}={size} does not fit {world} processes: it must divide the world size. Use "
                f"one of {legal}."
            )
    if ep < 1 or shards % ep:
        legal = ", ".join(str(n) for n in range(1, shards + 1) if shards % n == 0)
        raise ValueError(
            f"model.fsdp_config.expert_parallel_size={ep} does not fit {shards} ranks that share the "
            f"parameters: it must divide them. Use one of {legal}."
        )


def grow_segments(device: torch.device) -> None:
    """Let the CUDA allocator's segments grow (`expandable_segments`).

    Packs have any length, and freed blocks of other sizes are of no use otherwise. Not where
    PYTORCH_ALLOC_CONF says something, nor where the driver can't.
    """
    if any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        warnings.warn(
            f"the allocator's segments can't grow here ({error}): memory may be fragmented.",
            stacklevel=2,
        )


def make_mesh(
    sp: int = 1,
    fsdp_size: int = -1,
    device: str = "auto",
    timeout_s: float = 1800,
    ep: int = 1,
) -> Mesh:
    """Build the mesh from the launcher's environment (RANK, WORLD_SIZE, …; absent: one process).

    A collective call: every rank makes the same groups in the same order. NCCL on CUDA, gloo on the
    CPU. Sets up CUDA's allocator, see `grow_segments`, and gloo's network, see `choose_interface`.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    shards = world if fsdp_size in (-1, 0) else fsdp_size
    check_sizes(world, sp, shards, ep)
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        grow_segments(where)
    # No process group at all: a single process never waits for a network.
    if world == 1:
        return Mesh(0, 1, 1, 1, where)
    if not dist.is_initialized():
        choose_interface(os.environ)
        # gloo beside NCCL: objects and agreements travel on the host, without waiting for the
        # device.
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        # NCCL would keep addresses of what a CUDA graph's collectives send, and segments that grow
        # have none to keep
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        dist.init_process_group(
            backend,
            store=meeting_place(os.environ, timeout_s),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=where if where.type == "cuda" else None,
        )
    return Mesh(
        rank,
        world,
        sp,
        shards,
        where,
        ep,
        _ranks_of_machines(world),
        # In this order on every rank: new_group is collective, and groups are told apart by their
        # order alone.
        sp_group=_make_groups([range(i, i + sp) for i in range(0, world, sp)], rank),
        shard_group=_make_groups([range(i, i + shards) for i in range(0, world, shards)], rank),
        replica_group=_make_groups([range(i, world, shards) for i in range(shards)], rank),
        world_group=dist.group.WORLD,
        ep_group=_make_groups([range(i, i + ep) for i in range(0, world, ep)], rank),
        part_group=_make_groups(_same_experts(world, shards, ep), rank) if ep > 1 else None,
    )


def _ranks_of_machines(world: int) -> int:
    """See `Mesh.per_machine`. Ranks must agree: it decides which collectives they make."""
    mine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return gcd(*gather_objects(mine, dist.group.WORLD))


def _same_experts(world: int, shards: int, ep: int) -> list[range]:
    """The ranks that share the parameters of the same experts."""
    return [
        range(first + part, first + shards, ep)
        for first in range(0, world, shards)
        for part in range(ep)
    ]


def _make_groups(partition: list[range], rank: int) -> dist.ProcessGroup | None:
    """Make every group of a partition of the ranks; return the one with this rank.

    None for groups of one.
    """
    if len(partition[0]) == 1:
        return None
    groups = [dist.new_group(list(ranks)) for ranks in partition]
    mine = next(group for group, ranks in zip(groups, partition, strict=True) if rank in ranks)
    assert isinstance(mine, dist.ProcessGroup)
    return mine
