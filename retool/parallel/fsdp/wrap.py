"""`shard(module, units, mesh)`: fully sharded data parallelism for any module, given what to gather
at once.

    forward, unit i:    gather(i) · start gather(i+1) · compute · release
    backward, unit i:   gather(i) · start gather(i-1) · compute · start reduce(i)
    end of backward:    reduce what has no input gradient (the embedding) · order all reductions before what follows

Memory of one rank, P parameters in S shards, with the largest unit U: fp32 master, gradient and two
AdamW moments 16·P/S bytes, the bf16 copy that is gathered 2·P/S (without `keep_copy` none: a gather
casts), two gathered units 2·2·U and two gradient buffers 2·4·U; an embedding or head beside blocks
of another size has buffers of its own (6 bytes a parameter). `Sharded.planned_bytes` is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from retool.parallel.collectives import sum_over
from retool.parallel.fsdp.collect import Members, Units, check_alike, collect
from retool.parallel.fsdp.hooks import attach, in_backward
from retool.parallel.fsdp.layout import Layout, make_layout
from retool.parallel.fsdp.overlap import Buffer, Overlap, assign_buffers, rooms
from retool.parallel.fsdp.unit import Unit, settle
from retool.parallel.mesh import Mesh

NORM_CHUNK = 1 << 24  # elements whose float64 copy `grad_norm` holds at once: 128 MiB


class Sharded:
    """A module whose parameters are sharded.

    Call it as the module; `master` and `grad` are this rank's flat shards.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        mesh: Mesh,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        trained: bool,
        keep_copy: bool,
        stay: Sequence[bool],
        forward_prefetch: bool,
        backward_overlap: bool,
    ) -> None:
        self.module = module
        self.layout = layout
        self.mesh = mesh
        self.trained = trained
        self.forward_prefetch = forward_prefetch
        self.backward_overlap = backward_overlap
        param, master, reduce = dtypes
        self.overlap = Overlap(mesh.device)
        self.master = torch.zeros(layout.shard_numel, dtype=master, device=mesh.device)
        copied = param != master and (keep_copy or mesh.shard_group is None)
        self.compute = (
            torch.zeros(layout.shard_numel, dtype=param, device=mesh.device)
            if copied
            else self.master
        )
        self.param_dtype = param
        self.grad = torch.zeros(
            layout.shard_numel if trained else 0,
            dtype=torch.promote_types(reduce, torch.float32),
            device=mesh.device,
        )
        self.version = 0  # of the weights: a backward must find those of its forward
        self._backward = -1  # the last one that will call `_after_backward`
        self._holding = False
        self._replicas_added = False
        self._make_units(param, reduce, stay)

    def _make_units(self, param: torch.dtype, reduce: torch.dtype, stay: Sequence[bool]) -> None:
        layouts = self.layout.units
        device = self.mesh.device
        alone = self.mesh.shard_group is None
        reduced = self.trained and not alone
        shards = [slice(u.start, u.start + u.shard_numel) for u in layouts]
        sizes = [u.numel for u in layouts]
        weights_of = assign_buffers(sizes, stay)
        grads_of = assign_buffers(sizes, [False] * len(sizes))
        self.buffers = (
            []
            if alone
            else [
                Buffer(torch.zeros(n, dtype=param, device=device)) for n in rooms(sizes, weights_of)
            ]
        )
        self.grad_buffers = [
            Buffer(torch.zeros(n, dtype=reduce, device=device))
            for n in rooms(sizes, grads_of)
            if reduced
        ]
        self.units: list[Unit] = []
        for i, (layout, part) in enumerate(zip(layouts, shards, strict=True)):
            weights = Buffer(self.compute[part]) if alone else self.buffers[weights_of[i]]
            unit = Unit(
                i,
                layout,
                self.mesh,
                self.overlap,
                weights,
                self.grad_buffers[grads_of[i]] if reduced else None,
            )
            unit.shard = self.compute[part]
            unit.grad_shard = self.grad[part]
            self.units.append(unit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def offload_master(self) -> None:
        """Keep the master weights in pinned host memory; whoever changes them brings the compute
        copy up to date.
        """
        if self.compute is self.master and self.param_dtype != self.master.dtype:
            raise ValueError(
                "master weights in host memory can't be gathered from there: shard with keep_copy=True."
            )
        # Where both were one tensor, the device's goes on as the compute copy
        self.master = self.master.cpu().pin_memory()

    def refresh(self, copied: bool = False) -> None:
        """The master weights changed: renew the copy that is gathered (unless `copied`); whatever
        is gathered is stale.
        """
        if self.compute is not self.master and not copied:
            self.compute.copy_(self.master, non_blocking=True)
        self.version += 1
        for buffer in self.buffers:
            buffer.holder = None
        self.overlap.refreshed()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add their gradients up on this rank; the first one after it reduces
        them all.

        Saves a reduction per micro-batch at the price of a whole copy of the gradients, P · (bytes
        of the reduction).
        """
        before = self._holding
        self._holding = True
        try:
            yield
        finally:
            self._holding = before

    def zero_grad(self) -> None:
        """Forget all gradients, also held ones and what a backward that failed has left."""
        for unit in self.units:
            unit.forget_gradients()
        self.grad.zero_()
        self._replicas_added = False

    def finish_gradients(self) -> None:
        """After an optimizer step's last backward: reduce what is still held, add the replicas'
        gradients (HSDP). `grad` is then the global sum. Calling it again changes nothing;
        `AdamW.step` does.
        """
        for unit in self.units:
            if unit.holds or unit.has_gradients():
                self._reduce(unit)
        for unit in self.units:
            unit.wait_reduced()
        for buffer in self.buffers:
            # A unit that was gathered ahead and not run: the weights may change from here on
            settle(buffer)
        if not self._replicas_added:
            sum_over(self.grad, self.mesh.replica_group)
            self._replicas_added = True

    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the gradient, a 0-d tensor on the device; the squares are added in
        float64, which is a copy on CUDA.
        """
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float64).square()
            for part in self.grad.split(NORM_CHUNK)
        ]
        return sum_over(torch.stack(squares).sum(), self.mesh.shard_group).sqrt()

    def planned_bytes(self) -> int:
        """What `master`, `grad`, the compute copy and the buffers take on this rank; moments of the
        optimizer not included.
        """
        flats = {id(t): t for t in (self.master, self.compute, self.grad)}
        held = [unit.held for unit in self.units if unit.held is not None]
        return sum(t.nbytes for t in flats.values()) + sum(
            b.data.nbytes for b in (*self.buffers, *self.grad_buffers, *held)
        )

    def before_forward(self, index: int, prefetch: bool = True) -> None:
        """Gather. RuntimeError inside the forward of a unit whose buffer this one shares."""
        unit = self.units[index]
        again = in_backward()
        buffer = unit.weights
        if buffer.in_use == "forward" and buffer.holder not in (index, None) and not again:
            raise RuntimeError(
                f"unit {unit.layout.name!r} runs inside the forward of unit "
                f"{self.units[buffer.holder].layout.name!r}, whose parameters "
                "are in the same memory: make both one unit, or call one after the other."
            )
        unit.gather()
        buffer.in_use = "backward" if again else "forward"
        if again:
            return
        unit.announced = False
        if prefetch and self.forward_prefetch and index + 1 < len(self.units):
            self.units[index + 1].start_gather()

    def before_backward(self, index: int, version: int) -> None:
        """Gather.

        RuntimeError where that would not give the weights of the forward, or where their gradients
        would be lost.
        """
        # type: ignore[attr-defined]
        unit = self.units[index]
        task = torch._C._current_graph_task_id()
        if not self.trained:
            raise RuntimeError(
                "the module was sharded without room for gradients: shard it with trained=True."
            )
        if version != self.version:
            raise RuntimeError(
                "the weights have changed since this forward: run it again, or its backward before the "
                "optimizer's step."
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward of the backward (create_graph=True) would not find the weights: it isn't "
                "supported."
            )
        if self._replicas_added and self.mesh.replica_group is not None:
            raise RuntimeError(
                "the gradients were added over the replicas already: call zero_grad before the next backward."
            )
        if task != self._backward:
            self._backward = task
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)  # type: ignore[attr-defined]
        unit.announced = True
        unit.gather()
        unit.weights.in_use = "backward"
        if self.backward_overlap and index > 0:
            self.units[index - 1].start_gather()

    def after_unit_backward(self, index: int) -> None:
        self.units[index].release()
        self._reduce(self.units[index])
        if not self.backward_overlap:
            self.units[index].wait_reduced()

    def _after_backward(self) -> None:
        for unit in self.units:
            unit.release()
            if unit.has_gradients() or (unit.holds and not self._holding):
                self._reduce(unit)
        for unit in self.units:
            unit.wait_reduced()

    def _reduce(self, unit: Unit) -> None:
        if unit.has_gradients() and not unit.announced:
            raise RuntimeError(
                f"unit {unit.layout.name!r} got gradients, but its weights were not gathered for "
                "them: call its module itself, and let it return tensors, or tuples, lists, dicts "
                "or dataclasses of them."
            )
        unit.reduce(self._holding)


