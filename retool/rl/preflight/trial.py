"""A trial of the reward before the run: a real question and a made answer, in a process like the
run's own judges.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from retool.config import Fault
from retool.rl.config.reward import RewardConfig
from retool.rl.objective.filter import metrics_of
from retool.rl.reward.calling import Asked
from retool.rl.reward.judges import open_judges
from retool.rl.reward.pool import LOAD_SECONDS
from retool.rl.reward.protocol import Judged, Judges
from retool.rl.reward.source import RewardSource
from retool.rl.types import Prompt, Scored, Stop, Trajectory

# How libraries tell that they have no network, or lack a variable of the environment
NO_NETWORK = re.compile(
    r"not permitted|Errno 1\b|Connect(ion)?Error|getaddrinfo|resol", re.IGNORECASE
)
NO_VARIABLE = re.compile(r"(?i:environ|api.?key|credential|token)|KeyError: '[A-Z][A-Z0-9_]+'")
MAX_SOURCES_TRIED = 16  # data sources whose first question is tried


def try_reward(
    source: RewardSource,
    settings: RewardConfig,
    prompts: Sequence[Prompt],
    metric: str | None = None,
) -> Iterator[Fault]:
    """A fault where the reward can't be had in a worker, or no worker can be had; where it fails on
    a made answer to the first question of a data source; where it is too slow; and where it doesn't
    tell the `metric` that groups are filtered by.

    A reward model isn't tried: its weights are read once, by the run.
    """
    where = source.key
    if settings.trial_answer is None or source.is_model:
        return
    if source.asks_a_model:
        parts = tuple(part for part in source.parts if not part.is_model)
        if not parts:
            return
        # The parts that are functions are tried all the same.
        source = replace(source, parts=parts)
        metric = None  # it may be the model's
    try:
        judges = open_judges(source, settings, workers=1)
    except (ValueError, OSError) as error:
        yield Fault(where, str(error))
        return
    if source.asks_a_judge:  # it has the run's network, and its own time limits
        settings = replace(settings, concurrent=True, timeout_seconds=math.inf)
    try:
        yield from _asked(judges, where, settings, prompts, metric)
    finally:
        judges.close()


def _asked(
    judges: Judges,
    where: str,
    settings: RewardConfig,
    prompts: Sequence[Prompt],
    metric: str | None,
) -> Iterator[Fault]:
    if problem := judges.problem():
        yield Fault(where, problem)
        return
    answer = settings.trial_answer or "auto"
    chosen = first_of_each_source(prompts)[:MAX_SOURCES_TRIED]
    asked = [Asked.about(made_answer(prompt, answer), judges.seen) for prompt in chosen]
    # Fewer verdicts than questions where one failed: the rest weren't asked.
    verdicts = asyncio.run(_verdicts(judges, asked))
    for prompt, (judged, seconds) in zip(chosen, verdicts, strict=False):
        if judged.failure is not None:
            yield failed_trial(where, judged, prompt, settings)
        elif seconds > settings.timeout_seconds:
            yield _too_slow(seconds, prompt, settings)
        elif metric is not None:
            yield from _not_told(metric, judged, made_answer(prompt, answer))


def _not_told(metric: str, judged: Judged, answer: Trajectory) -> Iterator[Fault]:
    there = metrics_of(Scored(answer, judged.score, judged.score, judged.info))
    if metric not in there:
        yield Fault(
            f"algorithm.filter_groups.metric={metric}",
            f"the reward gives no such number for a made answer to {named(answer.prompt)}.",
            f"It gives {', '.join(there)}: name one of these, or have it return {metric} always.",
        )


async def _verdicts(judges: Judges, asked: Sequence[Asked]) -> list[tuple[Judged, float]]:
    """(verdict, seconds) of one question after the other, up to the first that fails.

    In one event loop, since a function may keep connections.
    """
    verdicts: list[tuple[Judged, float]] = []
    for answer in asked:
        begin = time.perf_counter()
        # With a long limit: a function that is only too slow is told with the seconds that it took.
        judged = await judges.score(answer, LOAD_SECONDS)
        verdicts.append((judged, time.perf_counter() - begin))
        if judged.failure is not None:
            break
    return verdicts


def first_of_each_source(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first question of each data source, in order."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.data_source, prompt)
    return list(found.values())


def made_answer(prompt: Prompt, answer: str) -> Trajectory:
    """`answer` ("auto": the truth in a box) as if the model had given it at once, without tokens."""
    text = f"The answer is \\boxed{{{prompt.truth_text}}}." if answer == "auto" else answer
    length = len(prompt.ids)
    nothing = np.zeros(length, np.float32)
    return Trajectory(
        prompt,
        sample=0,
        tokens=prompt.ids,
        prompt_length=length,
        mask=np.zeros(length, bool),
        logp=nothing,
        logp_behaviour=nothing,
        stop=Stop.NO_CALL,
        num_turns=2,
        tool_calls=0,
        tool_errors=0,
        tool_timeouts=0,
        tool_seconds=0.0,
        policy_version=0,
        assistant_text=text,
        messages=[{"role": "assistant", "content": text}],
    )


def named(prompt: Prompt) -> str:
    return f"the first question of {prompt.data_source} ({prompt.extra_info.get('row', 'row unknown')})"


def _too_slow(seconds: float, prompt: Prompt, settings: RewardConfig) -> Fault:
    problem = (
        f"the reward took {seconds:.1f} s for a made answer to {named(prompt)}: all answers would "
        "get the floor."
    )
    way_out = (
        f"Raise it to {2 * seconds:.0f}, or have the file load what it needs when it is imported."
    )
    return Fault(f"reward_model.timeout_seconds={settings.timeout_seconds:g}", problem, way_out)


def failed_trial(where: str, judged: Judged, prompt: Prompt, settings: RewardConfig) -> Fault:
    """The fault, with what the function said and what it may have lacked."""
    told = judged.trace or judged.reason
    said = f"\n{judged.trace}\n" if judged.trace else f" {judged.reason}."
    way_out = "Mend the function."
    if not (settings.network or settings.concurrent) and NO_NETWORK.search(told):
        way_out += (
            " Its processes have no network. If it needs one, allow it: "
            "reward_model.network=true (an async function may instead run in the run's own process, "
            "many answers at once: reward_model.concurrent=true)."
        )
    if not settings.concurrent and NO_VARIABLE.search(told):
        way_out += " Name the environment variables that it needs: reward_model.environment=[NAME]."
    way_out += (
        " If it works on real answers only, give one (reward_model.trial_answer='…'), or skip the "
        "trial (reward_model.trial_answer=null)."
    )
    return Fault(where, f"it fails on a made answer to {named(prompt)}:{said}", way_out)
