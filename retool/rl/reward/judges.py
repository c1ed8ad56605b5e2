"""Who judges: processes that can be killed or, when asked, an async function in the run's own."""

from __future__ import annotations

import os

from retool.rl.config.reward import RewardConfig
from retool.rl.reward.async_judge import AsyncJudge
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.protocol import Judges
from retool.rl.reward.source import RewardSource


def open_judges(source: RewardSource, settings: RewardConfig, workers: int | None = None) -> Judges:
    """As configured; `workers` processes, where it is processes and not as many as configured.

    ValueError where that can't be.
    """
    if settings.concurrent:
        return AsyncJudge(source, settings.max_concurrent, settings.timeout_seconds, settings.floor)
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
