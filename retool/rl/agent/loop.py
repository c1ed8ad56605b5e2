"""The agent loop: render → generate → read calls → run tools → append → …, token ids in and token
ids out.

Sampled ids are never changed and nothing is tokenised again. A turn is decoded only to find its
tool calls. What follows it (the tools' text, the next generation prompt) is what the renderer would
show there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from retool.data.render.renderer import Renderer
from retool.data.tokens.fast_tokenizer import MIN_CHARACTERS_FOR_POOL, decode_ids
from retool.rl.agent.calls import run_calls
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.formats.table import FormatFailure
from retool.rl.agent.options import Agent
from retool.rl.agent.reading.call import Call, with_ids
from retool.rl.agent.reading.form import MAX_CALLS_READ, read_calls
from retool.rl.agent.states import close_states
from retool.rl.agent.truncation import SAFE_CHARACTERS_PER_TOKEN, cut_text
from retool.rl.types import Prompt, Stop, Trajectory


class Generate(Protocol):
    """Go on with a sequence.

    `ids` are those that are new since the last call: the prompt at first, then the tools' turn.
    """

    async def __call__(self, ids: Sequence[int], max_tokens: int, /) -> Sampled: ...


async def run_episode(
    prompt: Prompt, sample: int, generate: Generate, agent: Agent, version: int = 0
) -> Trajectory:
    """One answer to `prompt`. `version` is the policy's."""
    episode = Episode.begin(prompt, sample)
    stop, tool_failure = await play(episode, generate, agent)
    return episode.finish(stop, version, tool_failure)


async def play(episode: Episode, generate: Generate, agent: Agent) -> tuple[Stop, str]:
    """All turns of an episode: why it ended, and what a tool that broke said. Without tools it is
    a single turn. Whatever its tools keep for it is closed then, if it is cancelled, too.

    Tools may fail in any way; only `generate` may raise.
    """
    try:
        return await play_turns(episode, generate, agent)
    finally:
        if episode.states:
            await close_states(episode)


async def play_turns(episode: Episode, generate: Generate, agent: Agent) -> tuple[Stop, str]:
    """`play`, after which what its tools keep is still open."""
    limit = agent.options.max_response_length
    new_ids: Sequence[int] = episode.prompt.ids.tolist()
    while True:
        turn = await generate(new_ids, limit - len(episode.tokens))
        try:
            stop, calls = take_turn(episode, turn, agent)
        except FormatFailure as error:
            return Stop.INFRASTRUCTURE, str(error)
        if stop is not None:
            return stop, ""
        answers = await run_calls(episode, calls, agent)
        if answers.failure is not None:
            return Stop.INFRASTRUCTURE, answers.failure
        if answers.done:  # nobody reads what they say
            episode.messages += answers.messages
            return Stop.DONE, ""
        new_ids = await tool_turn(episode, answers.messages, agent)
        if len(episode.tokens) + len(new_ids) >= limit:  # no room for an answer to it
            return Stop.LENGTH, ""
        episode.add_tool_turn(answers.messages, new_ids)


def take_turn(episode: Episode, turn: Sampled, agent: Agent) -> tuple[Stop | None, list[Call]]:
    """Record a turn; (why the trajectory ends with it, or None, and the calls to run)."""
    ended = bool(turn.tokens) and turn.tokens[-1] in agent.stop_ids
    text = turn_text(agent.renderer, turn.tokens[:-1] if ended else turn.tokens)
    episode.add_turn(turn, text)
    if turn.reason == "aborted":
        return Stop.ABORTED, []
    if turn.reason == "length" or not ended:
        return Stop.LENGTH, []
    ends_turn = (agent.renderer.end_of_turn_ids[0], *agent.options.call_end_ids)
    if turn.tokens[-1] not in ends_turn:  # the end of everything
        return Stop.EOS, []
    calls = calls_in(text, agent)
    if not calls:
        return Stop.NO_CALL, []
    if turns_used_up(episode, agent):
        return Stop.MAX_TURNS, []
    return None, calls


def calls_in(text: str, agent: Agent) -> list[Call]:
    """The calls that a turn makes; none where there are no tools."""
    if not agent.tools:
        return []
    most = max(MAX_CALLS_READ, agent.options.max_parallel_calls)
    calls = read_calls(agent.options.format, text, agent.schemas, agent.renderer.reasoning, most)
    return with_ids(calls, text)


def turns_used_up(episode: Episode, agent: Agent) -> bool:
    most_assistant = agent.options.max_assistant_turns
    most_user = agent.options.max_user_turns
    if most_assistant is not None and episode.assistant_turns >= most_assistant:
        return True
    return most_user is not None and episode.user_turns >= most_user


async def tool_turn(episode: Episode, responses: list[dict[str, Any]], agent: Agent) -> list[int]:
    """What `render_tool_turn` gives: of long answers by a thread that is there for them."""
    characters = sum(len(response["content"]) for response in responses)
    if agent.texts is None or characters < MIN_CHARACTERS_FOR_POOL:
        return render_tool_turn(episode, responses, agent)
    return await agent.texts.run(lambda: render_tool_turn(episode, responses, agent))


def render_tool_turn(episode: Episode, responses: list[dict[str, Any]], agent: Agent) -> list[int]:
    """Token ids of the tools' answers, each cut to its limit in `responses`, and of what the
    template puts around them.
    """
    limit = agent.options.max_tool_response_length
    renderer = agent.renderer
    schemas = episode.prompt.tools
    # Short answers, which is most of them, are tokenised once: where all of them and what stands
    # around them are no more tokens than a single one may have, none has to be cut.
    characters = sum(len(response["content"]) for response in responses)
    if characters <= SAFE_CHARACTERS_PER_TOKEN * limit:
        ids = renderer.render_tool_turn(episode.messages, responses, schemas)
        if len(ids) <= limit:
            return ids
    for response in responses:
        response["content"] = cut_text(
            renderer.encoder, response["content"], limit, agent.options.truncate_side
        )
    return renderer.render_tool_turn(episode.messages, responses, schemas)


def turn_text(renderer: Renderer, ids: Sequence[int]) -> str:
    """The text of sampled ids, exactly: special tokens are kept, nothing is cleaned up."""
    return decode_ids(renderer.tokenizer, ids)
