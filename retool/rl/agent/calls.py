"""The calls of a turn → the tools' answers: checked, run side by side, each with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retool.rl.agent.episode import Episode
from retool.rl.agent.options import Agent
from retool.rl.agent.reading.call import Call, check
from retool.rl.agent.states import call_with_state
from retool.rl.agent.tools.of_row import kwargs_of
from retool.rl.agent.tools.protocol import Tool, ToolResult, keeps_state
from retool.rl.agent.tools.state import what_raised
from retool.rl.reward.foreign import own_copy
from retool.rl.types import ToolUse

MAX_FAILURE_CHARACTERS = 10_000  # of what a tool that broke said; the rest is cut


@dataclass(frozen=True)
class Answers:
    """What the calls of a turn came to: messages, one per call and in order; what a tool that broke
    said, if one did; whether a tool said that the trajectory is over; and the `results` themselves.
    """

    messages: list[dict[str, Any]]
    failure: str | None
    done: bool
    results: list[ToolResult]


async def run_calls(
    episode: Episode, calls: Sequence[Call], agent: Agent, turn: int | None = None
) -> Answers:
    """The tools' answers to the calls of a turn, of that number or the last one. The episode counts
    what happened, and has the turn's rewards.
    """
    turn = episode.assistant_turns - 1 if turn is None else turn
    results = await _results(episode, calls, agent)
    responses = []
    failure = None
    done = False
    for call, result in zip(calls, results, strict=True):
        _count(episode, result)
        text = clean(result.text)
        episode.tool_uses.append(ToolUse(turn, call.name, call.arguments, result.status, text))
        response = {"role": "tool", "content": text}
        if call.name in agent.tools:
            response["name"] = call.name
        if call.id:
            response["tool_call_id"] = call.id
        responses.append(response)
        if result.lost and failure is None:
            failure = f"{call.name}: {text}"[:MAX_FAILURE_CHARACTERS]
        if result.reward is not None:
            episode.reward_turn(float(result.reward), turn)
        done = done or result.done
    return Answers(responses, failure, done, results)


async def _results(episode: Episode, calls: Sequence[Call], agent: Agent) -> list[ToolResult]:
    """A result for every call: of those beyond the limit, that they weren't run."""
    most = agent.options.max_parallel_calls
    running = [_run_call(episode, call, agent) for call in calls[:most]]
    # A lone call, which is most of them, needs no task of its own
    results = [await running[0]] if len(running) == 1 else list(await asyncio.gather(*running))
    limit = "1 call is" if most <= 1 else f"{most} calls are"
    over = f"not run: at most {limit} run in a turn. Call it again."
    for call in calls[most:]:
        text = f"Error: {call.problem}" if call.problem else over
        results.append(ToolResult(text, "not_run"))
    return results


def _count(episode: Episode, result: ToolResult) -> None:
    ran = result.status not in ("not_run", "not_opened")
    episode.tool_calls += ran
    episode.tool_errors += ran and result.status not in ("success", "timeout")
    episode.tool_timeouts += result.status == "timeout"
    episode.tool_failed_opens += result.status == "not_opened"
    episode.tool_failed_calls += ran and (result.lost or result.status == "raised")
    episode.tool_seconds += result.seconds
    episode.tool_queue_seconds += result.queue_seconds


async def _run_call(episode: Episode, call: Call, agent: Agent) -> ToolResult:
    """What the tool answers, or why there is no answer."""
    problem = check(call, agent.schemas)
    if problem is not None:
        return ToolResult(f"Error: {problem}", "bad_arguments")
    tool = agent.tools[call.name]
    timeout = agent.options.tool_timeout_seconds
    # A tool may change what it is given: rewards see what the model wrote
    arguments = own_copy(dict(call.arguments))
    if keeps_state(tool):
        return await call_with_state(episode, tool, arguments, timeout)
    extra_info = episode.prompt.extra_info
    if "tools_kwargs" in extra_info:
        arguments |= own_copy(kwargs_of(extra_info, tool.name, "execute_kwargs"))
    return await _answer_in_time(tool, arguments, timeout)


async def _answer_in_time(tool: Tool, arguments: Mapping[str, Any], timeout: float) -> ToolResult:
    """A tool's answer within its time. A tool may hang, even when it is cancelled: then it is left
    to itself. The clock runs from the call, unless the tool keeps time itself: it knows when its
    own queue lets the call go.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    answered = loop.create_future()
    # A task beside the future: `wait_for` would wait for a cancelled tool to end, and it may never.
    work = loop.create_task(_answer(tool, arguments, answered))
    timer = None
    if not getattr(tool, "keeps_time", False):
        timer = loop.call_later(timeout, _settle, answered, None)
    try:
        result = await answered
    finally:
        if timer is not None:
            timer.cancel()
        work.cancel()
    if result is None:
        text = f"TimeoutError: {tool.name} gave no answer within {timeout:g} s."
        return ToolResult(text, "timeout", timeout)
    if result.seconds > 0:
        return result
    return replace(result, seconds=max(loop.time() - begin - result.queue_seconds, 0.0))


async def _answer(
    tool: Tool, arguments: Mapping[str, Any], answered: asyncio.Future[ToolResult | None]
) -> None:
    """Settle `answered` with what a tool of anybody's answers, or raises: a library in it may even
    exit, or cancel.
    """
    try:
        result = await tool.call(arguments)
        if not isinstance(result, ToolResult):
            raise TypeError(
                f"{tool.name} answered with a {type(result).__name__}, not a ToolResult"
            )
    except KeyboardInterrupt:
        raise
    # Not Exception alone: SystemExit in a tool would end the training process.
    except BaseException as error:
        result = what_raised(error)
    _settle(answered, result)


def _settle(answered: asyncio.Future[ToolResult | None], result: ToolResult | None) -> None:
    if not answered.done():
        answered.set_result(result)


def clean(text: str) -> str:
    """`text` as valid Unicode: halves of surrogate pairs (bytes that weren't UTF-8) become
    replacement characters.
    """
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
