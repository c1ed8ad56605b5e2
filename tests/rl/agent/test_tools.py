"""The tool config file, and what the model reads about a call."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retool.rl.agent.tools import FunctionTool, load, state
from retool.rl.agent.tools.function import text_of
from retool.rl.agent.tools.interpreter import (
    SCHEMA,
    CodeInterpreter,
    InterpreterConfig,
    node_of,
    result_text,
)
from retool.rl.agent.tools.load import INTERPRETERS, RunLimits, close_tools, load_tools
from retool.rl.agent.tools.protocol import Tool, ToolResult, function_of
from retool.rl.agent.tools.state import run_alone
from retool.rl.agent.tools.trajectory_tool import result_of
from retool.sandbox import Result, Sandbox

RECIPE = """
tools:
  - class_name: {class_name}
    config: {{type: native, {address}num_workers: 2, enable_global_rate_limit: true, rate_limit: 128, default_timeout: 20, default_language: python, memory_limit_mb: 512}}
    tool_schema: {{type: function, function: {{name: code_interpreter, description: A tool for executing code., parameters: {{type: object, properties: {{code: {{type: string, description: The code to execute.}}}}, required: [code]}}}}}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tools.yaml"
    path.write_text(text)
    return path


def call_and_close(tool: Tool, *arguments: dict) -> list[ToolResult]:
    async def main() -> list[ToolResult]:
        try:
            return list(await asyncio.gather(*(tool.call(one) for one in arguments)))
        finally:
            await tool.close()

    return asyncio.run(main())


def test_existing_recipes_load(tmp_path: Path) -> None:
    (tool,) = load_tools(
        write(
            tmp_path,
            RECIPE.format(class_name="recipe.retool.retool.CustomSandboxFusionTool", address=""),
        )
    )
    assert isinstance(tool, CodeInterpreter) and isinstance(tool, Tool)
    assert (tool.name, tool.schema) == ("code_interpreter", SCHEMA)
    assert (tool.config.default_timeout, tool.config.memory_limit_mb) == (20, 512)
    results = call_and_close(
        tool, {"code": "1 + 1"}, {"code": "1/0"}, {"code": ""}, {"text": "1"}, {}, {"code": 5}
    )
    assert [result.status for result in results] == [
        "success",
        "error",
        "success",
        "bad_arguments",
        "bad_arguments",
        "bad_arguments",
    ]
    assert results[0].text == "2" and results[2].text == "[no output]"
    assert results[1].text.endswith("ZeroDivisionError: division by zero")
    assert "'code'" in results[3].text and "text" in results[3].text


@pytest.mark.parametrize("class_name", INTERPRETERS)
def test_every_class_name_and_a_server(class_name: str, tmp_path: Path) -> None:
    """With an address, programs go to the server: one that counts what it is asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            run = {
                "status": "Finished",
                "return_code": 0,
                "stdout": "from afar\n",
                "stderr": "",
                "execution_time": 0.1,
            }
            body = json.dumps({"status": "Success", "message": "", "run_result": run}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f'sandbox_fusion_url: "http://127.0.0.1:{server.server_address[1]}/run_code", '
        (tool,) = load_tools(write(tmp_path, RECIPE.format(class_name=class_name, address=address)))
        (result,) = call_and_close(tool, {"code": "print(1)"})
        server.shutdown()
        thread.join()
    # On a busy machine the answer may take longer than the program says that it ran
    assert replace(result, queue_seconds=0.0) == ToolResult("from afar", "success", 0.1)
    assert (
        asked[0]["code"] == "print(1)"
        and asked[0]["run_timeout"] == 20
        and asked[0]["memory_limit_MB"] == 512
    )


def test_no_file_means_the_embedded_interpreter() -> None:
    (tool,) = load_tools(None)
    assert tool.schema == SCHEMA
    assert call_and_close(tool, {"code": "```python\n6 * 7\n```"})[0].text == "42"


class Echo:
    """A tool of somebody else's, at a dotted path."""

    def __init__(self, config: dict, schema: dict) -> None:
        self.name = "echo"
        self.config = config
        self.schema = schema or {
            "function": {"name": "echo", "parameters": {"properties": {"text": {}}}}
        }

    async def call(self, arguments: dict) -> ToolResult:
        return ToolResult(arguments["text"] + self.config["end"], "success")

    async def close(self) -> None:
        pass


def test_a_tool_of_ones_own(tmp_path: Path) -> None:
    (tool,) = load_tools(
        write(tmp_path, f"tools:\n  - class_name: {__name__}.Echo\n    config: {{end: '!'}}\n")
    )
    assert call_and_close(tool, {"text": "hi"})[0].text == "hi!"


class Clingy(Echo):
    async def close(self) -> None:
        end = self.config["end"]
        if end == "raise":
            raise KeyError("gone")
        if end == "exit":
            sys.exit(3)
        while end == "stay":  # however often it is cancelled
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        await asyncio.sleep(end)


def test_tools_that_do_not_close_are_told_of_and_the_others_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(state, "CLOSE_SECONDS", 0.05)
    closed: list[Tool] = [Clingy({"end": end}, {}) for end in ("raise", "exit", 60, "stay", 0)]
    begin = time.monotonic()
    with pytest.warns(UserWarning) as told:
        run_alone(close_tools(closed))
    assert [str(w.message) for w in told] == [
        "the tool echo did not close: KeyError: 'gone'",
        "the tool echo did not close: SystemExit: 3",
        *["the tool echo did not close: it took longer than 0.05 s"] * 2,
    ]
    assert time.monotonic() < begin + 30


class NoSchema:
    def __init__(self, config: dict, schema: dict | None) -> None:
        self.name = config["name"]

    async def call(self, arguments: dict) -> ToolResult:
        return ToolResult("", "success")


class Waits(Echo):
    def call(self, arguments: dict) -> ToolResult:  # type: ignore[override]
        return ToolResult("", "success")


def exits(config: dict, schema: dict | None) -> Tool:
    sys.exit(0)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (
            "Waits, config: {}}",
            r"tools\[0\].*Waits.call isn't a coroutine function: write 'async def call'",
        ),
        (
            "NoSchema, config: {name: x}}",
            r"tools\[0\].*a NoSchema without schema, close is no tool: give",
        ),
        ("exits}", r"tools\[0\].*can't be made with its config and tool_schema \(SystemExit: 0\)"),
        (
            "Echo, tool_schema: text}",
            r"tools\[0\].*tool_schema is a str .*not a dict: a schema is {type: function",
        ),
        ("Echo, tool_schema: {a: 1}}", r"tools\[0\].*tool_schema.function is missing"),
        (
            "Echo, tool_schema: {function: {parameters: {}}}}",
            r"tools\[0\].*function.name is missing",
        ),
        (
            "Echo, tool_schema: {function: {name: echo, parameters: [1]}}}",
            r"tools\[0\].*function.parameters is a list",
        ),
        (
            "Echo, tool_schema: {function: {name: echo, parameters: {required: text}}}}",
            r"tools\[0\].*parameters.required is a str",
        ),
        (
            "Echo, tool_schema: {function: {name: other}}}",
            r"tools\[0\].*name is 'echo', .*function.name 'other': make them the same",
        ),
        (
            "NoSchema}",
            r"tools\[0\].*can't be made with its config and tool_schema \(KeyError: 'name'\)",
        ),
    ],
)
def test_a_tool_that_is_none_is_told_before_the_run(entry: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        load_tools(write(tmp_path, f"tools: [{{class_name: {__name__}.{entry}]"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tools: []", "expected a list"),
        ("a: 1", "expected a list"),
        ("tools: [3]", r"tools\[0\].*class_name"),
        ("tools: [{class_name: no.such.Tool}]", r"tools\[0\].*no.such.Tool can't be imported"),
        ("tools: [{class_name: nodots}]", "can't be imported"),
        (
            "tools: [{class_name: exits_at_once.Tool}]",
            r"tools\[0\].*exits_at_once.Tool can't be imported \(SystemExit: 0\)",
        ),
        ("tools: [{class_name: x", "can't be read as YAML: .* line 1"),
        ("tools: ${no.such}", "can't be read as YAML: .*no.such"),
        ("3", "can't be read as YAML"),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: 5}]",
            "config is a int, not a mapping",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, tool_schema: {type: function}}]",
            r"tools\[0\].*tool_schema.function is missing",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, tool_schema: [1]}]",
            r"tools\[0\].*tool_schema is a list .*not a dict",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {rate_limt: 3}}]",
            "rate_limt.*did you mean 'rate_limit'",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {type: mcp}}]",
            "type='mcp'",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {default_language: cpp}}]",
            "default_language='cpp'",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {num_workers: 0}}]",
            "num_workers=0",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {memory_limit_mb: lots}}]",
            "memory_limit_mb='lots'",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {sandbox_fusion_url: localhost}}]",
            "http address",
        ),
        (
            "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {isolation: none}}]",
            "strict",
        ),
    ],
)
def test_faults_in_the_file_are_named(
    text: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=named) as error:
        load_tools(write(tmp_path, text))
    assert "tools.yaml" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't exist"):
        load_tools(tmp_path / "none.yaml")


