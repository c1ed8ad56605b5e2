"""Tool calls in what a model wrote: hermes JSON, fenced Python, or ReTool's `<code>`.

Nothing here raises on a model's text.

A call that can't be understood comes back with a `problem`, which goes to the model as the tool's
answer.

[Note: reasoning] What stands between <think> and </think> is a draft: templates that know these
tags show what follows them as the answer, and servers look for calls only there. So do `hermes` and
`code_block`. ReTool's `<code>` is written in the middle of reasoning and run there (arXiv
2504.11536, section 2.2), so `retool` reads the whole turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

MOST_CALLS = 32  # of a turn are read and answered: a model that repeats itself can write thousands
OPEN = "<tool_call>"
CLOSE = "</tool_call>"
THINK = "<think>"
END_OF_THOUGHT = "</think>"
CALL = re.compile(re.escape(OPEN))
THOUGHT_OR_CALL = re.compile(f"{re.escape(THINK)}|{re.escape(OPEN)}")
FENCE = re.compile(r"```(?:python|py)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
THOUGHT_OR_FENCE = re.compile(rf"{THINK}.*?(?:{END_OF_THOUGHT}|\Z)|{FENCE.pattern}", re.DOTALL)
CODE = re.compile(r"<code>(.*?)(?:</code>|\Z)", re.DOTALL)
INNER_FENCE = re.compile(r"\A\s*```(?:python|py)?[ \t]*\r?\n(.*?)\r?\n?\s*(?:```\s*)?\Z", re.DOTALL)
SHAPE = 'write <tool_call>{"name": …, "arguments": {…}}</tool_call>'
Schemas = Sequence[Mapping[str, Any]]
# Of a turn: the template knows no reasoning · it may begin with <think> · the generation prompt
# already opened it.
Reasoning = Literal["none", "tagged", "opened"]


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it.

    With a `problem` (a sentence for the model) it can't be run; `name` may be empty then.
    """

    name: str
    arguments: Any
    problem: str | None = None


def read_calls(
    form: str,
    text: str,
    schemas: Schemas = (),
    reasoning: Reasoning = "none",
    most: int = MOST_CALLS,
) -> list[Call]:
    """The calls of a turn that was written in `form` (a name of PARSERS), outside its reasoning,
    see [Note: reasoning].

    At most `most` are read. One more stands for all that follow, with a `problem` that says so.
    """
    if reasoning == "opened" and form != "retool":
        text = text.partition(END_OF_THOUGHT)[2]
    calls = list(islice(PARSERS[form](text, schemas, reasoning != "none"), most + 1))
    if len(calls) > most:
        calls[most] = Call(
            "", {}, f"a turn has at most {most} calls: this one and those after it weren't read."
        )
    return calls


def parse_hermes(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Calls between <tool_call> tags; a complete one that the turn's end left without its closing
    tag counts.

    JSON is read from the opening tag on, so a closing tag inside a string is only text. Arguments
    that are a string holding a JSON object are unwrapped; other strings stay. `thinks`: what
    <think> … </think> encloses is passed over.
    """
    del schemas  # names are checked where the tools are known
    marks = THOUGHT_OR_CALL if thinks else CALL
    at = 0
    while found := marks.search(text, at):
        if found.group() == OPEN:
            call, at = _hermes_call(text, found.end())
            yield call
        else:
            closing = text.find(END_OF_THOUGHT, found.end())
            at = len(text) if closing < 0 else closing + len(END_OF_THOUGHT)


def _hermes_call(text: str, start: int) -> tuple[Call, int]:
    """The call whose body begins at `start`, and where to look for the next."""
    while start < len(text) and text[start].isspace():
        start += 1
    closing = text.find(CLOSE, start)
    after = len(text) if closing < 0 else closing + len(CLOSE)
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        return Call("", {}, f"the tool call is nested too deeply; {SHAPE}."), after
    except ValueError as error:
        why = (
            f"{error.msg} at character {error.pos - start}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        return Call("", {}, f"the tool call isn't valid JSON ({why}); {SHAPE}."), after
    rest = text[stop:].lstrip()
    if rest and not rest.startswith(CLOSE):
        return Call(
            "", {}, f"there is text after the JSON of the tool call ({rest[:20]!r}); {SHAPE}."
        ), max(after, stop)
    return _from_json(value), len(text) - len(rest) + (len(CLOSE) if rest else 0)


def _from_json(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return Call("", {}, f"the tool call has no function name; {SHAPE}.")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            inner = json.loads(arguments)
        except (ValueError, RecursionError):
            inner = None
        arguments = inner if isinstance(inner, dict) else arguments
    return Call(value["name"], arguments)


def parse_code_block(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Every ```python block, as a call of the tool that takes code.

    `thinks`: those inside <think> … </think> aren't.
    """
    name, argument = code_tool(schemas)
    for found in (THOUGHT_OR_FENCE if thinks else FENCE).finditer(text):
        block = found.group(1)
        if block is not None and block.strip():
            yield Call(name, {argument: block})


def parse_retool(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Every `<code>` element (arXiv 2504.11536), a fence inside it taken off; inside reasoning,
    too.
    """
    del thinks
    name, argument = code_tool(schemas)
    for found in CODE.finditer(text):
        fenced = INNER_FENCE.match(found.group(1))
        block = fenced.group(1) if fenced else found.group(1).strip("\n")
        if block.strip():
            yield Call(name, {argument: block})


def code_tool(schemas: Schemas) -> tuple[str, str]:
    """(name, argument) of the tool that runs code: `code_interpreter`, else the only one with a
    single required argument.
    """
    bodies = [schema.get("function", schema) for schema in schemas]
    single = [
        (str(body["name"]), names[0]) for body in bodies if len(names := _required(body)) == 1
    ]
    named = next((entry for entry in single if entry[0] == "code_interpreter"), None)
    return named or (single[0] if len(single) == 1 else ("code_interpreter", "code"))


def _required(body: Mapping[str, Any]) -> list[str]:
    parameters = body.get("parameters") or {}
    return [
        str(name) for name in parameters.get("required") or list(parameters.get("properties") or {})
    ]


def check(call: Call, schemas: Schemas) -> str | None:
    """Why `call` can't be run, in a sentence for the model; None where it can: known tool, an
    object with what is required.
    """
    if call.problem is not None:
        return call.problem
    bodies = {
        str(body["name"]): body for body in (schema.get("function", schema) for schema in schemas)
    }
    if call.name not in bodies:
        return f"there is no tool {call.name[:80]!r}; there is {', '.join(bodies) or 'none'}."
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} must be a JSON object, not {type(call.arguments).__name__}."
    required = (bodies[call.name].get("parameters") or {}).get("required") or []
    missing = [str(name) for name in required if name not in call.arguments]
    return (
        f"{call.name} needs the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}."
        if missing
        else None
    )


PARSERS: dict[str, Callable[[str, Schemas, bool], Iterator[Call]]] = {
    "hermes": parse_hermes,
    "code_block": parse_code_block,
    "retool": parse_retool,
}
