"""The numbers of a step, under the names that existing dashboards know."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from retool.rl.types import COUNTED, REWARD_OF, Scored, Stop, Trajectory

JUDGE_COUNTS = (
    "calls",
    "cached",
    "garbage",
    "over_budget",
    "retries",
    "tokens",
)
PerToken = Sequence[np.ndarray]


def spread_of(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """name/{mean,max,min}; nothing for no values."""
    array = np.asarray(values, np.float64)
    if not array.size:
        return {}
    return {
        f"{name}/mean": float(array.mean()),
        f"{name}/max": float(array.max()),
        f"{name}/min": float(array.min()),
    }


def score_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """critic/{score,rewards,acc} and environment/reward of the samples that weren't lost.

    `score` is what the reward function gave, `rewards` that with overlong shaping; where the KL is in
    the reward, `make_experience` tells `rewards` less the KL. There is no acc where the reward
    function told none.
    """
    # A lost sample has a score of 0, which is nobody's opinion of it.
    judged = [member for member in members if not member.lost]
    metrics = {
        **spread_of("critic/score", [member.score for member in judged]),
        **spread_of("critic/rewards", [member.reward for member in judged]),
    }
    given = [member.trajectory for member in judged if member.trajectory.turn_rewards]
    metrics |= spread_of("environment/reward", [entry.environment_reward for entry in given])
    if any("acc" in member.info for member in judged):
        metrics |= spread_of("critic/acc", [member.accuracy for member in judged])
    return metrics | reward_metrics(judged)


def reward_metrics(judged: Sequence[Scored]) -> dict[str, float]:
    """rewards/NAME/{mean,std} of each of several rewards, over the samples it had a score for."""
    values: dict[str, list[float]] = {}
    for member in judged:
        for key, value in member.info.items():
            # A reward function may tell a text under such a name
            if key.startswith(REWARD_OF) and isinstance(value, (int, float)):
                values.setdefault(key, []).append(float(value))
    metrics = {}
    for name, given in values.items():
        metrics[f"{name}/mean"] = float(np.mean(given))
        metrics[f"{name}/std"] = float(np.std(given))
    return metrics


def advantage_metrics(advantages: PerToken, returns: PerToken, masks: PerToken) -> dict[str, float]:
    """critic/{advantages,returns} over sampled tokens."""
    return {
        **spread_of("critic/advantages", _sampled(advantages, masks)),
        **spread_of("critic/returns", _sampled(returns, masks)),
    }


def _sampled(values: PerToken, masks: PerToken) -> np.ndarray:
    """Those of sampled tokens, one after the other."""
    chosen = [array[mask] for array, mask in zip(values, masks, strict=True)]
    return np.concatenate(chosen) if chosen else np.zeros(0)


def length_metrics(
    members: Sequence[Scored], max_response: int, max_prompt: int
) -> dict[str, float]:
    """response_length and prompt_length, with the share that reached the limit, and num_turns.

    A response's tool text counts. Where contexts were cut, agent/sequences tells into how many.
    """
    found = [member.trajectory for member in members]
    prompts = [trajectory.prompt_length for trajectory in found]
    metrics = {
        **spread_of("response_length", [trajectory.response_length for trajectory in found]),
        **spread_of("prompt_length", prompts),
        **spread_of("num_turns", [trajectory.num_turns for trajectory in found]),
    }
    if any(trajectory.cuts for trajectory in found):
        sequences = [1 + len(trajectory.cuts) for trajectory in found]
        metrics |= spread_of("agent/sequences", sequences)
    if found:
        cut = [_reached(trajectory, max_response) for trajectory in found]
        metrics["response_length/clip_ratio"] = float(np.mean(cut))
        metrics["prompt_length/clip_ratio"] = float(np.mean([n >= max_prompt for n in prompts]))
    return metrics


def _reached(trajectory: Trajectory, max_response: int) -> bool:
    longest = max(trajectory.response_lengths)
    return trajectory.stop is Stop.LENGTH or longest >= max_response


def tool_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """How often tools were called and failed, how long they took, and why trajectories ended.

    tool/{calls,errors,timeouts} are counts over the step, and so are
    tool/{failed_opens,failed_calls,failed_closes}, of tools that broke. tool/latency is seconds per
    call while it ran, tool/queue_s before it did.
    """
    found = [member.trajectory for member in members]
    calls = sum(trajectory.tool_calls for trajectory in found)
    running = sum(trajectory.tool_seconds for trajectory in found)
    waiting = sum(trajectory.tool_queue_seconds for trajectory in found)
    stops = Counter(trajectory.stop for trajectory in found)
    return {
        "tool/calls": calls,
        "tool/errors": sum(trajectory.tool_errors for trajectory in found),
        "tool/timeouts": sum(trajectory.tool_timeouts for trajectory in found),
        "tool/failed_opens": sum(trajectory.tool_failed_opens for trajectory in found),
        "tool/failed_calls": sum(trajectory.tool_failed_calls for trajectory in found),
        "tool/failed_closes": sum(trajectory.tool_failed_closes for trajectory in found),
        "tool/latency": running / max(calls, 1),
        "tool/queue_s": waiting / max(calls, 1),
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


def judge_metrics(members: Sequence[Scored]) -> dict[str, float]:
    """llm_judge/{calls,retries,garbage,cached,tokens,over_budget}: sums of what judging took, in
    lost samples too; nothing without such a judge.
    """
    sums = defaultdict[str, float](float)
    for member in members:
        for key, value in member.info.items():
            if key.startswith(COUNTED) and isinstance(value, (int, float)):
                sums[key] += value
    if not sums:
        return {}
    return {COUNTED + name: float(sums[COUNTED + name]) for name in JUDGE_COUNTS}


def timing_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """timing_s/*."""
    return {f"timing_s/{name}": value for name, value in seconds.items()}