def test_a_schema_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be written as JSON"):
        function_of({"function": {"name": "x", "more": object()}})


def test_a_schema_with_two_arguments_is_refused() -> None:
    two = {
        "function": {
            "name": "x",
            "parameters": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
        }
    }
    with pytest.raises(ValueError, match="one argument"):
        CodeInterpreter(InterpreterConfig(sandbox_fusion_url="http://localhost:1"), two)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result("success", "2\n", stdout_bytes=2), "2"),
        (Result("success", "\n\n", stdout_bytes=2), "[no output]"),
        (Result("success"), "[no output]"),
        (Result("success", "out\n", "warning\n", stdout_bytes=4), "out\nwarning"),
        (Result("error", "out\n", "Traceback\nE: x\n", 1, stdout_bytes=4), "out\nTraceback\nE: x"),
        (Result("error", return_code=3), "[the program ended with return code 3]"),
        (
            Result("error", return_code=-11, reason="killed by SIGSEGV"),
            "[the program ended with return code -11, killed by SIGSEGV]",
        ),
        (
            Result(
                "timeout", "so far\n", reason="the program ran longer than 30 s", stdout_bytes=7
            ),
            "so far\nTimeoutError: the program ran longer than 30 s",
        ),
        (
            Result("memory_limit", reason="the call used more than 1024 MB"),
            "MemoryError: the call used more than 1024 MB",
        ),
        (
            Result("output_limit", "xx", reason="flood", stdout_bytes=10),
            "xx\n[8 more bytes of output]\nOutputLimitError: flood",
        ),
        (Result("process_limit", reason="many"), "ProcessLimitError: many"),
        (
            Result("sandbox_error", reason="the fork server died"),
            "SandboxError: the fork server died",
        ),
    ],
)
def test_what_the_model_reads(result: Result, text: str) -> None:
    assert result_text(result) == text


