"""The tokens between a sampled turn and the next one: the *glue*.

That is the end of the turn where it lacks one, messages, and a generation prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from retool.data.template.chat_template import valid_text
from retool.data.template.turns import PLACEHOLDER
from retool.data.tokens.control_tokens import Controls
from retool.data.tokens.encoder import Piece

HOLE = "AContentGoesHere"
MADE_ID = "abcdefgh0"  # of a call whose answer names none
Message = Mapping[str, Any]
Text = Callable[[Sequence[Message], Sequence[Message] | None, bool | None, bool], str]


@dataclass(frozen=True)
class Setting:
    """How a glue is rendered.

    `tools`, `enable_thinking` and `generation_prompt` are what the template is given.

    `ended`: the turn before it has its end-of-turn token, so the glue begins after that.
    """

    tools: Sequence[Message] | None = None
    enable_thinking: bool | None = None
    ended: bool = True
    generation_prompt: bool = True


@dataclass
class Glue:
    """Makes the glue after assistant turns that end with one of `ends`.

    `text` renders messages with (tools, enable_thinking, generation prompt). `framed`: the template
    shows contents of tool and user messages as they are, whatever came before, so a glue is made
    once for each sequence of roles and then filled in.
    """

    text: Text
    ends: Sequence[str]
    controls: Controls
    framed: bool
    frames: dict[Any, list[str]] = field(default_factory=dict)
    wants_calls: bool | None = None  # learnt from the template

    def piece(
        self, messages: Sequence[Message], responses: Sequence[Message], setting: Setting
    ) -> Piece:
        """The glue between the last of `messages`, an assistant's turn, and the next.

        `responses` stand in it.
        """
        # The fast way: no render at all, as the frame of such a sequence of roles is known.
        if self.framed and all(map(_is_plain, responses)):
            frame = self._frame(tuple(response["role"] for response in responses), setting)
            return self._filled(frame, [response["content"] for response in responses])
        if self.controls.quoted_in([*messages[:-1], *responses], setting.tools):
            return self._masked(messages, responses, setting)
        return Piece(self._whole(messages, responses, setting))

    def _filled(self, frame: Sequence[str], contents: Sequence[str]) -> Piece:
        """A frame with these contents."""
        text = frame[0]
        quoted: list[tuple[int, int]] = []
        for content, after in zip(contents, frame[1:], strict=True):
            at = len(text)
            quoted += [(at + start, at + end) for start, end in self.controls.spans(content)]
            text += content + after
        return Piece(valid_text(text), quoted=tuple(quoted))

    def _frame(self, roles: tuple[str, ...], setting: Setting) -> list[str]:
        """What the glue shows before, between and after the contents of messages with these roles."""
        key = (roles, setting.enable_thinking, setting.ended, setting.generation_prompt)
        if key not in self.frames:
            holes = [{"role": role, "content": HOLE} for role in roles]
            bare = replace(setting, tools=None)
            self.frames[key] = self._whole([{"role": "assistant"}], holes, bare).split(HOLE)
        return self.frames[key]

    def _masked(
        self, messages: Sequence[Message], responses: Sequence[Message], setting: Setting
    ) -> Piece:
        """The glue where something holds the text of a control token."""
        plain = self._whole(messages, responses, setting)
        for masks in self.controls.masks([*messages, *responses], setting.tools):
            before = self.controls.hide(messages, masks)
            after = self.controls.hide(responses, masks)
            hidden = replace(setting, tools=self.controls.hide_tools(setting.tools, masks))
            with suppress(ValueError):
                masked = self._whole(before, after, hidden)
                text, quoted = masks.show(masked)
                if text == plain:
                    return Piece(text, quoted=quoted)
                if self.controls.pattern.findall(masked) == self.controls.pattern.findall(plain):
                    # The template shows what it was told of them in another way, and not as tokens
                    return Piece(plain)
        raise ValueError(
            "the chat template shows a message that holds a control token in another way than others: "
            "use data.chat_template=hermes."
        )

    def _whole(
        self, messages: Sequence[Message], responses: Sequence[Message], setting: Setting
    ) -> str:
        """The text of the glue, from a render of everything."""
        placeholder = PLACEHOLDER
        # A tool may print anything
        while any(placeholder in str(message) for message in (*messages, *responses)):
            placeholder += "X"
        with suppress(ValueError):
            answered = bool(responses) and responses[0]["role"] == "tool"
            if answered and self._wants_calls(setting):
                return self._after_calls(messages, responses, setting, placeholder)
        stand_in = {"role": "assistant", "content": placeholder}
        glue = self._after(placeholder, [*messages[:-1], stand_in, *responses], setting)
        end = next((token for token in self.ends if glue.lstrip().startswith(token)), None)
        if end is None:
            known = " or ".join(self.ends)
            raise ValueError(
                f"the chat template follows an assistant turn with {glue[:30]!r}, not with {known}."
            )
        return glue[glue.index(end) + (len(end) if setting.ended else 0) :]

    def _after(self, placeholder: str, shown: Sequence[Message], setting: Setting) -> str:
        """What a render of these messages shows after its last placeholder."""
        text = self.text(shown, setting.tools, setting.enable_thinking, setting.generation_prompt)
        # The last one: a template may show an earlier turn twice.
        return text.rpartition(placeholder)[2]

    def _wants_calls(self, setting: Setting) -> bool:
        """Whether the template takes a tool's answer only after a message with calls in its fields,
        as Mistral's and gpt-oss' do.
        """
        if self.wants_calls is None:
            said = {"role": "assistant", "content": "Words"}
            answered = {"role": "tool", "content": "1", "name": "tool", "tool_call_id": MADE_ID}
            shown = [{"role": "user", "content": "?"}, said, answered, said, answered]
            try:
                self.text(shown, setting.tools, setting.enable_thinking, True)
                self.wants_calls = False
            except ValueError:
                self.wants_calls = True
        return self.wants_calls

    def _after_calls(
        self,
        messages: Sequence[Message],
        responses: Sequence[Message],
        setting: Setting,
        placeholder: str,
    ) -> str:
        """The glue where each turn that a tool answers has calls in its fields."""
        shown = [*messages[:-1], {"role": "assistant", "content": ""}, *responses]
        glue = self._after(placeholder, _with_calls(shown, placeholder), setting)
        places = [(place, token) for token in self.ends if (place := glue.find(token)) >= 0]
        if not places:
            raise ValueError("the chat template doesn't end a turn of calls.")
        place, end = min(places)
        return glue[place + (len(end) if setting.ended else 0) :]


def _with_calls(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages; those that tools answer call these tools with `text`, whatever they said."""
    shown: list[Message] = []
    answers: list[dict[str, Any]] = []
    # Backwards: whether an assistant's message made calls is known from what follows it.
    for message in reversed(messages):
        if message["role"] == "tool":
            identifier = message.get("tool_call_id") or MADE_ID
            answers.insert(0, {**message, "tool_call_id": identifier})
            continue
        if answers and message["role"] == "assistant":
            calls = [_call_before(answer, text) for answer in answers]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        shown += [*reversed(answers), message]
        answers = []
    return [*answers, *reversed(shown)]


def _call_before(answer: Message, text: str) -> dict[str, Any]:
    function = {"name": answer.get("name") or "tool", "arguments": {"text": text}}
    return {"type": "function", "id": answer["tool_call_id"], "function": function}


def _is_plain(response: Message) -> bool:
    """Whether a frame has a hole for such a message."""
    return response["role"] in ("tool", "user") and type(response.get("content")) is str
