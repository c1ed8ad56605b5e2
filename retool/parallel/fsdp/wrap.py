"""`shard(module, units, mesh)`: fully sharded data parallelism for any module, given what to gather at once.

    forward, unit i:    gather(i) · start gather(i+1) · compute · release
    backward, unit i:   gather(i) · start gather(i-1) · compute · start reduce(i)
    end of backward:    reduce what has no input gradient (the embedding) · order all reductions before what follows

Memory of one rank, P parameters in S shards, with the largest unit U: fp32 master, gradient and two AdamW moments 16·P/S
bytes, the bf16 copy that is gathered 2·P/S (without `keep_copy` none: a gather casts), two gathered units 2·2·U and two gradient
buffers 2·4·U; an embedding or head beside blocks of another size has buffers of its own (6 bytes a parameter).
`Sharded.planned_bytes` is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from retool.parallel.collectives import sum_over
from retool.parallel.fsdp.layout import Layout, SlotSpec, make_layout
from retool.parallel.fsdp.overlap import Buffer, Overlap, assign_buffers
from retool.parallel.fsdp.unit import Unit
from retool.parallel.mesh import Mesh

Units = Sequence[tuple[str, Sequence[nn.Module]]]
Members = Mapping[str, list[tuple[str, tuple[int, ...]]]]
NORM_CHUNK = 1 << 24  # elements whose float64 copy `grad_norm` holds at once: 128 MiB


class Sharded:
    """A module whose parameters are sharded. Call it as the module; `master` and `grad` are this rank's flat shards."""

    def __init__(self, module: nn.Module, layout: Layout, mesh: Mesh, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
                 keep_copy: bool, reshard: bool, forward_prefetch: bool, backward_overlap: bool) -> None:  # fmt: skip
        self.module, self.layout, self.mesh = module, layout, mesh
        self.forward_prefetch, self.backward_overlap = forward_prefetch, backward_overlap
        param, master, reduce = dtypes
        self.overlap = Overlap(mesh.device)
        self.master = torch.zeros(layout.shard_numel, dtype=master, device=mesh.device)
        copied = param != master and (keep_copy or mesh.shard_group is None)
        self.compute = torch.zeros(layout.shard_numel, dtype=param, device=mesh.device) if copied else self.master
        self.param_dtype = param
        self.grad = torch.zeros(layout.shard_numel, dtype=torch.promote_types(reduce, torch.float32), device=mesh.device)
        self._callback_queued = False
        self._holding = False
        self._make_units(param, reduce, reshard)

    def _make_units(self, param: torch.dtype, reduce: torch.dtype, reshard: bool) -> None:
        layouts, device, alone = self.layout.units, self.mesh.device, self.mesh.shard_group is None
        shards = [slice(u.start, u.start + u.shard_numel) for u in layouts]
        sizes = [u.numel for u in layouts]
        weights_of = assign_buffers(sizes, [not reshard] * len(sizes))
        grads_of = assign_buffers(sizes, [False] * len(sizes))
        room_w = [max(n for n, b in zip(sizes, weights_of, strict=True) if b == k) for k in range(max(weights_of) + 1)]
        room_g = [max(n for n, b in zip(sizes, grads_of, strict=True) if b == k) for k in range(max(grads_of) + 1)]
        self.buffers = [] if alone else [Buffer(torch.zeros(n, dtype=param, device=device)) for n in room_w]
        self.grad_buffers = [] if alone else [Buffer(torch.zeros(n, dtype=reduce, device=device)) for n in room_g]
        self.units: list[Unit] = []
        for i, (layout, part) in enumerate(zip(layouts, shards, strict=True)):
            weights = Buffer(self.compute[part]) if alone else self.buffers[weights_of[i]]
            unit = Unit(i, layout, self.mesh, self.overlap, weights, None if alone else self.grad_buffers[grads_of[i]])
            unit.shard, unit.grad_shard = self.compute[part], self.grad[part]
            self.units.append(unit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def offload_master(self) -> None:
        """Keep the master weights in pinned host memory; whoever changes them brings the compute copy up to date."""
        if self.compute is self.master and self.param_dtype != self.master.dtype:
            raise ValueError("master weights in host memory can't be gathered from there: shard with keep_copy=True.")
        self.master = self.master.cpu().pin_memory()  # where both were one tensor, the device's goes on as the compute copy

    def refresh(self, copied: bool = False) -> None:
        """The master weights changed: renew the copy that is gathered (unless `copied`); whatever is gathered is stale."""
        if self.compute is not self.master and not copied:
            self.compute.copy_(self.master, non_blocking=True)
        for buffer in self.buffers:
            buffer.holder = None
        self.overlap.refreshed()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add their gradients up on this rank; the first one after it reduces them all.

        Saves a reduction per micro-batch at the price of a whole copy of the gradients, P · (bytes of the reduction).
        """
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def zero_grad(self) -> None:
        self.grad.zero_()

    def finish_gradients(self) -> None:
        """After an optimizer step's last backward: add the replicas' gradients (HSDP). `grad` is then the global sum."""
        sum_over(self.grad, self.mesh.replica_group)

    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the gradient, a 0-d tensor on the device; the squares are added in float64, which is a copy on CUDA."""
        squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in self.grad.split(NORM_CHUNK)]
        return sum_over(torch.stack(squares).sum(), self.mesh.shard_group).sqrt()

    def planned_bytes(self) -> int:
        """What `master`, `grad`, the compute copy and the buffers take on this rank; moments of the optimizer not included."""
        flats = {id(t): t for t in (self.master, self.compute, self.grad)}
        held = [unit.held for unit in self.units if unit.held is not None]
        return sum(t.nbytes for t in flats.values()) + sum(b.data.nbytes for b in (*self.buffers, *self.grad_buffers, *held))

    def before_forward(self, index: int, prefetch: bool = True) -> None:
        self.units[index].gather()
        if prefetch and self.forward_prefetch and index + 1 < len(self.units):
            self.units[index + 1].start_gather()

    def before_backward(self, index: int) -> None:
        if not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)  # type: ignore[attr-defined]
        self.units[index].gather()
        if self.backward_overlap and index > 0:
            self.units[index - 1].start_gather()

    def after_unit_backward(self, index: int) -> None:
        self.units[index].release()
        self.units[index].reduce(self._holding)
        if not self.backward_overlap:
            self.units[index].wait_reduced()

    def _after_backward(self) -> None:
        self._callback_queued = False
        for unit in self.units:
            unit.release()
            if unit.has_gradients() or (unit.holds and not self._holding):
                unit.reduce(self._holding)
        for unit in self.units:
            unit.wait_reduced()


