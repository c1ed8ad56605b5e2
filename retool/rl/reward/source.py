"""Which reward function a run asked for, and how it is loaded: one of ours, one from a user's file,
or one that the user's program holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retool.rl.reward.builtin import BUILT_IN
from retool.rl.reward.calling import ARGUMENTS, RewardFunction, adapted
from retool.rl.reward.foreign import shown
from retool.rl.reward.several import Part, together

# Stands for a file in a configuration, where a program gave a function or tools of its own
OF_PROGRAM = "<program>"
OF_JUDGE = "judge"  # the built-in reward that a language model gives
OF_MODEL = "model"  # the one that a model for sequence classification gives
OF_TURNS = "environment"  # the built-in reward that is the sum of what turns were given


class OwnFunction:
    """A function that a program holds, wherever it is defined: in a notebook, in a main file.

    Another process is sent its code with what it refers to; functions of modules that can be
    imported there are sent by their names.
    """

    def __init__(
        self, function: Callable[..., Any] | None = None, packed: bytes | None = None
    ) -> None:
        self._function = function
        self._packed = packed

    def load(self) -> Callable[..., Any]:
        """The function: the program's own here, a copy in another process."""
        import dill

        if self._function is None:
            assert self._packed is not None
            self._function = dill.loads(self._packed)
        assert self._function is not None
        return self._function

    def packed(self) -> OwnFunction:
        """The function as it is sent to another process. ValueError if it holds what can't be sent."""
        import dill

        try:
            # recurse: with the globals that it refers to, and without all others of a notebook.
            return OwnFunction(packed=dill.dumps(self._function, recurse=True))
        except Exception as error:  # whatever the objects raise that it refers to
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                "the reward function can't be sent to the processes that judge, for what it refers to "
                f"({reason}). Have it make that when it is first called; or write 'async def' and "
                "give options={'reward_model.concurrent': True}: then it runs in this process."
            ) from error


@dataclass(frozen=True)
class RewardSource:
    """Where the reward function is: a built-in `name`, or a function `name` in the file `path`, or
    `own`, of the program that asked for the run; or `parts`, of which it is the weighted sum.
    """

    name: str
    path: str | None = None
    own: OwnFunction | None = None
    parts: tuple[RewardSource, ...] = ()
    weight: float = 1.0

    @property
    def is_users(self) -> bool:
        """Whether none of its functions is one of ours."""
        if self.parts:
            return all(part.is_users for part in self.parts)
        return self.path is not None or self.own is not None

    @property
    def is_judge(self) -> bool:
        """Whether a language model behind an address judges."""
        return self.name == OF_JUDGE and not (self.is_users or self.parts)

    @property
    def is_model(self) -> bool:
        """Whether a reward model judges, in the run's own process."""
        return self.name == OF_MODEL and not (self.is_users or self.parts)

    @property
    def is_function(self) -> bool:
        """Whether it is called, not asked of a model."""
        return not (self.is_judge or self.is_model)

    @property
    def asks_a_model(self) -> bool:
        """Whether any part of it is judged by a reward model."""
        return any(part.is_model for part in self.parts or (self,))

    @property
    def asks_a_judge(self) -> bool:
        """Whether any part of it is judged by a language model behind an address."""
        return any(part.is_judge for part in self.parts or (self,))

    @property
    def needs_truth(self) -> bool:
        """Whether a row needs a ground truth to be judged."""
        if self.parts:
            return any(part.needs_truth for part in self.parts)
        return not self.is_users and self.name not in (OF_JUDGE, OF_MODEL, OF_TURNS)

    @property
    def key(self) -> str:
        """The key under which faults of the reward are reported."""
        if self.parts and not any(part.own for part in self.parts):
            return "reward_model.functions"
        if self.own is not None or self.parts:
            return f"reward={self.name}"
        return "custom_reward_function" if self.path is not None else "reward_model.name"

    @property
    def turn_weight(self) -> float:
        """How much the rewards of turns, from tools and an environment, count in the score."""
        if self.parts:
            return sum(part.weight for part in self.parts if part.turn_weight)
        return float(self.name == OF_TURNS and not self.is_users)

    def load(self) -> RewardFunction:
        """The function. ValueError when it isn't there, or can't take what it is called with."""
        if self.parts:
            return together([Part(part.name, part.weight, part.load()) for part in self.parts])
        if self.own is not None:
            return adapted(self.own.load(), f"the reward {self.name!r}", self.name)
        if self.path is not None:
            return _load_custom(self.path, self.name)
        if self.name not in BUILT_IN:
            raise ValueError(
                f"reward_model.name={self.name} is not known: use {', '.join(BUILT_IN)}, or "
                "file.py/function."
            )
        return BUILT_IN[self.name]

    def packed(self) -> RewardSource:
        """As another process can be sent it. ValueError where it can't be."""
        if self.parts:
            return replace(self, parts=tuple(part.packed() for part in self.parts))
        return self if self.own is None else replace(self, own=self.own.packed())


def own_reward(function: Callable[..., Any]) -> RewardSource:
    """The source of a function that a program holds. ValueError where it is none."""
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else "no function"
        raise ValueError(
            f"the reward {shown(function)} is {kind}: give a function ({', '.join(ARGUMENTS)}) -> "
            "score, or the name of a built-in one."
        )
    name = getattr(function, "__name__", type(function).__name__)
    return RewardSource(name, own=OwnFunction(function))


def _load_custom(path: str, name: str) -> RewardFunction:
    from retool.data.read.user_function import load_function

    arguments = ", ".join(ARGUMENTS)
    function = load_function(path, name, f"({arguments}) -> score")
    return adapted(function, f"{name!r} in {path}", name)


def find_reward(name: str | None, custom_path: str | None, custom_name: str | None) -> RewardSource:
    """What `reward_model.name` and `custom_reward_function` mean together.

    ValueError for a name that is neither a built-in nor `file.py/function`.
    """
    if custom_path == OF_PROGRAM:
        raise ValueError(
            f"the run was started by a program that gave its own function {custom_name!r}, which is "
            "no file. Start it from there, or give the function's file."
        )
    if custom_path is not None:
        return RewardSource(custom_name or "compute_score", custom_path)
    if name is None:
        return RewardSource("default")
    path, _, function = name.rpartition("/")
    if path.endswith(".py") and function:
        return RewardSource(function, path)
    source = RewardSource(name)
    # Now, so that an unknown name is told with the configuration's other faults.
    source.load()
    return source


def several(
    sources: Sequence[RewardSource],
    weights: Sequence[float] = (),
) -> RewardSource:
    """The weighted sum of several rewards. ValueError where they can't be told apart, or there are
    more or fewer weights.
    """
    if not sources:
        raise ValueError("there is no reward in the list: give one, or no list.")
    weights = weights or [1.0] * len(sources)
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"a reward's weight isn't finite: {list(weights)}. Give numbers.")
    if len(weights) != len(sources):
        raise ValueError(
            f"there are {len(sources)} rewards and {len(weights)} weights: "
            "give one for each, or none."
        )
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"two rewards are called {twice!r}: their metrics would be one. Rename one of them."
        )
    pairs = zip(sources, weights, strict=True)
    parts = tuple(replace(source, weight=float(weight)) for source, weight in pairs)
    return RewardSource(" + ".join(names), parts=parts)


def find_several(
    functions: Sequence[str],
    weights: Sequence[float],
) -> RewardSource:
    """What `reward_model.functions` and `.weights` mean."""
    return several([find_reward(name, None, None) for name in functions], weights)
