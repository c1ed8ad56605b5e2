"""Whether a rendered text holds everything that a row says.

The assistant's words, thoughts and calls must be in what is trained, the rest around it.

[Note: calls] The arguments of a call stand in the trained text as JSON equal to the row's, or one
by one (each key before its value) where the template was written for a form of its own, such as
<parameter=city>Paris</parameter>. What Python prints for a dict, {'city': 'Paris'}, is neither: no
parser of calls reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from retool.data.read.rows import Conversation, RowError
from retool.data.template.thoughts import FIELDS, field_of, segments, thoughts

JSON = json.JSONDecoder()
READS_ID = re.compile(r"""(?:\.|\[['"]|get\(['"])tool_call_id""")
# Fields of a message that are checked, or that say nothing to a model.
KNOWN_FIELDS = {
    "role",
    "content",
    "tool_calls",
    "loss_mask",
    "weight",
    "id",
    "tool_call_id",
    "refusal",
    *FIELDS,
}
# Characters between an argument's key and its value: </arg_key>\n<arg_value> and the like.
LONGEST_MARKUP = 40


class TemplateFault(RowError):
    """A row that this template, with these settings, can't show in full; another may."""


def fault(conversation: Conversation, why: str, turn: int | None = None) -> TemplateFault:
    """The error for a row, and for message `turn` of it, that another template or setting may mend."""
    return TemplateFault(str(conversation.error(why, turn)))


def check_said(conversation: Conversation, i: int, inside: str, trained: bool) -> None:
    """TemplateFault unless everything that message `i` says is `inside` the turn.

    Thoughts only where it is `trained`. Raises TemplateFault.
    """
    message = conversation.messages[i]
    if trained:
        check_refusal(conversation, i, inside)
        check_thought(conversation, i, inside)
    calls = message.get("tool_calls", [])
    text = _without_words(conversation, i, inside, trained)
    _check_calls(conversation, i, calls, text)
    if trained and calls and (thought := thoughts(message)):
        said = thought[-1][1].strip()
        # A model thinks before it acts: calls shown ahead of their thought would be learnt in that
        # order.
        _, _, behind = inside.partition(said)
        try:
            _check_calls(conversation, i, calls, behind)
        except TemplateFault as error:
            why = f"the chat template shows what this turn thinks ({_quote(said)}) only after its calls"
            raise fault(conversation, why, i) from error


def _check_calls(
    conversation: Conversation, i: int, calls: Sequence[Mapping[str, Any]], text: str
) -> None:
    """TemplateFault unless each of the calls is in `text`, in order."""
    at = 0
    for k, call in enumerate(calls):
        name = call["function"]["name"]
        end = _end_of_call(text, at, name, call["function"]["arguments"])
        if end is None:
            raise fault(conversation, _why_not_shown(text, name, k, len(calls)), i)
        at = end


def check_refusal(conversation: Conversation, i: int, inside: str) -> None:
    """TemplateFault unless a refusal (OpenAI's field beside a null content) is `inside` the turn,
    too.

    Raises RowError.
    """
    refusal = conversation.messages[i].get("refusal")
    if isinstance(refusal, str) and refusal.strip() and refusal.strip() not in inside:
        why = (
            f"its refusal ({_quote(refusal)}) is a field that templates don't show: write it into the "
            "content."
        )
        raise conversation.error(why, i)


def check_results(conversation: Conversation, source: str) -> None:
    """TemplateFault if results come in another order than their calls, and the template (`source`)
    shows no ids.

    Raises RowError.
    """
    if READS_ID.search(source):
        return
    order: dict[str, int] = {}
    last = -1
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            order = {
                call["id"]: k
                for k, call in enumerate(message.get("tool_calls", []))
                if isinstance(call.get("id"), str)
            }
            last = -1
        place = order.get(str(message.get("tool_call_id"))) if message["role"] == "tool" else None
        if place is None:
            continue
        if place < last:
            why = (
                "the results come in another order than their calls (tool_call_id), and the chat template "
                "shows none of these ids:"
            )
            raise conversation.error(f"{why} put the results in the order of the calls.", i)
        last = place


def unread_fields(conversation: Conversation, source: str) -> Iterator[str]:
    """role.field of each field that holds something and that nothing reads.

    Neither we nor the template (`source`) do.
    """
    for message in conversation.messages:
        for key, value in message.items():
            says_something = bool(value) or value is False  # `hidden: false` may be meant for us
            if says_something and key not in KNOWN_FIELDS and not _reads(source, key):
                yield f"{message['role']}.{key}"


@lru_cache(maxsize=256)  # fields of messages by the million have the same few names
def _reads(source: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def check_thought(conversation: Conversation, i: int, inside: str) -> None:
    """TemplateFault unless each thought of message `i` is `inside` the turn.

    Raises TemplateFault that names its field.
    """
    for where, text in thoughts(conversation.messages[i]):
        if text.strip() in inside:
            continue
        field = "the thought in the content" if where == "content" else where
        why = (
            f"the chat template doesn't show {field} ({_quote(text)}) in this turn, so the model "
            "would be trained to go without it"
        )
        raise fault(conversation, why, i)


def shows_thoughts(message: Mapping[str, Any], inside: str) -> bool:
    """Whether each thought of the message is `inside` the turn."""
    return all(text.strip() in inside for _, text in thoughts(message))


def check_tools(
    conversation: Conversation, opening: Sequence[Mapping[str, Any]], show: Callable[[Any], str]
) -> None:
    """TemplateFault unless every tool shows in the first prompt, beyond what its messages
    (`opening`) say.

    Raises TemplateFault.

    `show` is the prompt with these tools.
    """
    if not conversation.tools:
        return
    try:
        with_tools = show(conversation.tools)
    except ValueError as error:
        raise fault(conversation, str(error)) from error
    try:
        without_tools = show(None)
    except ValueError:  # a template made for tools alone
        without_tools = "".join(message["content"] for message in opening)
    # Counted, with the tools and without: a name may stand in what the user says.
    for tool in conversation.tools:
        name = tool.get("function", tool)["name"]
        if with_tools.count(name) <= without_tools.count(name):
            raise fault(
                conversation,
                f"the chat template doesn't render the tools ({name!r} isn't in the prompt)",
            )


def check_contexts(conversation: Conversation, text: str, messages: Collection[int]) -> None:
    """TemplateFault unless what users, tools and the system say is in the render, as it is or as
    JSON.

    Raises TemplateFault.
    """
    for i in messages:
        said = conversation.messages[i]["content"].strip()
        if said and not any(form in text for form in _forms_of_text(said)):
            raise fault(
                conversation,
                f"the chat template drops or changes the content ({_quote(said)}) of this message",
                i,
            )


# --- words ---


def _without_words(conversation: Conversation, i: int, inside: str, trained: bool) -> str:
    """`inside` without the words of message `i`: a call that they quote isn't a call.

    Raises TemplateFault.
    """
    message = conversation.messages[i]
    content = message["content"].strip()
    if field := field_of(message):
        inside = inside.replace(field[1].strip(), "", 1)
    if content in inside:
        return inside.replace(content, "", 1)
    at = 0
    for is_thought, text in segments(content):
        said = text.strip()
        place = inside.find(said, at)
        if place >= 0:
            inside = inside[:place] + inside[place + len(said) :]
            at = place
        elif trained or not is_thought:
            raise fault(
                conversation,
                f"the chat template drops or changes the content ({_quote(said)}) of this turn",
                i,
            )
    return inside


def _quote(text: str) -> str:
    said = text.strip()
    return repr(said[:40]) + ("…" if len(said) > 40 else "")


def _forms_of_text(text: str) -> tuple[str, ...]:
    """The ways in which a text may be written: as it is, or inside a JSON string."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


# --- calls ---


def _end_of_call(text: str, at: int, name: str, arguments: Mapping[str, Any]) -> int | None:
    """Where a call that is shown after `at` ends; None where it isn't there."""
    place = _find_json(text, at, arguments)
    if place is not None:
        begin, end = place
        # The name stands before the arguments, or right behind them in the same object.
        behind = text.find("{", end)
        if name in text[at:begin] or name in text[end : behind if behind >= 0 else len(text)]:
            return end
    begin = text.find(name, at)
    return None if begin < 0 else _end_of_arguments(text, begin + len(name), arguments)


def _end_of_arguments(text: str, at: int, arguments: Mapping[str, Any]) -> int | None:
    """Where arguments that are written one by one end: each key with its value close behind.

    A template may sort them.
    """
    last = at
    for key, value in arguments.items():
        end = _end_of_argument(text, at, key, value)
        if end is None:
            return None
        last = max(last, end)
    return last


def _end_of_argument(text: str, at: int, key: str, value: Any) -> int | None:
    while (begin := text.find(key, at)) >= 0:
        at = begin + len(key)
        # See [Note: calls]: a Python dict isn't JSON.
        python = text[:begin].endswith("'") and text.startswith("': ", at)
        end = None if python else _end_of_value(text, at, value)
        if end is not None:
            return end
    return None


def _end_of_value(text: str, at: int, value: Any) -> int | None:
    """Where a value that is written right after `at`, with no more than markup between, ends."""
    latest = at + LONGEST_MARKUP
    if isinstance(value, (dict, list)):
        place = _find_json(text, at, value)
        return place[1] if place and place[0] <= latest else None
    if isinstance(value, str):
        forms = _forms_of_text(value.strip())
    else:
        forms = (json.dumps(value), str(value))
    ends = []
    for form in forms:
        begin = text.find(form, at, latest + len(form))
        if begin >= 0:
            ends.append(begin + len(form))
    return min(ends, default=None)


def _find_json(text: str, at: int, value: Any) -> tuple[int, int] | None:
    """(begin, end) of the first JSON text after `at` that says `value`."""
    wanted = _canonical(value)
    opening = "[" if isinstance(value, list) else "{"
    while (at := text.find(opening, at)) >= 0:
        try:
            found, end = JSON.raw_decode(text, at)
        except json.JSONDecodeError:
            at += 1
            continue
        if _canonical(found) == wanted:
            return at, end
        at += 1
    return None


def _canonical(value: Any) -> str:
    """One text for equal values, whatever the order of keys; 1, 1.0 and true stay apart."""
    return json.dumps(value, sort_keys=True)


def _why_not_shown(text: str, name: str, k: int, calls: int) -> str:
    which = f"{name!r}, {k + 1} of {calls}," if calls > 1 else repr(name)
    if name not in text:
        return f"the chat template drops the tool call ({which} isn't in the render)"
    return (
        f"the chat template changes the tool call (the arguments of {which} stand there neither as JSON "
        "nor one by one)"
    )