def test_only_the_end_of_a_long_stderr_is_shown() -> None:
    text = result_text(Result("error", stderr="\n".join(map(str, range(100))), return_code=1))
    assert text.splitlines() == ["[…]", *map(str, range(88, 100))]


def test_the_three_silences_differ() -> None:
    texts = {
        result_text(Result("success")),
        result_text(Result("timeout", reason="r")),
        result_text(Result("sandbox_error", reason="r")),
    }
    assert len(texts) == 3


def test_ranks_of_a_node_share_a_sandbox() -> None:
    first = {
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "GROUP_RANK": "0",
        "RANK": "0",
    }
    assert node_of(first) == node_of({**first, "RANK": "1"}) != ""
    assert node_of(first) != node_of({**first, "GROUP_RANK": "1"}) and node_of(first) != node_of(
        {**first, "MASTER_PORT": "2"}
    )
    assert node_of({}) == node_of({"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "4"}) == ""


def test_one_supervisor_for_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(os.getpid()),
    }.items():
        monkeypatch.setenv(key, value)
    ranks = [CodeInterpreter(), CodeInterpreter()]
    try:
        backends = [rank._backend for rank in ranks]
        assert all(isinstance(backend, Sandbox) for backend in backends)
        assert backends[0].pid == backends[1].pid  # type: ignore[union-attr]
    finally:
        for rank in reversed(ranks):
            asyncio.run(rank.close())


def test_isolation_of_the_run_goes_before_the_tools(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "tools:\n  - class_name: retool.rl.agent.tools.CodeInterpreter\n    config: {workers: 1}\n",
    )
    (tool,) = load_tools(path, RunLimits(isolation="best_effort"))
    assert isinstance(tool, CodeInterpreter) and tool.config.isolation == "best_effort"
    asyncio.run(tool.close())


def lines(count: int) -> Iterator[str]:
    """Counts.

    Args:
        count: How far.
    """
    for number in range(count):
        yield f"line {number}"


async def later(count: int) -> AsyncIterator[dict[str, int]]:
    """Counts.

    Args:
        count: How far.
    """
    for number in range(count):
        await asyncio.sleep(0)
        yield {"n": number}


def endless() -> Iterator[str]:
    """Never ends."""
    while True:
        yield "x" * 1000


def test_generators_are_tools() -> None:
    (one,) = call_and_close(FunctionTool(lines), {"count": 3})
    assert one == ToolResult("line 0\nline 1\nline 2", "success")
    (one,) = call_and_close(FunctionTool(later), {"count": 2})
    assert one.text == '{"n": 0}\n{"n": 1}'
    (one,) = call_and_close(FunctionTool(endless), {})
    assert 1_000_000 < len(one.text) < 1_010_000


class Labelled:
    """As a series of pandas': its list lacks what Python shows."""

    def tolist(self) -> list[int]:
        return [2, 3]

    def __str__(self) -> str:
        return "north 2, south 3"


def test_what_a_function_returns_is_text_or_json_or_what_python_shows() -> None:
    circular: list[Any] = []
    circular.append(circular)
    for value, text in (
        ("é", "é"),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        (None, "null"),
        ({"price": np.float32(2.5), "ids": np.arange(2)}, '{"price": 2.5, "ids": [0, 1]}'),
        (torch.ones(2, 1), "[[1.0], [1.0]]"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (circular, "[[...]]"),
        (Path("a"), '"a"'),
        (Labelled(), '"north 2, south 3"'),
    ):
        assert text_of(value) == text


def test_a_tool_with_a_state_may_give_numpy_s_numbers_and_says_whether_it_is_over() -> None:
    found = result_of(("on", np.float32(0.5), np.bool_(True)))
    assert (found.reward, found.done) == (0.5, True)
    assert result_of(("on", None, np.ones(2)[1])).done is True
    assert ToolResult("on", "success", reward=np.float32(0.5)).reward == 0.5
    with pytest.raises(TypeError, match="a call returned done='no': give true or false"):
        result_of(("on", 1.0, "no"))
