"""Tool calls in what a model wrote: hermes JSON, fenced Python, or ReTool's `<code>`.

Nothing here raises on a model's text. A call that can't be understood comes back with a `problem`,
which goes to the model as the tool's answer.

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

MAX_CALLS_READ = 32  # of a turn: a model that repeats itself can write thousands

CALL_OPENS = "<tool_call>"
CALL_CLOSES = "</tool_call>"
THOUGHT_OPENS = "<think>"
THOUGHT_CLOSES = "</think>"
CALL_SHAPE = 'write <tool_call>{"name": …, "arguments": {…}}</tool_call>'

# A fence or an element that the turn's end left open counts, too: `\Z`
CALL = re.compile(re.escape(CALL_OPENS))
THOUGHT_OR_CALL = re.compile(f"{re.escape(THOUGHT_OPENS)}|{re.escape(CALL_OPENS)}")
FENCE = re.compile(r"```(?:python|py)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
THOUGHT_OR_FENCE = re.compile(
    rf"{THOUGHT_OPENS}.*?(?:{THOUGHT_CLOSES}|\Z)|{FENCE.pattern}", re.DOTALL
)
CODE_ELEMENT = re.compile(r"<code>(.*?)(?:</code>|\Z)", re.DOTALL)
FENCE_IN_ELEMENT = re.compile(
    r"\A\s*```(?:python|py)?[ \t]*\r?\n(.*?)\r?\n?\s*(?:```\s*)?\Z", re.DOTALL
)

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


def unreadable(problem: str) -> Call:
    """What stands for a call that can't be understood."""
    return Call("", {}, problem)


def read_calls(
    form: str,
    text: str,
    schemas: Schemas = (),
    reasoning: Reasoning = "none",
    most: int = MAX_CALLS_READ,
) -> list[Call]:
    """The calls of a turn that was written in `form` (a name of PARSERS), outside its reasoning:
    see [Note: reasoning].

    At most `most` are read. One more stands for all that follow, with a `problem` that says so.
    """
    if reasoning == "opened" and form != "retool":
        text = text.partition(THOUGHT_CLOSES)[2]
    parser = PARSERS[form]
    calls = list(islice(parser(text, schemas, reasoning != "none"), most + 1))
    if len(calls) > most:
        calls[most] = unreadable(
            f"a turn has at most {most} calls: this one and those after it weren't read."
        )
    return calls


# --- hermes ---


def parse_hermes(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Calls between <tool_call> tags; a complete one counts, too, where the turn's end left it
    without its closing tag.

    JSON is read from the opening tag on, so a closing tag inside a string is only text. Arguments
    that are a string holding a JSON object are unwrapped; other strings stay. `thinks`: what
    <think> … </think> encloses is passed over.
    """
    del schemas  # names are checked where the tools are known
    marks = THOUGHT_OR_CALL if thinks else CALL
    position = 0
    while mark := marks.search(text, position):
        if mark.group() == CALL_OPENS:
            call, position = _read_hermes_call(text, mark.end())
            yield call
        else:
            position = _after(text, THOUGHT_CLOSES, mark.end())


def _read_hermes_call(text: str, start: int) -> tuple[Call, int]:
    """The call whose body begins at `start`, and where to look for the next."""
    while start < len(text) and text[start].isspace():
        start += 1
    after_tag = _after(text, CALL_CLOSES, start)
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        return unreadable(f"the tool call is nested too deeply; {CALL_SHAPE}."), after_tag
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos - start}"
        return unreadable(f"the tool call isn't valid JSON ({reason}); {CALL_SHAPE}."), after_tag
    except ValueError as error:  # a number of too many digits
        return unreadable(f"the tool call isn't valid JSON ({error}); {CALL_SHAPE}."), after_tag
    rest = text[stop:].lstrip()
    if not rest:
        return _call_of_json(value), len(text)
    if not rest.startswith(CALL_CLOSES):
        problem = f"there is text after the JSON of the tool call ({rest[:20]!r}); {CALL_SHAPE}."
        return unreadable(problem), max(after_tag, stop)
    return _call_of_json(value), len(text) - len(rest) + len(CALL_CLOSES)


def _after(text: str, tag: str, start: int) -> int:
    """Where the next `tag` ends, or the text, if it has none."""
    place = text.find(tag, start)
    return len(text) if place < 0 else place + len(tag)


def _call_of_json(value: Any) -> Call:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return unreadable(f"the tool call has no function name; {CALL_SHAPE}.")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _unwrapped(arguments)
    return Call(name, arguments)


def _unwrapped(text: str) -> Any:
    """The JSON object that a string holds, or the string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


# --- code ---


def parse_code_block(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Every ```python block, as a call of the tool that takes code.

    `thinks`: those inside <think> … </think> aren't.
    """
    name, argument = code_tool(schemas)
    marks = THOUGHT_OR_FENCE if thinks else FENCE
    for mark in marks.finditer(text):
        code = mark.group(1)  # None: it is a thought
        if code is not None and code.strip():
            yield Call(name, {argument: code})


def parse_retool(text: str, schemas: Schemas = (), thinks: bool = False) -> Iterator[Call]:
    """Every `<code>` element (arXiv 2504.11536), inside reasoning, too; a fence in it is taken off."""
    del thinks
    name, argument = code_tool(schemas)
    for element in CODE_ELEMENT.finditer(text):
        content = element.group(1)
        fenced = FENCE_IN_ELEMENT.match(content)
        code = fenced.group(1) if fenced else content.strip("\n")
        if code.strip():
            yield Call(name, {argument: code})


def code_tool(schemas: Schemas) -> tuple[str, str]:
    """(name, argument) of the tool that runs code: `code_interpreter`, else the only one with a
    single required argument.
    """
    with_one_argument = []
    for schema in schemas:
        function = schema.get("function", schema)
        arguments = _required_arguments(function)
        if len(arguments) == 1:
            with_one_argument.append((str(function["name"]), arguments[0]))
    for name, argument in with_one_argument:
        if name == "code_interpreter":
            return name, argument
    if len(with_one_argument) == 1:
        return with_one_argument[0]
    return "code_interpreter", "code"


def _required_arguments(function: Mapping[str, Any]) -> list[str]:
    """Those that the schema requires; all of them where it doesn't say."""
    parameters = function.get("parameters") or {}
    names = parameters.get("required") or list(parameters.get("properties") or {})
    return [str(name) for name in names]


# --- any format ---


def check(call: Call, schemas: Schemas) -> str | None:
    """Why `call` can't be run, in a sentence for the model; None where it can: the tool is known,
    and the arguments are an object with what is required.
    """
    if call.problem is not None:
        return call.problem
    functions: dict[str, Mapping[str, Any]] = {}
    for schema in schemas:
        function = schema.get("function", schema)
        functions[str(function["name"])] = function
    if call.name not in functions:
        return f"there is no tool {call.name[:80]!r}; there is {', '.join(functions) or 'none'}."
    if not isinstance(call.arguments, dict):
        kind = type(call.arguments).__name__
        return f"the arguments of {call.name} must be a JSON object, not {kind}."
    parameters = functions[call.name].get("parameters") or {}
    required = parameters.get("required") or []
    missing = [str(name) for name in required if name not in call.arguments]
    if not missing:
        return None
    plural = "s" if len(missing) > 1 else ""
    return f"{call.name} needs the argument{plural} {', '.join(missing)}."


PARSERS: dict[str, Callable[[str, Schemas, bool], Iterator[Call]]] = {
    "hermes": parse_hermes,
    "code_block": parse_code_block,
    "retool": parse_retool,
}
