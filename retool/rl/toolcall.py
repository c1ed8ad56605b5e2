"""Tool calls in what a model wrote: hermes JSON, fenced Python, or ReTool's `<code>`. Nothing here raises on a model's text.

A call that can't be understood comes back with a `problem`, which goes to the model as the tool's answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FENCE = re.compile(r"```(?:python|py)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"<code>(.*?)(?:</code>|\Z)", re.DOTALL)
INNER_FENCE = re.compile(r"\A\s*```(?:python|py)?[ \t]*\r?\n(.*?)\r?\n?\s*(?:```\s*)?\Z", re.DOTALL)
SHAPE = 'write <tool_call>{"name": …, "arguments": {…}}</tool_call>'
Schemas = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it. With a `problem` (a sentence for the model) it can't be run; `name` may be empty then."""

    name: str
    arguments: Any
    problem: str | None = None


def parse_hermes(text: str, schemas: Schemas = ()) -> list[Call]:
    """Calls between <tool_call> tags; a complete one that the turn's end left without its closing tag counts.

    JSON is read from the opening tag on, so a closing tag inside a string is only text. Arguments that are a string
    holding a JSON object are unwrapped; other strings stay.
    """
    del schemas  # names are checked where the tools are known
    calls: list[Call] = []
    at = text.find(OPEN)
    while at >= 0:
        start = at + len(OPEN)
        call, stop = _hermes_call(text, start)
        calls.append(call)
        at = text.find(OPEN, stop)
    return calls


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
        why = f"{error.msg} at character {error.pos - start}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Call("", {}, f"the tool call isn't valid JSON ({why}); {SHAPE}."), after
    rest = text[stop:].lstrip()
    if rest and not rest.startswith(CLOSE):
        return Call("", {}, f"there is text after the JSON of the tool call ({rest[:20]!r}); {SHAPE}."), max(after, stop)
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


def parse_code_block(text: str, schemas: Schemas = ()) -> list[Call]:
    """Every ```python block, as a call of the tool that takes code."""
    return _code_calls(FENCE.findall(text), schemas)


def parse_retool(text: str, schemas: Schemas = ()) -> list[Call]:
    """Every `<code>` element (arXiv 2504.11536), a fence inside it taken off."""
    blocks = [found.group(1) if (found := INNER_FENCE.match(block)) else block.strip("\n") for block in CODE.findall(text)]
    return _code_calls(blocks, schemas)


def _code_calls(blocks: Sequence[str], schemas: Schemas) -> list[Call]:
    name, argument = code_tool(schemas)
    return [Call(name, {argument: block}) for block in blocks if block.strip()]


def code_tool(schemas: Schemas) -> tuple[str, str]:
    """(name, argument) of the tool that runs code: `code_interpreter`, else the only one with a single required argument."""
    bodies = [schema.get("function", schema) for schema in schemas]
    single = [(str(body["name"]), names[0]) for body in bodies if len(names := _required(body)) == 1]
    named = next((entry for entry in single if entry[0] == "code_interpreter"), None)
    return named or (single[0] if len(single) == 1 else ("code_interpreter", "code"))


def _required(body: Mapping[str, Any]) -> list[str]:
    parameters = body.get("parameters") or {}
    return [str(name) for name in parameters.get("required") or list(parameters.get("properties") or {})]


def check(call: Call, schemas: Schemas) -> str | None:
    """Why `call` can't be run, in a sentence for the model; None where it can: known tool, an object with what is required."""
    if call.problem is not None:
        return call.problem
    bodies = {str(body["name"]): body for body in (schema.get("function", schema) for schema in schemas)}
    if call.name not in bodies:
        return f"there is no tool {call.name[:80]!r}; there is {', '.join(bodies) or 'none'}."
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} must be a JSON object, not {type(call.arguments).__name__}."
    required = (bodies[call.name].get("parameters") or {}).get("required") or []
    missing = [str(name) for name in required if name not in call.arguments]
    return f"{call.name} needs the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}." if missing else None


PARSERS: dict[str, Callable[[str, Schemas], list[Call]]] = {
    "hermes": parse_hermes,
    "code_block": parse_code_block,
    "retool": parse_retool,
}
