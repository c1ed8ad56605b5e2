"""Where an answer gets its score: the reward function is called, and what it gives is checked.

A reward function is `compute_score(data_source, solution_str, ground_truth, extra_info) -> float |
{"score": float, …}`, sync or async; see `calling`. `solution_str` is what the model wrote, never a
tool's output.

No torch: reward workers import this.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from retool.rl.reward.calling import Asked, RewardFunction
from retool.rl.reward.foreign import plain
from retool.rl.types import FAILURE, TOOL_FAILURE

MAX_CHARACTERS = 10_000  # of a text that a reward function tells; the rest is cut
# What stands under these names says that an answer couldn't be judged
OURS = (FAILURE, TOOL_FAILURE)


def score_answer(function: RewardFunction, asked: Asked) -> tuple[float, dict[str, Any]]:
    """Call a reward function and check what it gives: (score, everything else it told).

    Raises what it raises, and ValueError.
    """
    result = function(**asked.arguments())
    if inspect.isawaitable(result):
        result = _event_loop().run_until_complete(_wait_for(result))
    return check_score(result)


@lru_cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for all calls: what an async function keeps between them, connections say, belongs to
    its event loop.
    """
    return asyncio.new_event_loop()


async def _wait_for(result: Any) -> Any:
    return await result


def check_score(result: Any) -> tuple[float, dict[str, Any]]:
    """(score, everything else that was told) from the return value of a reward function.

    ValueError where that is no score.
    """
    info: dict[str, Any] = {}
    if isinstance(result, Mapping):
        if "score" not in result:
            keys = sorted(map(str, result))
            raise ValueError(f"the reward function returned {keys} without 'score'")
        info = _told_beside_score(result)
        result = result["score"]
    score = _plain(result)
    if not isinstance(score, (int, float)):
        raise ValueError(f"the reward function returned {type(result).__name__}, not a number")
    if not math.isfinite(score):
        raise ValueError(f"the reward function returned {score}")
    # Validation averages it: one NaN would be the mean of all.
    accuracy = info.get("acc")
    if isinstance(accuracy, float) and not math.isfinite(accuracy):
        raise ValueError(f"the reward function returned acc={accuracy}")
    return float(score), info


def _told_beside_score(result: Mapping[Any, Any]) -> dict[str, Any]:
    """The numbers and texts in it; anything else is left out. A name of ours gets a `_` at its end."""
    told = {}
    for key, value in result.items():
        plain = _plain(value)
        if plain is not None and key != "score":
            name = str(key)
            told[f"{name}_" if name in OURS else name] = plain
    return told


def _plain(value: Any) -> float | int | str | None:
    """A plain number (of booleans, numpy's, torch's and classes of the user's own too) or text; None
    for anything else, and for a whole number that no float holds.
    """
    found = plain(value)
    if isinstance(found, str):
        return str(found)[:MAX_CHARACTERS]
    if not isinstance(found, (bool, int, float)):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    is_whole = isinstance(found, int) and not isinstance(found, bool)
    return int(found) if is_whole else number
