"""A step's numbers under the names that existing dashboards know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from retool.rl.types import Scored, Stop

Tokens = Sequence[np.ndarray]


def spread_of(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """name/{mean,max,min}; nothing for no values."""
    array = np.asarray(values, np.float64)
    return (
        {f"{name}/{kind}": float(getattr(array, kind)()) for kind in ("mean", "max", "min")}
        if array.size
        else {}
    )


def score_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """critic/{score,rewards} and acc: `score` as the reward function gave it, `rewards` with
    overlong shaping. Of the samples that weren't lost.
    """
    members = [member for member in members if not member.lost]
    accuracy = (
        [member.accuracy for member in members]
        if any("acc" in member.info for member in members)
        else []
    )
    scores = [member.score for member in members]
    rewards = [member.reward for member in members]
    return {
        **spread_of("critic/score", scores),
        **spread_of("critic/rewards", rewards),
        **spread_of("critic/acc", accuracy),
    }


def advantage_metrics(advantages: Tokens, returns: Tokens, masks: Tokens) -> dict[str, float]:
    """critic/{advantages,returns} over sampled tokens."""
    out: dict[str, float] = {}
    for name, arrays in (("advantages", advantages), ("returns", returns)):
        out |= spread_of(
            f"critic/{name}",
            np.concatenate([a[m] for a, m in zip(arrays, masks, strict=True)])
            if len(masks)
            else [],
        )
    return out


def length_metrics(
    members: Sequence[Scored], max_response: int, max_prompt: int
) -> dict[str, float]:
    """response_length, prompt_length (tool text counted) with the share that reached the limit, and
    num_turns.
    """
    found = [member.trajectory for member in members]
    responses = [t.response_length for t in found]
    prompts = [t.prompt_length for t in found]
    out = {**spread_of("response_length", responses), **spread_of("prompt_length", prompts)}
    if found:
        out["response_length/clip_ratio"] = float(
            np.mean([t.stop is Stop.LENGTH or t.response_length >= max_response for t in found])
        )
        out["prompt_length/clip_ratio"] = float(np.mean([n >= max_prompt for n in prompts]))
    return {**out, **spread_of("num_turns", [t.num_turns for t in found])}


def tool_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """tool/{calls,errors,timeouts} counted over the step; in seconds per call tool/latency, while
    it ran, and tool/queue_s, before it did; and why trajectories ended.
    """
    found = [member.trajectory for member in members]
    calls = sum(t.tool_calls for t in found)
    stops = Counter(t.stop for t in found)
    return {
        "tool/calls": calls,
        "tool/errors": sum(t.tool_errors for t in found),
        "tool/timeouts": sum(t.tool_timeouts for t in found),
        "tool/latency": sum(t.tool_seconds for t in found) / max(calls, 1),
        "tool/queue_s": sum(t.tool_queue_seconds for t in found) / max(calls, 1),
        **{f"stop/{stop.value}": stops[stop] for stop in Stop},
    }


def failure_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """reward/{exceptions,timeouts,killed}: how often the floor stood in for a score."""
    counts = Counter(member.failure for member in members)
    return {
        "reward/exceptions": counts["exception"],
        "reward/timeouts": counts["timeout"],
        "reward/killed": counts["killed"],
    }


def timing_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """timing_s/*."""
    return {f"timing_s/{name}": value for name, value in seconds.items()}
