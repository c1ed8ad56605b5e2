"""What all episodes of a run share: the limits, the tools, and how a conversation is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from retool.data.render.renderer import Renderer
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.reading.form import Format
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.work_thread import WorkThread


@dataclass(frozen=True)
class AgentOptions:
    """Limits of a trajectory.

    `max_response_length` counts the tokens of all turns and of the tools' text. `format` is how
    calls are written. `eos_ids` are tokens that end everything, besides those that the renderer
    knows to end a turn; `call_end_ids` are those that end a turn of calls (see `ends_of_calls`). `inline_ids` are those
    at which sampling stops to see whether a call is answered amid the turn: see `ends_of_inline`.
    """

    max_response_length: int
    max_assistant_turns: int | None = None
    max_user_turns: int | None = None
    format: Format = HERMES
    max_tool_response_length: int = 512
    truncate_side: str = "middle"
    max_parallel_calls: int = 1
    tool_timeout_seconds: float = 120.0
    eos_ids: tuple[int, ...] = ()
    call_end_ids: tuple[int, ...] = ()
    inline_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Agent:
    """What stands around the model, the same in every episode; `tools` by their names.

    `texts` is a thread for long texts to be tokenised on, so that the engine needn't wait for it.
    """

    tools: Mapping[str, AnyTool]
    renderer: Renderer
    options: AgentOptions
    texts: WorkThread | None = None

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """Tokens that end a turn, or everything."""
        options = self.options
        return (*self.renderer.end_of_turn_ids, *options.eos_ids, *options.call_end_ids)

    @property
    def stop_ids(self) -> Collection[int]:
        """Tokens for the sampler to stop at."""
        inline_ids = self.options.inline_ids
        # Hundreds: the sampler looks each of its tokens up in them
        return frozenset((*self.turn_ends, *inline_ids)) if inline_ids else self.turn_ends

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What a call is checked against."""
        return [tool.schema for tool in self.tools.values()]


def ends_of_calls(renderer: Renderer, form: Format) -> tuple[int, ...]:
    """Tokens that end a turn of calls, besides the one that ends any: the template's after a call
    (gpt-oss' <|call|>), and those of the format that the tokenizer has.
    """
    tokenizer = renderer.tokenizer
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    wanted = dict.fromkeys([*form.ends, *filter(None, [renderer.ends.after_call])])
    return tuple(added[token] for token in wanted if token in added)


def ends_of_inline(renderer: Renderer, form: Format) -> tuple[int, ...]:
    """Tokens in which the text may end after which calls are answered amid a turn: they begin with
    an end of it, or hold it whole. Nothing where the format has no such text.
    """
    if form.inline is None:
        return ()
    stop = form.inline.stop
    ends = tuple(stop[start:] for start in range(len(stop)))
    byte = f"<0x{ord(stop[-1]):02X}>"  # of a vocabulary that falls back on bytes
    vocabulary = renderer.tokenizer.get_vocab()
    found = [
        number
        for token, number in vocabulary.items()
        if token.startswith(ends) or stop in token or token == byte
    ]
    return tuple(sorted(found))
