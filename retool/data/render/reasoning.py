"""What an assistant thought before it spoke, however a row writes it.

A thought comes in a field of its own (`reasoning_content`, `reasoning`, `thinking`: three names for
one thing) or inside the content, between tags such as <think> and </think>. A template may show
one, both or neither, and its generation prompt may open a thought (the model goes on inside it) or
close an empty one (thinking is off).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from retool.data.read.rows import Conversation

FIELDS = ("reasoning_content", "reasoning", "thinking")
LONGEST_TAG = 100  # characters of a tag with the white space after it
TAG = re.compile(
    r"<(?P<slash>/?)(?P<name>(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning))>"
    r"|\[(?P<bar>/?)THINK\]"
    r"|<\|(?P<edge>START|END)_THINKING\|>"
    r"|<\|(?P<side>begin|end)_of_thought\|>"
)


class OpenThought(NamedTuple):
    """A thought that a prompt opens: the tag that will close it, and the white space after the one
    that opened it.
    """

    close: str
    gap: str


def field_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, text) of the reasoning field that the message gives.

    Raises ValueError for what isn't text, or two different texts.
    """
    found = [(name, message[name]) for name in FIELDS if message.get(name) is not None]
    for name, text in found:
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}, not text.")
    said = [(name, text) for name, text in found if text.strip()]
    if len({text.strip() for _, text in said}) > 1:
        raise ValueError(
            f"{said[0][0]} and {said[1][0]} are two names for one thing, and differ here: keep one."
        )
    return said[0] if said else None


def segments(content: str) -> list[tuple[bool, str]]:
    """The content cut at its thinking tags: (is it a thought, text), in order, without blank ones.

    What precedes a closing tag is a thought even where nothing opened it: R1's prompts do that.
    """
    parts: list[tuple[bool, str]] = []
    at = 0
    inside = False
    for tag in TAG.finditer(content):
        closes = _closes(tag)
        parts.append((inside or closes, content[at : tag.start()]))
        inside = not closes
        at = tag.end()
    parts.append((inside, content[at:]))
    return [(thought, text) for thought, text in parts if text.strip()]


def thoughts(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(where it stands, text) of everything that the message thinks."""
    field = field_of(message)
    inside = [
        ("content", text) for thought, text in segments(message.get("content") or "") if thought
    ]
    return [*([field] if field else []), *inside]


def without_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as if it had been written without thinking; tags that hold nothing go too."""
    left = {key: value for key, value in message.items() if key not in FIELDS}
    content = left.get("content") or ""
    if TAG.search(content):
        content = "".join(text for thought, text in segments(content) if not thought).lstrip()
    return {**left, "content": content}


def with_thought_in_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning field at the beginning of the content, as <think>…</think>."""
    field = field_of(message)
    if field is None:
        return dict(message)
    left = {key: value for key, value in message.items() if key not in FIELDS}
    thought = f"<think>\n{field[1].strip()}\n</think>"
    left["content"] = f"{thought}\n\n{left['content']}" if left["content"].strip() else thought
    return left


def settle_thoughts(conversation: Conversation, drop: bool, in_content: bool) -> Conversation:
    """The conversation with its thoughts where they are to be trained.

    Raises RowError for one that is given twice.
    """
    for i in conversation.assistant_turns:
        message = conversation.messages[i]
        try:
            field = field_of(message)
        except ValueError as error:
            raise conversation.error(str(error), i) from error
        if field and any(where == "content" for where, _ in thoughts(message)):
            raise conversation.error(
                f"the thought is given twice, in {field[0]} and in the content: keep one.", i
            )
    if not drop and not in_content:
        return conversation
    change = without_thoughts if drop else with_thought_in_content
    messages = [
        change(message) if message["role"] == "assistant" else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


def open_thought(prompt: str) -> OpenThought | None:
    """The thought that the prompt ends inside of, just opened."""
    tag = _last_tag(prompt)
    return (
        None if tag is None or _closes(tag) else OpenThought(_closing(tag), tag.string[tag.end() :])
    )


def closes_thought(prompt: str) -> bool:
    """Whether the prompt ends with the end of a thought: thinking is off."""
    tag = _last_tag(prompt)
    return tag is not None and _closes(tag)


def is_empty_thought(text: str) -> bool:
    """Whether the text is nothing but a thought without words."""
    return bool(TAG.search(text)) and not segments(text)


def think(thought: str, opened: OpenThought, rest: str) -> str:
    """What the model writes after a prompt that opened a thought: the thought, its end, and `rest`,
    what it says then.
    """
    if not rest.lstrip().startswith(opened.close):
        return thought.strip() + opened.gap + opened.close + 2 * opened.gap + rest
    # The template closes the thought by itself, so the space around the tag is its own.
    gap = "" if rest[0].isspace() else opened.gap
    return thought.strip() + gap + rest


def _last_tag(prompt: str) -> re.Match[str] | None:
    """The tag that the prompt ends with, white space aside."""
    tags = list(TAG.finditer(prompt[-LONGEST_TAG:]))
    return tags[-1] if tags and not tags[-1].string[tags[-1].end() :].strip() else None


def _closes(tag: re.Match[str]) -> bool:
    return bool(tag["slash"] or tag["bar"]) or tag["edge"] == "END" or tag["side"] == "end"


def _closing(tag: re.Match[str]) -> str:
    if tag["name"]:
        return f"</{tag['name']}>"
    if tag["edge"]:
        return "<|END_THINKING|>"
    return "<|end_of_thought|>" if tag["side"] else "[/THINK]"
