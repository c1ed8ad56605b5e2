"""pythonic: `[name(argument=value, …)]`, of Llama 4, and of LFM2 between tokens of its own."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from retool.rl.agent.reading.call import Call, Schemas, function_of, parameters_of, unreadable
from retool.rl.agent.reading.form import Format, Found, Mark

SHAPE = "write [name(argument=value)]"
# The list follows a token that is made for it, or begins a line
OPENS = (
    r"(?P<tag><\|tool_call_start\|>|<\|python_start\|>)\s*"
    r"|(?:^|(?<=</think>))[ \t]*"
    r"(?=\[\s*"
    r"(?P<name>[A-Za-z_][\w.]{0,200})"
    r"\()"
)
# What tells where a list ends: its brackets, and strings, which may hold some
QUOTE_OR_BRACKET = re.compile(r"'''|\"\"\"|['\"()\[\]{}]")
QUOTES = ("'", '"', "'''", '"""')
STRING_REST = {quote: re.compile(rf"(?:[^\\]|\\.)*?{quote}", re.DOTALL) for quote in QUOTES}
JSON_WORDS = {
    "true": True,
    "false": False,
    "null": None,
}
MAX_DEPTH = 60  # of brackets; Python's own parser takes 200


def read(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """The calls of one list. A single one may lack its brackets where a token says that it is one.

    What only looks like a list, because no token says so and no tool is called, is prose.
    """
    begin = mark.end()
    try:
        source, stop = _source_of_list(text, begin)
        tree = _parsed(source)
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        if not nodes:
            raise ValueError("the list of tool calls is empty")
        return [_call_of(node, schemas) for node in nodes], stop
    except ValueError as error:
        names = {function_of(schema)["name"] for schema in schemas}
        # A list in an answer may look like a call. Only a tool's own name makes a fault of it.
        if mark.group("tag") is None and mark.group("name") not in names:
            return [], begin
        return [unreadable(str(error), SHAPE)], begin


def _source_of_list(
    text: str,
    start: int,
) -> tuple[str, int]:
    """The Python of the list, or call, that begins at `start`; and where it ends.

    Line breaks in strings that may not have any are written as escapes. Raises ValueError.
    """
    parts: list[str] = []
    depth = 0
    position = start
    while mark := QUOTE_OR_BRACKET.search(text, position):
        sign = mark.group()
        end = mark.end()
        if sign in QUOTES:
            rest = STRING_REST[sign].match(text, end)
            if rest is None:
                break
            end = rest.end()
        else:
            depth += 1 if sign in "([{" else -1
        piece = text[mark.start() : end]
        # Models break lines inside plain quotes, which Python doesn't allow.
        if sign in ("'", '"'):
            piece = piece.replace("\n", "\\n")
        parts += [text[position : mark.start()], piece]
        position = end
        if depth > MAX_DEPTH:
            raise ValueError("the tool call is nested too deeply")
        if depth <= 0 and sign not in QUOTES:
            return "".join(parts).strip(), position
    raise ValueError("the tool call isn't closed")


def _parsed(source: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that mean nothing
            # Parsed, never evaluated: what isn't a plain value is refused below.
            return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else "too deep or too long"
        raise ValueError(f"the tool call isn't a list of calls as Python has it ({why})") from None


def _call_of(
    node: ast.expr,
    schemas: Schemas,
) -> Call:
    """A call by its syntax. Raises ValueError where it is more than a name and plain values."""
    if not isinstance(node, ast.Call):
        raise ValueError("the tool call isn't a list of calls")
    name = _dotted(node.func)
    order = list(parameters_of(name, schemas))
    if len(node.args) > len(order):
        raise ValueError(f"{name} has more values than the tool has arguments")
    arguments = {key: _value(value) for key, value in zip(order, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("the arguments aren't written out")
        arguments[keyword.arg] = _value(keyword.value)
    return Call(name, arguments)


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("the tool call has no function name")
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr) -> Any:
    """A value of JSON's kinds, which may be written with JSON's words. Raises ValueError."""
    if isinstance(node, ast.Name) and node.id in JSON_WORDS:
        return JSON_WORDS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(entry) for entry in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a dict of the arguments has a key that is no string")
        return {key: _value(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value
    raise ValueError("an argument isn't a plain value")


PYTHONIC = Format(
    opens=OPENS,
    read=read,
    signs=("<|tool_call_start|>", "<|python_start|>"),
)
