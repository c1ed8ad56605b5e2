"""Renders a chat template as transformers does, without the work that transformers does on every
message before.

`apply_chat_template` copies messages and tools twice, to make plain containers of whatever it may be
given. Ours are plain, and the copies take as long as the template. They are left out where that is
known to change nothing: for plain containers, with a tokenizer that has transformers' own method, and
only after both ways gave the same text of a few conversations (`agrees`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

# What a template may raise, or a render without transformers' preparation
REFUSALS = (jinja2.TemplateError, ValueError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Asked:
    """What a template is given: messages as it is to see them, and what stands beside them."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    kwargs: Mapping[str, Any]
    generation_prompt: bool


def officially(tokenizer: Any, source: str | None, asked: Asked) -> str:
    """The text, by `apply_chat_template`; `source` None: the tokenizer's own template."""
    return tokenizer.apply_chat_template(
        list(asked.messages),
        tools=list(asked.tools) if asked.tools else None,
        chat_template=source,
        add_generation_prompt=asked.generation_prompt,
        tokenize=False,
        **asked.kwargs,
    )


def directly(tokenizer: Any, source: str | None, asked: Asked) -> str:
    """The same text, by the template itself; where something isn't plain, by `officially`."""
    plain = is_plain(asked.messages) and is_plain(asked.tools) and is_plain(asked.kwargs)
    compiled = _compiled()
    if not plain or not asked.messages or compiled is None:
        return officially(tokenizer, source, asked)
    tools = list(asked.tools) if asked.tools else None
    return compiled(tokenizer.get_chat_template(source, tools)).render(
        messages=[
            {key: value for key, value in message.items() if value is not None}
            for message in asked.messages
        ],
        tools=tools,
        documents=None,
        add_generation_prompt=asked.generation_prompt,
        **{**tokenizer.special_tokens_map, **asked.kwargs},
    )


def agrees(tokenizer: Any, source: str | None, probes: Sequence[Asked]) -> bool:
    """Whether `directly` gives what `officially` does: with this tokenizer, of these conversations."""
    from transformers import PreTrainedTokenizerBase

    own = PreTrainedTokenizerBase.apply_chat_template
    # A setting may be one of transformers' own, not the template's
    for_template = not any(
        asked.kwargs.keys() & inspect.signature(own).parameters.keys() for asked in probes
    )
    if type(tokenizer).apply_chat_template is not own or not for_template or _compiled() is None:
        return False
    return all(
        _outcome(officially, tokenizer, source, asked)
        == _outcome(directly, tokenizer, source, asked)
        for asked in probes
    )


def _outcome(
    way: Callable[[Any, str | None, Asked], str], tokenizer: Any, source: str | None, asked: Asked
) -> str | type[Exception]:
    try:
        return way(tokenizer, source, asked)
    except REFUSALS as error:
        return type(error)


def _compiled() -> Callable[[str], Any] | None:
    """transformers' compiler of templates, which remembers them; None in a version without it."""
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, "_compile_jinja_template", None)


def is_plain(value: Any) -> bool:
    """Whether a value holds nothing but JSON's types, and no class that only looks like one."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or kind is float or value is None:
        return True
    if kind is dict:
        return all(type(key) is str and is_plain(entry) for key, entry in value.items())
    return kind is list and all(map(is_plain, value))
