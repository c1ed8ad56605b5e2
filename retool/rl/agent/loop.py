"""The agent loop: render → generate → parse → run tools → append → …, token ids in and token ids
out.

Sampled ids are never changed and nothing is re-tokenised: a turn is decoded only to find its tool
calls, and the glue that follows (tool text, the next generation prompt) is what the renderer would
show there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import httpx
import numpy as np

from retool.data.read.backend import decode_ids
from retool.data.render.encoder import Encoder
from retool.data.render.renderer import Renderer
from retool.rl.agent.formats import MOST_CALLS, Call, check, read_calls
from retool.rl.agent.tools import Tool, ToolResult
from retool.rl.reward.rewards import LONGEST
from retool.rl.types import Prompt, Stop, Trajectory

MARKER = "…[cut]…"
# Characters per allowed token:
LIKELY = 2  # a text of so many fits in all likelihood
FLOOD = 256  # one of more surely doesn't
START = 6  # so many at the beginning of a long text are tokenised to see that it doesn't
ENDS = 12  # so many of one that doesn't are looked at


@dataclass(frozen=True)
class Sampled:
    """A turn as the engine made it: ids, log-probabilities (see `Trajectory`), and why it ended: an
    end token, the token limit, or because the engine or the run gave it up.
    """

    tokens: Sequence[int]
    logp: Sequence[float]
    logp_behaviour: Sequence[float]
    reason: Literal["stop", "length", "aborted"]


class Generate(Protocol):
    """Go on with a sequence.

    `ids` are those that are new since the last call: the prompt at first, then the glue.
    """

    async def __call__(self, ids: Sequence[int], max_tokens: int, /) -> Sampled: ...


@dataclass(frozen=True)
class AgentOptions:
    """Limits of a trajectory. `max_response_length` counts all turns and tool text; `max_context`
    the prompt too. `eos_ids` are tokens that end everything, besides those that the renderer knows
    to end a turn.
    """

    max_response_length: int
    max_context: int | None = None
    max_assistant_turns: int | None = None
    max_user_turns: int | None = None
    format: str = "hermes"
    max_tool_response_length: int = 512
    truncate_side: str = "middle"
    max_parallel_calls: int = 1
    tool_timeout_seconds: float = 120.0
    eos_ids: tuple[int, ...] = ()


@dataclass
class _Episode:
    """A trajectory on its way; tokens and what belongs to them are those after the prompt."""

    messages: list[dict[str, Any]]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_behaviour: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    assistant_turns: int = 0
    user_turns: int = 0
    calls: int = 0
    errors: int = 0
    timeouts: int = 0
    seconds: float = 0.0
    queue_seconds: float = 0.0

    def add_sampled(self, turn: Sampled) -> None:
        self.tokens += turn.tokens
        self.mask += [True] * len(turn.tokens)
        self.logp += turn.logp
        self.logp_behaviour += turn.logp_behaviour

    def add_glue(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.mask += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.logp_behaviour += [0.0] * len(ids)


async def run_episode(
    prompt: Prompt,
    sample: int,
    generate: Generate,
    tools: Mapping[str, Tool],
    renderer: Renderer,
    options: AgentOptions,
    version: int = 0,
) -> Trajectory:
    """One answer to `prompt`. Without tools it is a single turn.

    Tools may fail in any way; only `generate` may raise.
    """
    episode = _Episode([dict(m) for m in prompt.messages])
    limit = options.max_response_length
    if options.max_context is not None:
        limit = min(limit, options.max_context - len(prompt.ids))
    fresh: Sequence[int] = prompt.ids.tolist()
    while True:
        room = limit - len(episode.tokens)
        if room <= 0:
            return _finish(episode, prompt, sample, Stop.LENGTH, version)
        turn = await generate(fresh, room)
        episode.add_sampled(turn)
        stop, calls = _after_turn(episode, turn, tools, renderer, options)
        if stop is not None:
            return _finish(episode, prompt, sample, stop, version)
        responses, broken = await _run_calls(episode, calls, tools, renderer, options)
        if broken is not None:
            return _finish(episode, prompt, sample, Stop.INFRASTRUCTURE, version, broken)
        fresh = _tool_turn(episode, prompt, responses, renderer, options)
        if len(episode.tokens) + len(fresh) >= limit:  # no room for an answer to it
            return _finish(episode, prompt, sample, Stop.LENGTH, version)
        episode.messages += responses
        episode.user_turns += 1
        episode.add_glue(fresh)


def _tool_turn(
    episode: _Episode,
    prompt: Prompt,
    responses: list[dict[str, Any]],
    renderer: Renderer,
    options: AgentOptions,
) -> list[int]:
    """Token ids of the tools' answers, each cut to its limit in `responses`, and of what the
    template puts around them.
    """
    limit = options.max_tool_response_length
    if sum(len(response["content"]) for response in responses) <= LIKELY * limit:
        ids = renderer.render_tool_turn(episode.messages, responses, prompt.tools)
        # All of them and what is around them are no more than one may have: tokenised once
        if len(ids) <= limit:
            return ids
    for response in responses:
        response["content"] = cut_text(
            renderer.encoder, response["content"], limit, options.truncate_side
        )
    return renderer.render_tool_turn(episode.messages, responses, prompt.tools)


def _after_turn(
    episode: _Episode,
    turn: Sampled,
    tools: Mapping[str, Tool],
    renderer: Renderer,
    options: AgentOptions,
) -> tuple[Stop | None, list[Call]]:
    """Record a turn; (why the trajectory ends here or None, the calls to run)."""
    ends = (*renderer.end_of_turn_ids, *options.eos_ids)
    ended = bool(turn.tokens) and turn.tokens[-1] in ends
    text = turn_text(renderer, turn.tokens[:-1] if ended else turn.tokens)
    episode.texts.append(text)
    episode.messages.append({"role": "assistant", "content": text})
    episode.assistant_turns += 1
    if turn.reason == "aborted":
        return Stop.ABORTED, []
    if turn.reason == "length" or not ended:
        return Stop.LENGTH, []
    if turn.tokens[-1] != ends[0]:
        return Stop.EOS, []
    schemas = [tool.schema for tool in tools.values()]
    most = max(MOST_CALLS, options.max_parallel_calls)
    calls = read_calls(options.format, text, schemas, renderer.reasoning, most) if tools else []
    if not calls:
        return Stop.NO_CALL, []
    for count, most in (
        (episode.assistant_turns, options.max_assistant_turns),
        (episode.user_turns, options.max_user_turns),
    ):
        if most is not None and count >= most:
            return Stop.MAX_TURNS, []
    return None, calls


def turn_text(renderer: Renderer, ids: Sequence[int]) -> str:
    """The text of sampled ids, exactly: special tokens are kept, nothing is cleaned up."""
    return decode_ids(renderer.tokenizer, ids)


async def _run_calls(
    episode: _Episode,
    calls: Sequence[Call],
    tools: Mapping[str, Tool],
    renderer: Renderer,
    options: AgentOptions,
) -> tuple[list[dict[str, Any]], str | None]:
    """The tools' answers as messages, one per call and in order; what a tool that broke said, if
    one did. Counts what happened.
    """
    most = options.max_parallel_calls
    schemas = [tool.schema for tool in tools.values()]
    running = [
        _run_call(call, check(call, schemas), tools, options.tool_timeout_seconds)
        for call in calls[:most]
    ]
    results = [await running[0]] if len(running) == 1 else list(await asyncio.gather(*running))
    over = f"not run: at most {most} call{'s are' if most > 1 else ' is'} run in a turn. Call it again."
    results += [
        ToolResult(f"Error: {call.problem}" if call.problem else over, "not_run")
        for call in calls[most:]
    ]
    responses = []
    for call, result in zip(calls, results, strict=True):
        episode.calls += result.status != "not_run"
        episode.errors += result.status not in ("success", "not_run", "timeout")
        episode.timeouts += result.status == "timeout"
        episode.seconds += result.seconds
        episode.queue_seconds += result.queue_seconds
        name = {"name": call.name} if call.name in tools else {}
        responses.append({"role": "tool", "content": clean(result.text), **name})
    said = (
        f"{call.name}: {clean(result.text)}"[:LONGEST]
        for call, result in zip(calls, results, strict=True)
        if result.lost
    )
    return responses, next(said, None)


async def _run_call(
    call: Call, problem: str | None, tools: Mapping[str, Tool], timeout: float
) -> ToolResult:
    """What the tool answers, or why there is no answer: a tool may hang, even when it is cancelled
    (then it is left to itself). The clock runs from the call, unless the tool keeps time itself: it
    knows when its own queue lets the call go.
    """
    if problem is not None:
        return ToolResult(f"Error: {problem}", "bad_arguments")
    loop = asyncio.get_running_loop()
    begin = loop.time()
    answered = loop.create_future()
    work = loop.create_task(_answer(tools[call.name], call.arguments, answered))
    timed = not getattr(tools[call.name], "keeps_time", False)
    timer = loop.call_later(timeout, _settle, answered, None) if timed else None
    try:
        result = await answered
    finally:
        if timer is not None:
            timer.cancel()
        work.cancel()
    if result is None:
        return ToolResult(
            f"TimeoutError: {call.name} gave no answer within {timeout:g} s.", "timeout", timeout
        )
    return (
        result
        if result.seconds > 0
        else replace(result, seconds=max(loop.time() - begin - result.queue_seconds, 0.0))
    )


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
    except (
        ConnectionError,
        httpx.TransportError,
    ) as error:  # nobody there to be called: not the model's doing
        result = ToolResult(f"{type(error).__name__}: {error}", "infrastructure")
    except BaseException as error:
        result = ToolResult(f"{type(error).__name__}: {error}", "error")
    _settle(answered, result)


def _settle(answered: asyncio.Future[ToolResult | None], result: ToolResult | None) -> None:
    if not answered.done():
        answered.set_result(result)


def clean(text: str) -> str:
    """`text` as valid Unicode: halves of surrogate pairs (bytes that weren't UTF-8) become
    replacement characters.
    """
    return (
        text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    )


def cut_text(encoder: Encoder, text: str, limit: int, side: str) -> str:
    """`text` in at most `limit` tokens, marker included (where it fits): what fits is kept as it
    is, else `left` loses its beginning, `right` its end, `middle` what lies between. It is cut
    between tokens, so no character is halved. The name of a control token in it counts as the text
    that it is.
    """
    text = _without_middle(encoder, text, limit, side)
    spans = _spans(encoder, text)
    if len(spans) <= limit:
        return text
    marker_tokens = len(encoder.data_ids(MARKER))
    marker = MARKER if marker_tokens <= limit else ""
    room = limit - marker_tokens if marker else limit
    while True:
        head = {"left": 0, "right": room, "middle": (room + 1) // 2}[side]
        tail = room - head
        start = text[: spans[head - 1][1]] if head else ""
        end = text[spans[len(spans) - tail][0] :] if tail else ""
        shorter = start + marker + end
        # The cut text can tokenise otherwise than its parts
        over = len(encoder.data_ids(shorter)) - limit
        if over <= 0 or room == 0:
            return shorter
        room = max(room - over, 0)


def _without_middle(encoder: Encoder, text: str, limit: int, side: str) -> str:
    """What may be kept of a long text, and more, where its beginning alone has more than `limit`
    tokens: all of it would take long.
    """
    if len(text) <= ENDS * limit:
        return text
    # The last token of the beginning may be one that its neighbours would have made longer.
    if len(text) <= FLOOD * limit and len(encoder.data_ids(text[: START * limit])) <= limit + 1:
        return text
    head = {"left": 0, "right": ENDS * limit, "middle": ENDS * limit // 2}[side]
    tail = ENDS * limit - head
    return text[:head] + MARKER + (text[-tail:] if tail else "")


def _spans(encoder: Encoder, text: str) -> list[tuple[int, int]]:
    """(start, end) characters of each token."""
    if encoder.tokenizer.is_fast:
        return encoder.data_offsets(text)
    count = len(encoder.data_ids(text))
    # A slow tokenizer can't tell: evenly
    edges = [round(i * len(text) / max(count, 1)) for i in range(count + 1)]
    return list(pairwise(edges))


def _finish(
    episode: _Episode, prompt: Prompt, sample: int, stop: Stop, version: int, failure: str = ""
) -> Trajectory:
    n = len(prompt.ids)

    def whole(values: Sequence[float], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(n, dtype), np.asarray(values, dtype)])

    return Trajectory(
        prompt,
        sample,
        np.concatenate([prompt.ids.astype(np.int32), np.asarray(episode.tokens, np.int32)]),
        n,
        whole(episode.mask, bool),
        whole(episode.logp, np.float32),
        whole(episode.logp_behaviour, np.float32),
        stop,
        num_turns=episode.user_turns + episode.assistant_turns + 1,
        tool_calls=episode.calls,
        tool_errors=episode.errors,
        tool_timeouts=episode.timeouts,
        tool_seconds=episode.seconds,
        policy_version=version,
        assistant_text="\n".join(episode.texts),
        tool_failure=failure,
        tool_queue_seconds=episode.queue_seconds,
    )