class _Boundary(torch.autograd.Function):
    """Identity; its backward first calls `action`."""

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.action = action
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        ctx.action()
        return (None, *grads)


def _mark(tree: Any, action: Callable[[], None]) -> Any:
    """Pass the tensors of a nested structure that need gradients through one boundary."""
    leaves, spec = pytree.tree_flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not places or not torch.is_grad_enabled():
        return tree
    marked: Any = _Boundary.apply(action, *(leaves[i] for i in places))
    for i, tensor in zip(places, marked, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _hook(sharded: Sharded, index: int, module: nn.Module, first: bool, only: bool) -> None:
    """Gather around the module's forward; mark its inputs and outputs so that the backward gathers and reduces.

    The next unit follows a unit's `first` module; after a later one (a tied head) comes the backward, of the last unit.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if only:  # of a unit with several modules no single input marks the end of its backward
            args, kwargs = _mark((args, kwargs), lambda: sharded.after_unit_backward(index))
        sharded.before_forward(index, first)
        return args, kwargs

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        sharded.units[index].release()
        return _mark(output, lambda: sharded.before_backward(index))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


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
    keep_copy: bool = True,
    reshard_after_forward: bool = True,
    forward_prefetch: bool = True,
    backward_overlap: bool = True,
) -> Sharded:
    """Shard `module`'s parameters over `mesh.shards` ranks.

    `units`: (name, modules) in forward order; every parameter belongs to one of them, tied ones to the first that has
    it. `members` maps a parameter's name to the names and shapes stacked in it on disk (default: itself). Parameters on
    the meta device start as zeros (load them through `layout`, then `refresh`); others keep their values, which must be
    the same on every rank. Without `keep_copy` there is no copy of a rank's shard in `param_dtype`: the master weights are cast
    whenever a unit is gathered. `forward_prefetch` gathers the next unit during a unit's forward; `backward_overlap` the one before
    during its backward, and lets reductions run beside what follows (both off only to measure what they hide).

    Raises ValueError for a parameter in no unit.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    specs, originals = _collect(units, names, members or {})
    missing = [n for i, n in names.items() if i not in {id(p) for unit in originals for p in unit}]
    if missing:
        raise ValueError(f"parameter {missing[0]} (and {len(missing) - 1} more) is in no unit: add its module to `units`.")
    layout = make_layout(specs, mesh.shards, aliases, order)
    dtypes = param_dtype, master_dtype, reduce_dtype
    sharded = Sharded(module, layout, mesh, dtypes, keep_copy, reshard_after_forward, forward_prefetch, backward_overlap)
    replacement: dict[int, nn.Parameter] = {}
    for unit, old in zip(sharded.units, originals, strict=True):
        _keep_values(sharded, unit, old)
        replacement |= {id(o): new for o, new in zip(old, unit.parameters, strict=True)}
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                child._parameters[name] = replacement[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device != mesh.device and buffer.device.type != "meta":
                child._buffers[name] = buffer.to(mesh.device)
    for index, (_, modules) in enumerate(units):
        for child in modules:
            _hook(sharded, index, child, first=child is modules[0], only=len(modules) == 1)
    sharded.refresh()
    return sharded


def _collect(units: Units, names: dict[int, str], members: Members) -> tuple[list[tuple[str, list[SlotSpec]]], list[list[nn.Parameter]]]:
    """Slot specifications and the present parameters of every unit; a parameter counts once."""
    specs: list[tuple[str, list[SlotSpec]]] = []
    originals: list[list[nn.Parameter]] = []
    seen: set[int] = set()
    for unit_name, modules in units:
        slots: list[SlotSpec] = []
        mine: list[nn.Parameter] = []
        for parameter in (p for m in modules for p in m.parameters()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name, shape = names[id(parameter)], tuple(parameter.shape)
                slots.append((name, shape, members.get(name, [(name, shape)]), parameter.requires_grad))
                mine.append(parameter)
        specs.append((unit_name, slots))
        originals.append(mine)
    return specs, originals


def _keep_values(sharded: Sharded, unit: Unit, old: list[nn.Parameter]) -> None:
    """Copy this rank's part of parameters that have values already into the master shard."""
    low = sharded.mesh.shard_rank * unit.layout.shard_numel
    for slot, parameter in zip(unit.layout.slots, old, strict=True):
        start, stop = max(low, slot.offset), min(low + unit.layout.shard_numel, slot.offset + slot.numel)
        if parameter.device.type != "meta" and start < stop:
            here = unit.layout.start + start - low
            values = parameter.detach().reshape(-1)[start - slot.offset : stop - slot.offset]
            sharded.master[here : here + stop - start] = values.to(sharded.master)
