"""Who judges: processes that can be killed; async functions in the run's own process, if asked for;
a language model behind an address; a reward model.

Several rewards may be judged in several places; their judges are then one.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import replace

from retool.rl.config.reward import RewardConfig
from retool.rl.reward.async_judge import AsyncJudge
from retool.rl.reward.llm_judge.judge import LLMJudge
from retool.rl.reward.model_judge import ModelJudge
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.protocol import Judges
from retool.rl.reward.several import SeveralJudges, WeightedJudges
from retool.rl.reward.source import RewardSource


def open_judges(
    source: RewardSource,
    settings: RewardConfig,
    workers: int | None = None,
    device: str = "cpu",
) -> Judges:
    """The judges that the configuration names, with `workers` processes if these are processes. A
    reward model is on `device`.

    ValueError where that can't be.
    """
    if not source.parts:
        return _open(source, settings, workers, device)
    members: list[Judges] = []
    try:
        for part in source.parts:
            if not part.is_function:
                judge = _open(part, settings, workers, device)
                members.append(WeightedJudges(judge, part.name, part.weight))
        for group, is_awaited in by_place(source, settings):
            placed = replace(settings, concurrent=is_awaited)
            members.append(_open(group, placed, workers, device))
    except (ValueError, OSError):
        for member in members:
            member.close()
        raise
    names = [part.name for part in source.parts]
    return SeveralJudges(members, names, settings.floor)


def shared_out(
    settings: RewardConfig,
    processes: int,
) -> RewardConfig:
    """The settings with each process's share of the judge's budget, of `processes` that judge;
    rounded up.
    """
    judge = settings.judge
    calls = judge.max_calls and -(-judge.max_calls // processes)
    tokens = judge.max_total_tokens and -(-judge.max_total_tokens // processes)
    shared = replace(judge, max_calls=calls, max_total_tokens=tokens)
    return replace(settings, judge=shared)


def by_place(
    source: RewardSource,
    settings: RewardConfig,
) -> list[tuple[RewardSource, bool]]:
    """The functions among several rewards by place, and whether it is the run's own process.

    There only async functions are awaited, where that is asked for. ValueError where it is asked
    for, and none of them is async.
    """
    awaited: list[RewardSource] = []
    pooled: list[RewardSource] = []
    for part in source.parts:
        if not part.is_function:
            continue
        is_async = inspect.iscoroutinefunction(part.load())
        place = awaited if settings.concurrent and is_async else pooled
        place.append(part)
    if settings.concurrent and pooled and not awaited:
        raise ValueError(
            "reward_model.concurrent=true needs an async function, and none of "
            f"{source.name} is one: leave the key out."
        )
    places = [(awaited, True), (pooled, False)]
    return [(replace(source, parts=tuple(parts)), here) for parts, here in places if parts]


def _open(
    source: RewardSource,
    settings: RewardConfig,
    workers: int | None,
    device: str,
) -> Judges:
    """Judges of one place."""
    if source.is_model:
        return ModelJudge(settings.model, settings.floor, device)
    if source.is_judge:
        return LLMJudge(settings.judge, settings.floor)
    if settings.concurrent:
        return AsyncJudge(
            source,
            settings.max_concurrent,
            settings.timeout_seconds,
            settings.floor,
        )
    return RewardPool(
        source,
        workers or settings.num_workers,
        timeout=settings.timeout_seconds,
        memory_mb=settings.memory_mb,
        floor=settings.floor,
        network=settings.network,
        environment=named_variables(settings),
    )


def named_variables(settings: RewardConfig) -> dict[str, str]:
    """The environment variables that reward workers get besides the harmless ones.

    ValueError where one isn't set.
    """
    missing = [name for name in settings.environment if name not in os.environ]
    if missing:
        raise ValueError(
            f"reward_model.environment names {', '.join(missing)}, which the run's environment "
            "lacks: set it, or don't name it."
        )
    return {name: os.environ[name] for name in settings.environment}
