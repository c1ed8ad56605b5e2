"""Hooks that tell a sharded module when a unit's forward or backward begins and ends.

[Note: where a unit's backward begins and ends] Autograd runs what is ready latest-made first. So a
hook on a unit's result runs before anything of the unit's backward (the tensor must have been made
in the unit: a result that is only passed on belongs to another), and the backward of a node made
before the unit's forward runs after everything of it, whether the gradient passes through that node
or not. Only what can't be seen is wrong: weights used outside of the module's call, and results
that leave it in an object of one's own. `Sharded` raises where gradients come without the first
hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retool.parallel.fsdp.sharded import Sharded, in_backward


class UnitInput(torch.autograd.Function):
    """Identity; its backward first calls `action`."""

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.action = action
        # A result that nobody used has no gradient: zeros in its place would be carried on
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.action()
        return (None, *grads)


def _mark(
    args: tuple[Any, ...], kwargs: dict[str, Any], action: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the arguments that need gradients through one `UnitInput`.

    Those in lists and other objects stay: the module may write to them.
    """
    if not kwargs and not any(isinstance(argument, tuple) for argument in args):
        return tuple(_marked(args, action)), kwargs

    def is_leaf(node: Any) -> bool:
        return not isinstance(node, tuple) and node is not kwargs

    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_leaf)
    return pytree.tree_unflatten(_marked(leaves, action), spec)


def _marked(leaves: Sequence[Any], action: Callable[[], None]) -> list[Any]:
    """The same, with those that need gradients passed through one `UnitInput`."""
    out = list(leaves)
    places = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if places:
        marked: Any = UnitInput.apply(action, *(leaves[place] for place in places))
        for place, tensor in zip(places, marked, strict=True):
            out[place] = tensor
    return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings, dataclasses, and what else torch can flatten."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, f.name, None) for f in fields(leaf)])


def _is_look_up(tensor: Tensor) -> bool:
    """Whether a tensor is rows of a parameter: its backward needs their numbers, and no weights."""
    node = tensor.grad_fn
    if node is None or node.name() != "EmbeddingBackward0":
        return False
    table = node.next_functions[0][0]
    return table is not None and table.name() == "torch::autograd::AccumulateGrad"


def attach(sharded: Sharded, place: int, module: nn.Module, first: bool, only: bool) -> None:
    """Gather around the module's forward; mark its inputs and hook its results so that the backward
    gathers and reduces.

    `first`: of the unit's modules, so the next unit is gathered ahead; after a later one (a tied
    head) comes the backward. `only`: no other module of the unit has a backward to come, so the
    inputs' gradients are the end of the unit's; otherwise they are the end of this use.
    """
    units = sharded.places[place]
    # Where its weights are: a unit never moves to another buffer
    weights = [unit.weights.data.untyped_storage().data_ptr() for unit in units]
    began = 0  # autograd's number of the first node that this forward makes

    def after_backward(counted: bool) -> None:
        if only:
            sharded.after_unit_backward(place, counted)
        else:
            sharded.release(place)

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal began
        # The call around this one uses the weights for longer
        inside = any(unit.running for unit in units)
        for unit in units:
            unit.running += 1
        if torch.is_grad_enabled():
            if not inside:
                # Run again by a checkpoint, it is no use more
                counted = not in_backward()
                args, kwargs = _mark(args, kwargs, partial(after_backward, counted))
                for unit in units:
                    unit.open_uses += counted
            began = torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        sharded.before_forward(place, first)
        return args, kwargs

    def after(_: nn.Module, args: Any, output: Any) -> None:
        for unit in units:
            unit.running = max(unit.running - 1, 0)
        # Run again by a checkpoint, it is in use until its backward ends
        if not in_backward() and not any(unit.running for unit in units):
            sharded.release(place)
        # As they are in this forward: by its backward the optimizer may have stepped
        version = sharded.version
        made = list[Tensor]()
        for tensor in _tensors(output):
            if tensor.untyped_storage().data_ptr() in weights:
                raise RuntimeError(
                    f"unit {units[0].layout.name!r} returns its own parameter, or a view of it, and "
                    "others take its memory: return a clone."
                )
            # What is only passed on has its hook from the unit that made it
            if tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= began:
                made.append(tensor)
        needs_weights = not all(_is_look_up(tensor) for tensor in made)
        for tensor in made:
            tensor.register_hook(lambda _: sharded.before_backward(place, version, needs_weights))
        for unit in units if first and made else ():
            unit.needed_in_backward = needs_weights

    pre_hook: Any = torch.compiler.disable(before)
    hook: Any = torch.compiler.disable(after)
    # Around the module's own hooks, which may use its weights
    module.register_forward_pre_hook(pre_hook, with_kwargs=True, prepend=True)
    module.register_forward_hook(hook, always_call=True)
