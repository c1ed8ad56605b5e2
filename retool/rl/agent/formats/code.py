"""Programs as calls: fenced Python (`code_block`), or ReTool's `<code>` (`retool`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from retool.data.render.inline_outputs import CLOSES, CODE_ENDS, OPENS
from retool.rl.agent.reading.call import Call, Schemas, function_of
from retool.rl.agent.reading.form import Format, Found, Inline, Mark

# A fence or an element that the turn's end left open counts, too: `\Z`
FENCE = r"```(?:python|py)[ \t]*\r?\n(?P<code>(?s:.*?))(?:```|\Z)"
CODE_ELEMENT = r"<code>(?P<code>(?s:.*?))(?:</code>|\Z)"
FENCE_IN_ELEMENT = re.compile(
    r"\A\s*```(?:python|py)?[ \t]*\r?\n(.*?)\r?\n?\s*(?:```\s*)?\Z", re.DOTALL
)


def read_block(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """A ```python block, as a call of the tool that takes code."""
    del text  # the mark has all of it
    return _call_of_code(mark.group("code"), schemas), mark.end()


def read_element(
    text: str,
    mark: Mark,
    schemas: Schemas,
) -> Found:
    """A `<code>` element (arXiv 2504.11536); a fence in it is taken off."""
    del text
    content = mark.group("code")
    fenced = FENCE_IN_ELEMENT.match(content)
    code = fenced.group(1) if fenced else content.strip("\n")
    return _call_of_code(code, schemas), mark.end()


def _call_of_code(code: str, schemas: Schemas) -> list[Call]:
    if not code.strip():
        return []
    name, argument = code_tool(schemas)
    return [Call(name, {argument: code})]


def code_tool(schemas: Schemas) -> tuple[str, str]:
    """(name, argument) of the tool that runs code: `code_interpreter`, else the only one with a
    single required argument.
    """
    with_one_argument = []
    for schema in schemas:
        function = function_of(schema)
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


CODE_BLOCK = Format(
    opens=FENCE,
    read=read_block,
)
RETOOL = Format(
    opens=CODE_ELEMENT,
    read=read_element,
    in_thoughts=True,
    inline=Inline(CODE_ENDS, OPENS, CLOSES),
)
