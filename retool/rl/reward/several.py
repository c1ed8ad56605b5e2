"""Several rewards of one answer: each under its own name, and their weighted sum.

A reward that returns None has nothing to say of an answer, and is left out of its sum.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retool.rl.reward.calling import ARGUMENTS, SEEN, Asked, RewardFunction, seen_by
from retool.rl.reward.foreign import own_copy
from retool.rl.reward.protocol import BUDGET_SPENT, JUDGES_LOST, Judged, Judges
from retool.rl.reward.score import check_score
from retool.rl.types import COUNTED, FAILURE, REWARD_OF

# Failures that say nothing about the answer: they are told first
NOT_THE_FUNCTIONS = (JUDGES_LOST, BUDGET_SPENT)


@dataclass(frozen=True)
class Part:
    """One of several reward functions, `adapted`."""

    name: str
    weight: float
    function: RewardFunction


def together(parts: Sequence[Part]) -> RewardFunction:
    """One async function out of several: the weighted sum, and what each part told.

    Its `signature` asks for what any of them asks for.
    """
    asked = {name for part in parts for name in seen_by(part.function)}
    seen = [name for name in SEEN if name in asked]

    async def weighed(**given: Any) -> dict[str, Any]:
        results = [_called(part.function, given) for part in parts]
        told: dict[str, Any] = {"score": 0.0}
        for part, result in zip(parts, await asyncio.gather(*results), strict=True):
            if result is not None:
                _add(told, part, result)
        return told

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in (*ARGUMENTS, *seen)]
    # Whoever calls a reward looks at its parameters for what it asks for: this one asks for what
    # its parts do.
    weighed.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return weighed


async def _called(
    function: RewardFunction,
    given: Mapping[str, Any],
) -> Any:
    """What a part returns to those of `given` that it asks for, which it may change."""
    names = (*ARGUMENTS, *seen_by(function))
    result = function(**own_copy({name: given[name] for name in names}))
    if isinstance(result, Awaitable):
        return await result
    return result


def _add(
    told: dict[str, Any],
    part: Part,
    result: Any,
) -> None:
    """Add a part's score to the sum, and what else it told under its name."""
    score, info = check_score(result)
    told["score"] += part.weight * score
    told[REWARD_OF + part.name] = score
    for key, value in info.items():
        told[f"{part.name}/{key}"] = value


class SeveralJudges:
    """Judges for several rewards, each for some of them; their scores are added.

    `names` are all rewards, in the order that was asked for. Where one of the judges fails, the
    answer gets the floor; where one is lost, it is lost.
    """

    def __init__(
        self,
        members: Sequence[Judges],
        names: Sequence[str],
        floor: float,
    ) -> None:
        self._members = members
        self._names = names
        self._floor = floor
        asked = {name for member in members for name in member.seen}
        self.seen = tuple(name for name in SEEN if name in asked)

    def problem(self) -> str:
        problems = [member.problem() for member in self._members]
        return next(filter(None, problems), "")

    async def score(
        self,
        asked: Asked,
        timeout: float | None = None,
    ) -> Judged:
        """Every member's answer to one call, side by side, as one."""
        calls = [member.score(asked, timeout) for member in self._members]
        verdicts = await asyncio.gather(*calls)
        told: dict[str, Any] = {}
        for judged in verdicts:
            told |= judged.info
        failed = [judged for judged in verdicts if judged.failure is not None]
        if failed:
            # One lost judge loses the answer: the floor of another's failure would be trained on.
            away = [judged for judged in failed if judged.failure in NOT_THE_FUNCTIONS]
            first = (away or failed)[0]
            return replace(first, info={**counts_in(told), **first.info})
        if not any(key.startswith(REWARD_OF) for key in told):
            return self._nothing_said()
        total = sum(judged.score for judged in verdicts)
        return Judged(total, unfolded(told, self._names))

    def _nothing_said(self) -> Judged:
        reason = "every reward function returned None: none has a score for this answer"
        return Judged(self._floor, {FAILURE: reason}, "exception", reason)

    def close(self) -> None:
        for member in self._members:
            member.close()


class WeightedJudges:
    """Judges of a single reward, as one of several: under its `name`, times its `weight`."""

    def __init__(
        self,
        judges: Judges,
        name: str,
        weight: float,
    ) -> None:
        self._judges = judges
        self._name = name
        self._weight = weight
        self.seen = judges.seen

    def problem(self) -> str:
        return self._judges.problem()

    async def score(
        self,
        asked: Asked,
        timeout: float | None = None,
    ) -> Judged:
        judged = await self._judges.score(asked, timeout)
        if judged.failure is not None:
            return judged
        info: dict[str, Any] = {REWARD_OF + self._name: judged.score, **counts_in(judged.info)}
        for key, value in judged.info.items():
            if key not in info:
                info[f"{self._name}/{key}"] = value
        return replace(judged, score=self._weight * judged.score, info=info)

    def close(self) -> None:
        self._judges.close()


def counts_in(told: Mapping[str, Any]) -> dict[str, Any]:
    """What judging took."""
    return {key: value for key, value in told.items() if key.startswith(COUNTED)}


def unfolded(
    told: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """What the parts told, without their names: the first that tells something stands for all.

    What a later one calls alike keeps its name, as in `length/acc`.
    """
    out = {key: value for key, value in told.items() if key.startswith((REWARD_OF, COUNTED))}
    for name in names:
        prefix = f"{name}/"
        for key, value in told.items():
            if not key.startswith(prefix):
                continue
            bare = key.removeprefix(prefix)
            out[key if bare in out else bare] = value
    return out
