"""A module whose parameters are sharded: when its units are gathered, released and reduced.

    forward of unit i    gather(i) · start gather(i+1) · compute · release(i)
    backward of unit i   gather(i) · start gather(i-1) · compute · release(i) · start reduce(i)
                         (an embedding's needs no weights: neither gather)
                         · in a step's last backward: start to add up over the replicas
    end of a backward    reduce what no input's gradient has announced (the embedding) · wait for all
                         reductions

`fsdp/hooks.py` calls these in the course of a forward and a backward; `fsdp/overlap.py` draws them.

Memory of one rank, for P parameters in S shards whose largest unit has U:

    16 · P/S     fp32 master weights and gradient, two AdamW moments
     2 · P/S     the bf16 copy that is gathered (without `keep_copy` none: a gather casts)
     2 · 2 · U   two gathered units in bf16
     2 · 4 · U   two gradient buffers in fp32
     6 · V       each of embedding and head that differs in size from the blocks, of V parameters

Several units may have one *place* in the order: they are gathered, released and reduced together. A
block's experts are one of their own where ranks divide them (`fsdp/layout.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retool.parallel.collectives import sum_over
from retool.parallel.fsdp.buffers import make_buffers
from retool.parallel.fsdp.layout import Layout
from retool.parallel.fsdp.overlap import Overlap
from retool.parallel.fsdp.unit import Unit, make_units
from retool.parallel.mesh import Mesh

# `grad_norm` holds the float64 copy of so many elements at once: 128 MiB
NORM_CHUNK_NUMEL = 1 << 24


@dataclass(frozen=True)
class Dtypes:
    """`param` is gathered and computed with, `master` is what the optimizer updates, `reduce` is
    what gradients are summed over the ranks in.
    """

    param: torch.dtype
    master: torch.dtype
    reduce: torch.dtype


def in_backward() -> bool:
    """Whether autograd is running here: a forward in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


