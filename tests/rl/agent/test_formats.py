"""Tool calls in a model's text, against the published cases and what models really write."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest

from retool.rl.agent.formats.code import CODE_BLOCK, RETOOL, code_tool
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.formats.table import FORMATS
from retool.rl.agent.reading.call import Call, check
from retool.rl.agent.reading.form import MAX_CALLS_READ, read_calls
from retool.rl.agent.tools.interpreter import SCHEMA
from tests.real_data import real

parse_hermes = partial(read_calls, HERMES)
parse_code_block = partial(read_calls, CODE_BLOCK)
parse_retool = partial(read_calls, RETOOL)

LOOKUP = {
    "name": "lookup",
    "parameters": {"properties": {"key": {}, "place": {}}, "required": ["key", "place"]},
}


def test_published_cases() -> None:
    cases = [
        json.loads(line)
        for line in real("goldens/hermes_tool_parser_cases.jsonl").read_text().splitlines()
    ]
    assert len(cases) == 5
    for case in cases:
        good = [call for call in parse_hermes(case["text"]) if call.problem is None]
        assert [{"name": c.name, "arguments": c.arguments} for c in good] == case["calls"], case[
            "id"
        ]
        assert bool(good) == case["tools_called"]


def test_several_calls_and_text_between() -> None:
    text = 'a <tool_call>{"name":"f","arguments":{"x":1}}</tool_call> b\n<tool_call>\n{"name":"g"}\n</tool_call> c'
    assert parse_hermes(text) == [Call("f", {"x": 1}), Call("g", {})]


def test_complete_json_without_closing_tag_counts() -> None:
    assert parse_hermes('<tool_call>{"name": "f", "arguments": {"x": "}"}}  \n') == [
        Call("f", {"x": "}"})
    ]


def test_arguments_as_a_json_string_are_unwrapped() -> None:
    assert parse_hermes(
        '<tool_call>{"name": "f", "arguments": "{\\"code\\": \\"print(1)\\"}"}</tool_call>'
    ) == [Call("f", {"code": "print(1)"})]


def test_closing_tag_inside_a_string_is_text() -> None:
    body = json.dumps({"name": "f", "arguments": {"code": "print('</tool_call><tool_call>')"}})
    assert parse_hermes(f"<tool_call>{body}</tool_call>") == [
        Call("f", {"code": "print('</tool_call><tool_call>')"})
    ]


@pytest.mark.parametrize(
    "body",
    [
        "{'name': 'f'}",
        '{"name": "f", "arguments": {"x": 1}',
        "",
        "[1, 2]",
        '{"arguments": {}}',
        '{"name": 3}',
        '{"name": "f"} and more',
        "[" * 100_000,
        '{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}",
        "\x00",
    ],
)
def test_what_can_not_be_understood_is_one_problem(body: str) -> None:
    calls = parse_hermes(f"<tool_call>{body}</tool_call>")
    assert len(calls) == 1 and calls[0].problem is not None and len(calls[0].problem) < 300


def test_a_bad_call_does_not_hide_the_next() -> None:
    calls = parse_hermes('<tool_call>{oops}</tool_call><tool_call>{"name": "f"}</tool_call>')
    assert [call.problem is None for call in calls] == [False, True]


def test_code_blocks() -> None:
    assert parse_code_block("Look:\n```python\nprint(1)\n```\nand ```py\nx = 2\n```", [SCHEMA]) == [
        Call("code_interpreter", {"code": "print(1)\n"}),
        Call("code_interpreter", {"code": "x = 2\n"}),
    ]
    assert parse_code_block("```json\n{}\n```\n```\nplain\n```", [SCHEMA]) == []
    assert parse_code_block("```python\nprint(1)", [SCHEMA]) == [
        Call("code_interpreter", {"code": "print(1)"})
    ]


def test_retool_elements() -> None:
    assert parse_retool("<code>\nprint(1)\n</code>", [SCHEMA]) == [
        Call("code_interpreter", {"code": "print(1)"})
    ]
    assert parse_retool("<code>\n```python\nprint(1)\n```\n</code>", [SCHEMA]) == [
        Call("code_interpreter", {"code": "print(1)"})
    ]
    assert parse_retool("no code, <code></code>", [SCHEMA]) == []


def test_the_tool_that_takes_code() -> None:
    python = {
        "type": "function",
        "function": {
            "name": "python",
            "parameters": {"properties": {"source": {}}, "required": ["source"]},
        },
    }
    assert code_tool([SCHEMA, python]) == ("code_interpreter", "code")
    assert code_tool([LOOKUP, python]) == ("python", "source")


def test_check_says_what_is_wrong() -> None:
    assert check(Call("code_interpreter", {"code": "1"}), [SCHEMA]) is None
    assert (
        check(Call("calculator", {}), [SCHEMA])
        == "there is no tool 'calculator'; there is code_interpreter."
    )
    assert check(Call("lookup", {"key": 1}), [LOOKUP]) == "lookup needs the argument place."
    assert (
        check(Call("lookup", "Rome"), [LOOKUP])
        == "the arguments of lookup must be a JSON object, not str."
    )
    assert check(Call("", {}, "broken"), [SCHEMA]) == "broken"


def call_of(name: str) -> str:
    return f'<tool_call>{{"name": "{name}"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "tagged", "opened"),
    [
        (f"<think>{call_of('draft')}</think>{call_of('f')}", ["f"], ["f"]),
        (f"{call_of('draft')}</think>\n{call_of('f')}", ["draft", "f"], ["f"]),
        (f"<think>never closed {call_of('draft')}", [], []),
        (f"{call_of('draft')} never closed", ["draft"], []),
        (
            f"</think>{call_of('f')}<think>{call_of('draft')}</think>{call_of('g')}",
            ["f", "g"],
            ["f", "g"],
        ),
        (
            '</think><tool_call>{"name": "f", "arguments": {"code": "<think>"}}</tool_call>'
            + call_of("g"),
            ["f", "g"],
            ["f", "g"],
        ),
    ],
)
def test_what_is_only_thought_is_not_called(
    text: str, tagged: list[str], opened: list[str]
) -> None:
    assert [call.name for call in parse_hermes(text, reasoning="tagged")] == tagged
    assert [call.name for call in parse_hermes(text, reasoning="opened")] == opened
    assert {call.name for call in parse_hermes(text)} == {
        name for name in ("draft", "f", "g") if f'"{name}"' in text
    }


def test_code_that_is_only_thought() -> None:
    text = "<think>```python\ndraft\n```</think>```python\nprint(1)\n```"
    assert parse_code_block(text, [SCHEMA], reasoning="tagged") == [
        Call("code_interpreter", {"code": "print(1)\n"})
    ]
    assert len(parse_code_block(text, [SCHEMA])) == 2
    inside = "<think>so <code>print(1)</code> it is</think>"
    assert (
        parse_retool(inside, [SCHEMA], reasoning="tagged")
        == parse_retool(inside, [SCHEMA], reasoning="opened")
        != []
    )


@pytest.mark.parametrize(
    ("form", "piece"),
    [
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", call_of("f")),
        ("code_block", "```python\nx\n```\n"),
        ("retool", "<code>x</code>"),
    ],
)
def test_a_flood_of_calls_is_cut(form: str, piece: str) -> None:
    begin = time.process_time()
    calls = read_calls(FORMATS[form], piece * 7_000, [SCHEMA])
    assert time.process_time() - begin < 0.5
    assert len(calls) == MAX_CALLS_READ + 1 and "at most 32 calls" in str(calls[-1].problem)
    assert len(read_calls(FORMATS[form], piece * 40, [SCHEMA], most=50)) == 40
