"""A user's own loss or advantage estimator, named as `file.py/function`.

    def my_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]        # losses.py
    def my_advantages(inputs: AdvantageInputs) -> tuple[list, list]            # advantages.py

Preflight finds it and calls it once on made-up tokens: what it would fail on in the first update is
said before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from retool.data.read.user_function import load_function
from retool.rl.objective.advantages import ESTIMATORS, AdvantageInputs, Estimator, estimate
from retool.rl.objective.losses import LOSSES, Clip, LossInputs, PolicyLoss


def own_function(name: str) -> tuple[str, str] | None:
    """(file, function) of `file.py/function`; None for any other name."""
    path, _, function = name.rpartition("/")
    return (path, function) if path.endswith(".py") and function else None


def find_loss(name: str) -> PolicyLoss:
    """The loss of this name, or the user's own: any mean suits it, and it gets sequence ratios.

    ValueError where there is none, or it isn't what a loss is.
    """
    own = own_function(name)
    if own is None:
        return LOSSES[name]
    function = _load(*own, "(inputs: LossInputs) -> (loss_sum, metrics)")
    _try(function, _made_up_tokens(), _loss_problem, name)
    return PolicyLoss(function, sequence_level=True)


def find_estimator(name: str) -> Estimator:
    """The advantage estimator of this name, or the user's own.

    ValueError where there is none, or it isn't what an estimator is.
    """
    own = own_function(name)
    if own is None:
        return ESTIMATORS[name]
    function = _load(*own, "(inputs: AdvantageInputs) -> (advantages, returns)")
    estimator = Estimator(function, reads_norm_by_std=True, reads_token_rewards=True)
    _try(lambda inputs: estimate(estimator, inputs), _made_up_rewards(), lambda _: "", name)
    return estimator


def _load(path: str, function: str, signature: str) -> Callable[..., Any]:
    found = load_function(path, function, signature)
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise ValueError(
            f"{function!r} in {path} can't be called with one argument ({error}): write "
            f"def {function}{signature}."
        ) from error
    return found


def _try(
    function: Callable[[Any], Any], inputs: Any, problem_of: Callable[[Any], str], name: str
) -> None:
    """ValueError where `function` fails on made-up `inputs`, or gives what has a problem."""
    try:
        problem = problem_of(function(inputs))
    except Exception as error:  # whatever the user's function raises
        problem = f"it raises {type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"{name} fails on made-up tokens: {problem}. Mend the function.")


def _made_up_tokens() -> LossInputs:
    """Two sampled tokens, and one that wasn't."""
    zeros = torch.zeros(3)
    return LossInputs(
        logp_T=torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
        old_T=torch.tensor([-1.1, -1.8, -3.0]),
        sampler_T=torch.tensor([-1.1, -1.9, -3.0]),
        advantages_T=torch.tensor([1.0, -0.5, 0.0]),
        weights_T=torch.tensor([0.5, 0.5, 0.0]),
        sampled_T=torch.tensor([True, True, False]),
        token_share=0.5,
        clip=Clip(),
        ref_T=zeros,
        sequence_log_ratio_T=zeros,
    )


def _loss_problem(given: Any) -> str:
    """What is wrong with what a loss returned; "" for nothing."""
    if not isinstance(given, tuple) or len(given) != 2:
        return f"it returns a {type(given).__name__}, not (loss_sum, metrics)"
    loss, metrics = given
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.requires_grad:
        return "its loss_sum is no single number with a gradient: return inputs.sum(token losses)"
    if not isinstance(metrics, dict):
        return f"its metrics are a {type(metrics).__name__}, not a dict of tensors"
    for name, value in metrics.items():
        if not isinstance(value, torch.Tensor) or value.dim() != 0 or value.requires_grad:
            return f"its metric {name!r} is no single number without a gradient: detach the sum"
    return ""


def _made_up_rewards() -> AdvantageInputs:
    """Two samples of one prompt and one of another, with text of a tool in between."""
    masks = [np.array([False, True, False, True]), np.array([False, True]), np.array([True, True])]
    rewards = [np.where(mask, 1.0, 0.0) for mask in masks]
    return AdvantageInputs(rewards, masks, np.array([0, 0, 1]))
