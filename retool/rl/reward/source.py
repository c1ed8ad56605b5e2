"""Which reward function a run asked for, and how it is loaded: one of ours, or the user's own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from retool.rl.reward.builtin import BUILT_IN, RewardFunction

# By name, of every reward function
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class RewardSource:
    """Where the reward function is: a built-in `name`, or a function `name` in the file `path`."""

    name: str
    path: str | None = None

    def load(self) -> RewardFunction:
        """The function. ValueError when it isn't there, or can't take what it is called with."""
        if self.path is not None:
            return _load_custom(self.path, self.name)
        if self.name not in BUILT_IN:
            raise ValueError(
                f"reward_model.name={self.name} is not known: use {', '.join(BUILT_IN)}, or "
                "file.py/function."
            )
        return BUILT_IN[self.name]


def _load_custom(path: str, name: str) -> RewardFunction:
    from retool.data.read.user_function import load_function

    arguments = ", ".join(ARGUMENTS)
    function = load_function(path, name, f"({arguments}) -> score")
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        wanted = f"def {name}({arguments})"
        raise ValueError(
            f"{name!r} in {path} can't be called ({error}): write {wanted}."
        ) from error
    return function


def find_reward(name: str | None, custom_path: str | None, custom_name: str | None) -> RewardSource:
    """What `reward_model.name` and `custom_reward_function` mean together.

    ValueError for a name that is neither a built-in nor `file.py/function`.
    """
    if custom_path is not None:
        return RewardSource(custom_name or "compute_score", custom_path)
    if name is None:
        return RewardSource("default")
    path, _, function = name.rpartition("/")
    if path.endswith(".py") and function:
        return RewardSource(function, path)
    source = RewardSource(name)
    source.load()
    return source