class Sharded:
    """A module whose parameters are sharded: call it as the module.

    `master` and `grad` are this rank's flat shards, `compute` what is gathered: a copy of `master`
    in the dtype of the parameters, or `master` itself.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        mesh: Mesh,
        dtypes: Dtypes,
        *,
        trained: bool,
        keep_copy: bool,
        own_buffers: Sequence[bool],
        forward_prefetch: bool,
        backward_overlap: bool,
    ) -> None:
        self.module = module
        self.layout = layout
        self.mesh = mesh
        self.trained = trained
        self.forward_prefetch = forward_prefetch
        self.backward_overlap = backward_overlap
        self.param_dtype = dtypes.param
        self.overlap = Overlap(mesh.device)

        numel = layout.shard_numel
        self.master = torch.zeros(numel, dtype=dtypes.master, device=mesh.device)
        self.compute = self.master
        # What a rank owns alone isn't gathered, and so is never cast on the way
        alone = any(unit.owners == 1 for unit in layout.units)
        if dtypes.param != dtypes.master and (keep_copy or alone):
            self.compute = torch.zeros(numel, dtype=dtypes.param, device=mesh.device)
        # At least fp32, whatever is sent: every micro-batch of a step is added here
        self.grad = torch.zeros(
            numel if trained else 0,
            dtype=torch.promote_types(dtypes.reduce, torch.float32),
            device=mesh.device,
        )

        self.version = 0  # of the weights: a backward must find those of its forward
        self._announced_backward = -1  # the last one that will call `_after_backward`
        self._holding = False  # inside `no_sync`
        self._held = False  # some backward of this step was
        self._last = False  # inside `last_backward`
        # Gradients take turns even where every unit's weights stay gathered
        weights = make_buffers(layout.units, own_buffers, dtypes.param, mesh.device)
        shared = [False] * len(own_buffers)
        grads = make_buffers(layout.units if trained else (), shared, dtypes.reduce, mesh.device)
        self.buffers = weights.all
        self.grad_buffers = grads.all
        self.units = make_units(
            layout,
            mesh,
            self.overlap,
            compute=self.compute,
            grad=self.grad,
            weights=weights,
            grads=grads,
        )
        self.places: list[list[Unit]] = [[] for _ in own_buffers]
        for unit in self.units:
            self.places[unit.layout.place].append(unit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    # --- the weights ---

    def offload_master(self) -> None:
        """Keep the master weights in pinned host memory.

        Whoever changes them brings the compute copy up to date.
        """
        if self.compute is self.master and self.param_dtype != self.master.dtype:
            raise ValueError(
                "master weights in host memory can't be gathered from there: shard with keep_copy=True."
            )
        # Where both were one tensor, the device's goes on as the compute copy
        self.master = self.master.cpu().pin_memory()

    def refresh(self, copied: bool = False) -> None:
        """The master weights have changed: whatever is gathered is stale.

        Renews the copy that is gathered, unless it was `copied` already.
        """
        if self.compute is not self.master and not copied:
            self.compute.copy_(self.master, non_blocking=True)
        self.version += 1
        for unit in self.units:
            unit.open_uses = 0
        # Nobody's, so that every next use gathers anew
        for buffer in self.buffers:
            buffer.holder = None
        self.overlap.follow_new_weights()

    def planned_bytes(self) -> int:
        """Bytes of `master`, `grad`, the compute copy and the buffers on this rank, exactly.

        The optimizer's moments come on top.
        """
        flats = {id(t): t for t in (self.master, self.compute, self.grad)}
        held = [u.gradients.held for u in self.units if u.gradients.held is not None]
        buffers = [b.data for b in (*self.buffers, *self.grad_buffers, *held)]
        return sum(t.nbytes for t in (*flats.values(), *buffers))

    # --- the gradients ---

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add their gradients up on this rank; the first one after it reduces
        them all.

        Saves a reduction per micro-batch at the price of a whole copy of the gradients, P · (bytes
        of the reduction).
        """
        before = self._holding
        self._holding = True
        self._held = True
        try:
            yield
        finally:
            self._holding = before

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """The backward inside is the optimizer step's last.

        With replicas (HSDP) each unit's gradients are added up over them as soon as they are whole,
        beside the rest of the backward. Without it that starts in `finish_gradients`.
        """
        _check_incomplete(self.units, self.mesh)
        self._last = True
        try:
            yield
        finally:
            self._last = False

    def zero_grad(self) -> None:
        """Forget all gradients, also held ones and what a forward or backward that failed has left."""
        for unit in self.units:
            unit.give_up()
            unit.gradients.forget()
        self.grad.zero_()
        self._held = False

    def finish_gradients(self) -> None:
        """After an optimizer step's last backward: `grad` is the global sum from here on.

        Reduces what is still held, and adds the replicas' gradients (HSDP). Calling it again
        changes nothing; `AdamW.step` does.
        """
        for unit in self.units:
            if unit.gradients.holds or unit.gradients.arrived():
                self._reduce(unit)
        for unit in self.units:
            unit.gradients.settle()
        for unit in self.units:
            unit.gradients.complete_sum()
        for unit in self.units:
            unit.gradients.wait()
        for buffer in self.buffers:
            # A unit that was gathered ahead and not run: the weights may change from here on
            buffer.settle()

    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the gradient, a 0-d tensor on the device.

        The squares are added in float64, which is a copy on CUDA: chunk by chunk.
        """
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float64).square()
            for part in self.grad.split(NORM_CHUNK_NUMEL)
        ]
        # Replicas have the same sum: only shards are different parts of it
        return sum_over(torch.stack(squares).sum(), self.mesh.shard_group).sqrt()

    # --- what the hooks call ---

    def before_forward(self, place: int, prefetch: bool = True) -> None:
        """Gather the units at `place`, and start gathering those after them.

        RuntimeError inside the forward of a unit whose buffer one of these shares.
        """
        recomputing = in_backward()
        for unit in self.places[place]:
            buffer = unit.weights
            holder = buffer.holder
            in_forward = buffer.in_use == "forward" and not recomputing
            if in_forward and holder is not None and holder != unit.index:
                raise RuntimeError(
                    f"unit {unit.layout.name!r} runs inside the forward of unit "
                    f"{self.units[holder].layout.name!r}, whose parameters "
                    "are in the same memory: make both one unit, or call one after the other."
                )
            unit.gather()
            buffer.in_use = "backward" if recomputing else "forward"
            # Its backward is yet to come: gradients that arrive without it are refused
            if not recomputing:
                unit.announced = False
        # In a backward those before are the next ones, and `before_backward` has started them
        if not recomputing and prefetch and self.forward_prefetch:
            for following in self.places[place + 1 : place + 2]:
                for unit in following:
                    unit.start_gather()

    def before_backward(self, place: int, version: int, needs_weights: bool) -> None:
        """Gather the units at `place` with their forward's weights, if this backward needs them; start
        to gather those before.

        `version`: of the weights in that forward.
        """
        _check_backward(self.trained, version == self.version)
        backward = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        # Once for each backward, whichever unit comes first in it
        if backward != self._announced_backward:
            # A checkpoint's may be a backward of its own, inside the last one
            if not self._last:
                _check_incomplete(self.units, self.mesh)
            self._announced_backward = backward
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._after_backward)  # type: ignore[attr-defined]
        for unit in self.places[place]:
            unit.announced = True
            if needs_weights:
                unit.gather()
                unit.weights.in_use = "backward"
        if self.backward_overlap and place > 0:
            for unit in self.places[place - 1]:
                if unit.needed_in_backward:
                    unit.start_gather()

    def release(self, place: int) -> None:
        """The units at `place` aren't used for now."""
        for unit in self.places[place]:
            unit.release()

    def after_unit_backward(self, place: int, counted: bool) -> None:
        """Release the units at `place` and start to reduce their gradients.

        `counted`: the forward was among the units' `open_uses`; one in a backward wasn't.
        """
        self.release(place)
        for unit in self.places[place]:
            self._reduce(unit)
            unit.open_uses -= counted
            # A unit that is used again has more gradients to come
            whole = counted and unit.open_uses == 0
            if self._last and not self._holding and whole:
                unit.gradients.complete_sum()
            if not self.backward_overlap:
                unit.gradients.wait()

    def _after_backward(self) -> None:
        """The end of a backward: reduce what is left, and order what follows after it."""
        for unit in self.units:
            unit.release()
            held_and_due = unit.gradients.holds and not self._holding
            if unit.gradients.arrived() or held_and_due:
                self._reduce(unit)
        for unit in self.units:
            unit.gradients.settle()

    def _reduce(self, unit: Unit) -> None:
        if unit.gradients.arrived() and not unit.announced:
            raise RuntimeError(
                f"unit {unit.layout.name!r} got gradients, but its weights were not gathered for "
                "them: call its module itself, and let it return tensors, or tuples, lists, dicts "
                "or dataclasses of them."
            )
        if unit.gradients.arrived():
            _check_incomplete([unit], self.mesh)
        # Held on some ranks only, perhaps: all must reduce it in one way
        unit.gradients.reduce(self._holding, wide=self._held)


def _check_incomplete(units: Sequence[Unit], mesh: Mesh) -> None:
    """RuntimeError where gradients would come to a sum over replicas that is complete."""
    if mesh.replica_group is not None and any(unit.gradients.complete for unit in units):
        raise RuntimeError(
            "the gradients were added over the replicas already: call zero_grad before the next backward, "
            "and put only the last one of a step into last_backward."
        )


def _check_backward(trained: bool, same_weights: bool) -> None:
    """RuntimeError where a gather would not give the weights of the forward, or where their gradients
    would be lost.
    """
    if not trained:
        raise RuntimeError(
            "the module was sharded without room for gradients: shard it with trained=True."
        )
    if not same_weights:
        raise RuntimeError(
            "the weights have changed since this forward: run it again, or its backward before the "
            "optimizer's step."
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a backward of the backward (create_graph=True) would not find the weights: it isn't "
            "supported."
        )
