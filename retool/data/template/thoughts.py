"""An assistant's reasoning before its answer, in whichever field a row has it.

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
    """A thought that a prompt opens."""

    close: str  # the tag that will close it
    gap: str  # the white space after the tag that opened it


def field_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, text) of the reasoning field that the message gives.

    Raises ValueError for what isn't text, and for two different texts.
    """
    said: list[tuple[str, str]] = []
    for name in FIELDS:
        text = message.get(name)
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}, not text.")
        if text.strip():
            said.append((name, text))
    if len({text.strip() for _, text in said}) > 1:
        names = f"{said[0][0]} and {said[1][0]}"
        raise ValueError(f"{names} are two names for one thing, and differ here: keep one.")
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
    found: list[tuple[str, str]] = []
    field = field_of(message)
    if field:
        found.append(field)
    for is_thought, text in segments(message.get("content") or ""):
        if is_thought:
            found.append(("content", text))
    return found


def is_left_open(message: Mapping[str, Any]) -> bool:
    """Whether the content opens a thought and doesn't close it: all that follows counts as thought,
    the message's calls, too.
    """
    last = None
    for tag in TAG.finditer(message.get("content") or ""):
        last = tag
    return last is not None and not _closes(last)


def without_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without its reasoning fields."""
    return {key: value for key, value in message.items() if key not in FIELDS}


def without_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as if it had been written without thinking; tags that hold nothing go too."""
    left = without_fields(message)
    content = left.get("content") or ""
    if TAG.search(content):
        aloud = [text for is_thought, text in segments(content) if not is_thought]
        content = "".join(aloud).lstrip()
    left["content"] = content
    return left


def with_thought_in_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning field at the beginning of the content, as <think>…</think>."""
    field = field_of(message)
    if field is None:
        return dict(message)
    left = without_fields(message)
    thought = f"<think>\n{field[1].strip()}\n</think>"
    says_more = bool(left["content"].strip())
    left["content"] = f"{thought}\n\n{left['content']}" if says_more else thought
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
    if tag is None or _closes(tag):
        return None
    return OpenThought(close=_closing(tag), gap=tag.string[tag.end() :])


def closes_thought(prompt: str) -> bool:
    """Whether the prompt ends with the end of a thought: thinking is off."""
    tag = _last_tag(prompt)
    return tag is not None and _closes(tag)


def is_empty_thought(text: str) -> bool:
    """Whether the text is nothing but a thought without words."""
    return bool(TAG.search(text)) and not segments(text)


def think(thought: str, opened: OpenThought, rest: str) -> str:
    """What the model writes after a prompt that opened a thought.

    That is the thought, its end, and `rest`, what it says then.
    """
    if not rest.lstrip().startswith(opened.close):
        return thought.strip() + opened.gap + opened.close + 2 * opened.gap + rest
    # The template closes the thought by itself, so the space around the tag is its own.
    gap = "" if rest[0].isspace() else opened.gap
    return thought.strip() + gap + rest


def _last_tag(prompt: str) -> re.Match[str] | None:
    """The tag that the prompt ends with, white space aside."""
    last = None
    for tag in TAG.finditer(prompt[-LONGEST_TAG:]):
        last = tag
    if last is None or last.string[last.end() :].strip():
        return None
    return last


def _closes(tag: re.Match[str]) -> bool:
    return bool(tag["slash"] or tag["bar"]) or tag["edge"] == "END" or tag["side"] == "end"


def _closing(tag: re.Match[str]) -> str:
    if tag["name"]:
        return f"</{tag['name']}>"
    if tag["edge"]:
        return "<|END_THINKING|>"
    return "<|end_of_thought|>" if tag["side"] else "[/THINK]"
