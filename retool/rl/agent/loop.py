"""The agent loop: render → generate → read calls → run tools → append → …, token ids in and token
ids out.

Sampled ids are never changed and nothing is tokenised again. A turn is decoded only to find its
tool calls. What follows it (the tools' text, the next generation prompt) is what the renderer would
show there.

[Note: stop strings] ReTool's `</code>` is answered in the middle of a turn. The engine stops at
tokens, and such a text may end in many of them: `ends_of_inline`. Where it stopped at one and no
call ends there, it goes on as if it had not: what it draws is a function of the place. The token in
which a call ends is kept whole, with whatever it says behind the call (">" and two line ends, say):
it was sampled, so it is trained. What is put behind it are tokens of their own, in the same message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from retool.data.render.renderer import Renderer
from retool.data.tokens.encoder import Piece
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

TOKENS_OF_A_STOP = 16  # from the last one on: those that a stop string may be made of


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
    # The engine keeps the sequence: it is given what is new, never the whole conversation again.
    new_ids: Sequence[int] = episode.prompt.ids.tolist()
    while True:
        # The response's limit counts tools' tokens, too: a long output takes room from the model's
        # next turn.
        turn = await sample_turn(generate, new_ids, limit - len(episode.tokens), agent)
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


async def sample_turn(
    generate: Generate, ids: Sequence[int], max_tokens: int, agent: Agent
) -> Sampled:
    """The model's turn after `ids`, or what it says up to a call that is answered amid the turn."""
    turn = await generate(ids, max_tokens)
    while _stopped_for_nothing(turn, agent):
        left = max_tokens - len(turn.tokens)
        if left < 1:
            return replace(turn, reason="length")
        turn = turn.followed_by(await generate([], left))
    return turn


def _stopped_for_nothing(turn: Sampled, agent: Agent) -> bool:
    """Whether sampling stopped where a call might have ended, and none did."""
    inline = agent.options.format.inline
    if inline is None or turn.reason != "stop" or turn.tokens[-1] not in agent.options.inline_ids:
        return False
    tail = turn.tokens[-TOKENS_OF_A_STOP:]
    text = turn_text(agent.renderer, tail)
    # Counted with the last token and without: the stop string may stand there already from an
    # earlier call.
    ends_here = text.count(inline.stop) > turn_text(agent.renderer, tail[:-1]).count(inline.stop)
    return not (ends_here and calls_in(turn_text(agent.renderer, turn.tokens), agent))


def take_turn(episode: Episode, turn: Sampled, agent: Agent) -> tuple[Stop | None, list[Call]]:
    """Record a turn; (why the trajectory ends with it, or None, and the calls to run)."""
    options = agent.options
    # Two ways to stop at a token: one that ends a turn, or one that a call may end with, amid the
    # turn.
    ended = bool(turn.tokens) and turn.tokens[-1] in agent.turn_ends
    amid = bool(options.inline_ids) and not ended and turn.reason == "stop"
    text = turn_text(agent.renderer, turn.tokens[:-1] if ended else turn.tokens)
    episode.add_turn(turn, text)
    episode.inline = options.format.inline if amid else None
    if turn.reason == "aborted":
        return Stop.ABORTED, []
    if turn.reason == "length" or not (ended or amid):
        return Stop.LENGTH, []
    ends_turn = (agent.renderer.end_of_turn_ids[0], *options.call_end_ids)
    if ended and turn.tokens[-1] not in ends_turn:  # the end of everything
        return Stop.EOS, []
    # Where calls are answered amid a turn, what it ends with is no call
    calls = calls_in(text, agent) if amid or not options.inline_ids else []
    if not calls:
        return Stop.NO_CALL, []
    # After the calls are read, before they run: nobody would read what the tools say.
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


def turns_used_up(episode: Episode, agent: Agent, under_way: int = 0) -> bool:
    """Whether it may have no more turns than it has, and those that are `under_way`."""
    most_assistant = agent.options.max_assistant_turns
    most_user = agent.options.max_user_turns
    if most_assistant is not None and episode.assistant_turns + under_way >= most_assistant:
        return True
    return most_user is not None and episode.user_turns >= most_user


async def tool_turn(episode: Episode, responses: list[dict[str, Any]], agent: Agent) -> list[int]:
    """Token ids of what the tools answer, and of what is put around it: see `render_tool_turn`. A
    thread that is there for them makes those of long answers.
    """
    make = render_tool_turn if episode.inline is None else render_output
    characters = sum(len(response["content"]) for response in responses)
    if agent.texts is None or characters < MIN_CHARACTERS_FOR_POOL:
        return make(episode, responses, agent)
    return await agent.texts.run(lambda: make(episode, responses, agent))


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
    _cut(responses, agent)
    return renderer.render_tool_turn(episode.messages, responses, schemas)


def render_output(episode: Episode, responses: list[dict[str, Any]], agent: Agent) -> list[int]:
    """Likewise, of answers that stand in the middle of a turn."""
    _cut(responses, agent)
    text = episode.output(responses)
    encoder = agent.renderer.encoder
    piece = Piece(text, turn=0, quoted=encoder.controls.spans(text))
    return encoder.encode([piece], begins=False)[0]


def _cut(responses: list[dict[str, Any]], agent: Agent) -> None:
    options = agent.options
    encoder = agent.renderer.encoder
    for response in responses:
        response["content"] = cut_text(
            encoder,
            response["content"],
            options.max_tool_response_length,
            options.truncate_side,
        )


def turn_text(renderer: Renderer, ids: Sequence[int]) -> str:
    """The text of sampled ids, exactly: special tokens are kept, nothing is cleaned up."""
    return decode_ids(renderer.tokenizer, ids)
