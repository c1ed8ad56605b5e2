"""The states that tools keep for an episode: made when they are first called, closed at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from retool.rl.agent.episode import Episode
from retool.rl.agent.tools.protocol import TRAJECTORY, StatefulTool, ToolResult
from retool.rl.agent.tools.state import State
from retool.rl.reward.foreign import own_copy
from retool.rl.types import Prompt


def row_of(prompt: Prompt, sample: int) -> dict[str, Any]:
    """What a tool is told of the question: its row, with every column.

    Where the row has no such column, `prompt` are the messages, `reward_model` has the
    `ground_truth`, `index` is the question's place in the stream of prompts and `sample` that of
    the answer among those to it: together they are a seed that a resumed run has again. `trajectory`
    is both in one, whatever columns the row has. It is a copy: the question's other answers have
    theirs.
    """
    given = {
        "data_source": prompt.data_source,
        "prompt": prompt.messages,
        "ability": prompt.ability,
        "reward_model": {"ground_truth": prompt.ground_truth},
        "index": prompt.index,
        "sample": sample,
        **prompt.row,
        "extra_info": dict(prompt.extra_info),
        TRAJECTORY: f"{prompt.index}/{sample}",
    }
    return own_copy(given)


async def call_with_state(
    episode: Episode, tool: StatefulTool, arguments: Mapping[str, Any], timeout: float
) -> ToolResult:
    """What a tool answers that keeps a state for the episode."""
    state = episode.states.get(tool.name)
    if state is None:
        state = State(tool, row_of(episode.prompt, episode.sample))
        episode.states[tool.name] = state
    loop = asyncio.get_running_loop()
    begin = loop.time()
    result = await state.call(arguments, timeout)
    if result.seconds > 0 or result.status == "not_opened":
        return result
    return replace(result, seconds=max(loop.time() - begin - result.queue_seconds, 0.0))


async def close_states(episode: Episode) -> None:
    """Have every tool close what it kept. The episode counts failures, and has the tools' scores.

    Cancelled, it waits no longer; they close all the same.
    """
    await close_each(episode.states.values())
    for name, state in episode.states.items():
        episode.tool_failed_closes += state.failed_closes
        if state.score is not None:
            episode.tool_scores[name] = state.score


async def close_each(states: Collection[State]) -> None:
    """Close these, side by side, as `close_states` does."""
    closings: set[asyncio.Task[None]] = set()
    for state in states:
        state.begin_close()
        closings |= state.closings
    if closings:
        await asyncio.wait(closings)
