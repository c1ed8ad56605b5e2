"""The reward, asked before the run: a real question and a made answer, in a process as the run's judges have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from retool.config import Fault
from retool.rl.config import RewardConfig
from retool.rl.reward_pool import LOAD, Asked, Judged, RewardPool
from retool.rl.rewards import RewardSource
from retool.rl.types import Prompt, Stop

MOST_SOURCES = 16  # data sources whose first question is tried


def try_reward(source: RewardSource, settings: RewardConfig, prompts: Sequence[Prompt]) -> Iterator[Fault]:
    """A fault where the reward can't be had in a worker, fails on a made answer to the first question of a data source, or is too slow."""
    where = "custom_reward_function" if source.path else "reward_model.name"
    if settings.trial_answer is None:
        return
    with RewardPool(source, 1, settings.timeout_seconds, settings.memory_mb, settings.floor) as pool:
        if problem := pool.problem():
            yield Fault(where, problem)
            return
        for prompt in first_of_each_source(prompts)[:MOST_SOURCES]:
            begin = time.perf_counter()
            judged = asyncio.run(pool.score(made_answer(prompt, settings.trial_answer), LOAD))
            seconds = time.perf_counter() - begin
            if judged.failure is not None:
                yield _failed(where, judged, prompt)
                return
            if seconds > settings.timeout_seconds:
                way_out = f"Raise it to {2 * seconds:.0f}, or have the file load what it needs when it is imported."
                problem = f"the reward took {seconds:.1f} s for a made answer to {named(prompt)}: all answers would get the floor."
                yield Fault(f"reward_model.timeout_seconds={settings.timeout_seconds:g}", problem, way_out)
                return


def first_of_each_source(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first question of each data source, in order."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.data_source, prompt)
    return list(found.values())


def made_answer(prompt: Prompt, answer: str) -> Asked:
    """`answer` ("auto": the truth in a box) as if the model had given it at once."""
    text = f"The answer is \\boxed{{{prompt.ground_truth}}}." if answer == "auto" else answer
    extra = {**prompt.extra_info, "num_turns": 2, "tool_calls": 0, "stop_reason": Stop.NO_CALL.value}
    return Asked(prompt.data_source, text, prompt.ground_truth, extra)


def named(prompt: Prompt) -> str:
    return f"the first question of {prompt.data_source} ({prompt.extra_info.get('row', 'row unknown')})"


def _failed(where: str, judged: Judged, prompt: Prompt) -> Fault:
    said = f"\n{judged.trace}\n" if judged.trace else f" {judged.reason}."
    way_out = (
        "Mend the function. If only real answers suit it: give one as reward_model.trial_answer='…', or try none "
        "(reward_model.trial_answer=null)."
    )
    return Fault(where, f"it fails on a made answer to {named(prompt)}:{said}", way_out)