def shard(
    module: nn.Module,
    units: Units,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype = torch.bfloat16,
    master_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    members: Members | None = None,
    aliases: tuple[tuple[str, str], ...] = (),
    order: tuple[str, ...] = (),
    trained: bool = True,
    keep_copy: bool = True,
    reshard_after_forward: bool = True,
    forward_prefetch: bool = True,
    backward_overlap: bool = True,
) -> Sharded:
    """Shard `module`'s parameters over `mesh.shards` ranks.

    `units`: (name, modules) in forward order, an outer one before those inside it; every parameter
    belongs to the innermost one around it, and modules that share one are one unit. Every rank must
    run the same units in the same order; each may run any number of times. A unit's weights are
    there while its module is called and in its backward, not between: it returns its results
    (tensors, or tuples, lists, dicts, dataclasses of them), and doesn't write into its inputs in
    place. Freeze parameters before.

    `members` maps a parameter's name to the names and shapes stacked in it on disk (default:
    itself). Parameters on the meta device start as zeros (load them through `layout`, then
    `refresh`); others keep their values, the same on every rank. `trained=False`: no gradient is
    ever wanted, and no memory kept for it. Without `keep_copy` there is no copy of a rank's shard
    in `param_dtype`: the master weights are cast whenever a unit is gathered. `forward_prefetch`
    gathers the next unit during a unit's forward; `backward_overlap` the one before during its
    backward, and lets reductions run beside what follows (both off only to measure what they hide).

    Raises ValueError for units that can't be sharded so, see `collect`.
    """
    found = collect(module, units, members or {})
    check_alike(found, mesh)
    layout = make_layout([(unit.name, unit.slots) for unit in found], mesh.shards, aliases, order)
    dtypes = (param_dtype, master_dtype, reduce_dtype)
    stay = [unit.outer or not reshard_after_forward for unit in found]
    sharded = Sharded(
        module, layout, mesh, dtypes, trained, keep_copy, stay, forward_prefetch, backward_overlap
    )
    replacement: dict[int, nn.Parameter] = {}
    for unit, old in zip(sharded.units, found, strict=True):
        _keep_values(sharded, unit, old.parameters)
        replacement |= {id(o): new for o, new in zip(old.parameters, unit.parameters, strict=True)}
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                # A module that keeps a list of its own brings it up to date
                setattr(child, name, replacement[id(parameter)])
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device != mesh.device and buffer.device.type != "meta":
                child._buffers[name] = buffer.to(mesh.device)
    for index, (_, modules) in enumerate(units):
        for child in modules:
            attach(sharded, index, child, first=child is modules[0], only=len(modules) == 1)
    sharded.refresh()
    return sharded


def _keep_values(sharded: Sharded, unit: Unit, old: list[nn.Parameter]) -> None:
    """Copy this rank's part of parameters that have values already into the master shard."""
    low = sharded.mesh.shard_rank * unit.layout.shard_numel
    for slot, parameter in zip(unit.layout.slots, old, strict=True):
        start = max(low, slot.offset)
        stop = min(low + unit.layout.shard_numel, slot.offset + slot.numel)
        if parameter.device.type != "meta" and start < stop:
            here = unit.layout.start + start - low
            values = parameter.detach().reshape(-1)[start - slot.offset : stop - slot.offset]
            sharded.master[here : here + stop - start] = values.to(sharded.master)
