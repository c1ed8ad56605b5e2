"""Finding out how a chat template ends turns, begins answers, and expects calls to be given.

It is found by rendering small conversations of ours with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from retool.data.read.rows import Conversation, RowError
from retool.data.template.thoughts import FIELDS, field_of, thoughts, without_thoughts
from retool.data.template.turns import PLACEHOLDER, EndOfTurn, TurnFinder

QUESTION = {"role": "user", "content": "Question"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks it up.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where."},
                "days": {"type": "integer", "description": "When."},
            },
            "required": ["place", "days"],
        },
    },
}


class CallForm(NamedTuple):
    """How a template wants a message with calls.

    Arguments as JSON text or as a dict, absent words as null or as "".
    """

    arguments_as_text: bool = False
    no_words_as_null: bool = False


# The first form is transformers', the last OpenAI's.
FORMS = (
    CallForm(),
    CallForm(no_words_as_null=True),
    CallForm(arguments_as_text=True),
    CallForm(True, True),
)
# (messages, with generation prompt, with a tool, form) -> text
Show = Callable[[Sequence[Mapping[str, Any]], bool, bool, CallForm], str]


def shown_message(message: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """The message as the template gets it.

    Our own keys are left out, and a thought is given under every name that templates read.
    """
    calls = message.get("tool_calls")
    given = _without_blank_words(message) if calls and form.no_words_as_null else message
    shown = {
        key: value for key, value in given.items() if key not in ("loss_mask", "weight", *FIELDS)
    }
    if field := field_of(given):
        shown |= dict.fromkeys(FIELDS, field[1])
    if calls and form.arguments_as_text:
        shown["tool_calls"] = [_with_arguments_as_text(call) for call in calls]
    return shown


def _without_blank_words(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with null for a content that says nothing aloud.

    What it thinks moves to the field, as servers give it back.
    """
    if without_thoughts(message)["content"].strip():
        return message
    thought = "\n\n".join(text.strip() for _, text in thoughts(message))
    return {
        **message,
        "content": None,
        "reasoning_content": thought,
        "reasoning": None,
        "thinking": None,
    }


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def find_ends(show: Show, added: frozenset[str], eos: str | None) -> EndOfTurn:
    """The end-of-turn tokens of an answer.

    They are what the template writes after one, and the tokenizer's own. Raises ValueError.
    """
    answer = {"role": "assistant", "content": PLACEHOLDER}
    before, _, tail = show([QUESTION, answer], False, False, FORMS[0]).rpartition(PLACEHOLDER)
    if not before:
        raise ValueError("the chat template doesn't show an answer as it is written")
    candidates = [token for token in added if tail.lstrip().startswith(token)]
    if not candidates:
        raise ValueError(
            f"the chat template ends an answer with {tail[:30]!r}, which doesn't begin with a token "
            "of its own in this tokenizer, so the model couldn't learn to stop"
        )
    # The longest of those that fit: a shorter one may be its beginning.
    known = [max(candidates, key=len)]
    if eos is not None and eos in added and eos not in known:
        known.append(eos)
    return EndOfTurn(tuple(known), added)


def find_header(show: Show) -> str:
    """The text between a prompt and an answer, for templates without a generation prompt.

    That is a role header, or nothing.
    """
    try:
        prompt = show([QUESTION], True, False, FORMS[0])
        bare = show([QUESTION], False, False, FORMS[0])
    except ValueError:  # no prompt of one message; what it says of longer ones, rows will tell
        return ""
    answer = {"role": "assistant", "content": PLACEHOLDER}
    own = show([QUESTION, answer], False, False, FORMS[0])
    if prompt != bare or not own.startswith(prompt):
        return ""
    return own.removeprefix(prompt).partition(PLACEHOLDER)[0]


def find_call_form(show: Show, ends: EndOfTurn) -> tuple[CallForm, EndOfTurn]:
    """The first form in which the template shows a call in full, and the ends of turns.

    The token that closes a turn of calls is one of these ends.

    Of a template that shows calls in none of them, the first form: its rows are refused one by one,
    saying why.
    """
    # The first form in which our own finder sees the call in full: the same check as for every row
    # later.
    for form in FORMS:
        closed = _ends_with_call(show, ends, form)
        conversation = Conversation([QUESTION, _calls(1)], [TOOL])

        def render(
            messages: Sequence[Mapping[str, Any]], generation_prompt: bool, form: CallForm = form
        ) -> str:
            return show(messages, generation_prompt, True, form)

        try:
            TurnFinder(conversation, render, closed).turn(1, True)
        except (RowError, ValueError):
            continue
        return form, closed
    return FORMS[0], ends


def _calls(count: int) -> dict[str, Any]:
    # Quotes and a number: a template that pastes text together shows itself by them.
    arguments = {"place": 'the "Old" Town', "days": 3}
    calls = [
        {
            "type": "function",
            "id": f"{k}abcdefgh",
            "function": {"name": "look_up", "arguments": arguments},
        }
        for k in range(count)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


# What rows may hold: an answer, a thought, several calls and their results.
CONVERSATIONS = (
    [QUESTION],
    [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it? "}, QUESTION],
    [QUESTION, _calls(2), *2 * [{"role": "tool", "content": "1", "name": "look_up"}]],
    [{"role": "system", "content": "Be exact."}, QUESTION, {**_calls(1), "content": "Look."}],
)


def _ends_with_call(show: Show, ends: EndOfTurn, form: CallForm) -> EndOfTurn:
    """`ends` with the token that closes a turn of one call (<|eom_id|>, <|call|>).

    Unless it is one of them already.

    A token that closes each of several calls ends a call, not the turn.
    """
    try:
        own = show([QUESTION, _calls(1)], False, True, form)
    except ValueError:
        return ends
    closing = [token for _, token in ends.closing(own)]
    if not closing or set(closing) & set(ends.known):
        return ends
    try:
        several = show([QUESTION, _calls(2)], False, True, form)
    except ValueError:
        several = ""  # a template for single calls
    if several.count(closing[0]) > own.count(closing[0]):
        return ends
    return EndOfTurn((*ends.known, closing[0]), ends.added, closing[0])
