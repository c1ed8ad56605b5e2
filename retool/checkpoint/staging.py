"""The host memory that holds a save while it is written, and everything else that saves keep between them."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist

from retool.checkpoint.flat.rows import rows_numel, to_rows, unit_numel
from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.remote import Mirror
from retool.checkpoint.types import PendingSave, SaveOptions, SaveResult
from retool.files.own_folder import OwnFolder
from retool.parallel.agreement import GivenUp, all_or_none
from retool.parallel.mesh import Mesh


@final
class Staging:
    """What saves keep between them: host buffers, a gloo group, and the save that may be under way.

    Made once, by all ranks together. Host memory: one copy of this rank's weights and moments,
    pinned where there is a GPU (torch rounds pinned blocks up to a power of two). Pinning takes
    about half a second per GB: `prepare` does it while the run starts, so that the first save
    doesn't.

    `folder` is the run's: saves are refused once another one has its place. Without, a folder that
    is missing is made.
    """

    def __init__(
        self, mesh: Mesh, timeout_s: float = 1800, folder: OwnFolder | None = None
    ) -> None:
        self._folder = folder
        # Of this run's saves, from their beginning to their tracker.
        self.slowest_s: float | None = None
        self.group: dist.ProcessGroup | None = None
        if mesh.world > 1:
            # gloo, on the host: NCCL's collectives would queue behind training's on the device,
            # from another thread.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self.group = group
        self.pending: PendingSave | None = None
        self.mirror: Mirror | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._preparing: threading.Thread | None = None

    def problem(self) -> str | None:
        """What has become of the run's folder, in words for the user; None if it is there, and on
        ranks that don't watch it.
        """
        return self._folder.problem() if self._folder is not None else None

    def require_folder(self) -> None:
        """Raises GivenUp if the run's folder isn't there any more."""
        problem = self.problem()
        if problem is not None:
            raise GivenUp(problem)

    def prepare(self, state: ModelState, mesh: Mesh, options: SaveOptions) -> None:
        """Make the host buffers that saves of `state` will need, in the background."""
        sizes = rows_numel(state.layout, mesh.shard_rank)
        pin = mesh.device.type == "cuda"

        def make() -> None:
            for key, flat in staged(state, options).items():
                self.buffer(key, sizes, flat.dtype, pin)

        self._preparing = threading.Thread(target=make, name="checkpoint buffers", daemon=True)
        self._preparing.start()

    def ready(self) -> None:
        """Wait for `prepare`."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def buffer(self, key: str, numel: int, dtype: torch.dtype, pin: bool) -> torch.Tensor:
        """A host buffer, the same one every time."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() != numel or buffer.dtype != dtype:
            buffer = torch.empty(numel, dtype=dtype, pin_memory=pin)
            self._buffers[key] = buffer
        return buffer

    def close(self) -> SaveResult | None:
        """Wait for everything that is under way, copies to `remote_url` included. Returns the last
        save's result.
        """
        result = None if self.pending is None else self.pending.wait()
        if self.mirror is not None:
            self.mirror.close()
        return result


def staged(state: ModelState, options: SaveOptions) -> dict[str, torch.Tensor]:
    """The flat shards that a save copies."""
    flats: dict[str, torch.Tensor | None] = {"params": state.params}
    if "optimizer" in options.contents:
        flats["exp_avg"] = state.exp_avg
        flats["exp_avg_sq"] = state.exp_avg_sq
    return {key: flat for key, flat in flats.items() if flat is not None}


def stage(
    state: ModelState, mesh: Mesh, options: SaveOptions, staging: Staging
) -> dict[str, torch.Tensor]:
    """This rank's rows of the weights and moments, in host memory.

    Collective; `GivenUp` on all ranks where one has no room for them.
    """
    staging.ready()
    total = rows_numel(state.layout, mesh.shard_rank)
    flats = staged(state, options)
    pin = mesh.device.type == "cuda"
    host = all_or_none(
        mesh.rank,
        staging.group,
        lambda: {key: staging.buffer(key, total, flat.dtype, pin) for key, flat in flats.items()},
    )
    for key, flat in flats.items():
        at = 0
        for unit in state.layout.units:
            # Through the device, where ranks exchange what lies across their rows.
            # Offloaded ones too
            part = flat.detach()[unit.start : unit.start + unit.shard_numel].to(
                mesh.device, non_blocking=True
            )
            room = host[key][at : at + unit_numel(unit, state.layout.shards, mesh.shard_rank)]
            mine = to_rows(
                unit,
                state.layout.shards,
                mesh.shard_rank,
                part,
                mesh.shard_group,
                None if pin else room,
            )
            if pin:
                room.copy_(mine, non_blocking=True)
            at += room.numel()
    if pin:
        # Training may write to the weights as soon as this returns
        torch.cuda.current_stream(mesh.device).synchronize()
    return host
