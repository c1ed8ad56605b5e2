"""MCP servers as tools: what they list, what they answer, and what happens when they die."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools.load import close_tools, load_tools
from retool.rl.agent.tools.mcp import McpServer, McpTrajectoryTool, mcp_tools, read_server
from retool.rl.types import Stop
from tests.rl.agent.test_rollout import parts_of, prompt_of

pytest.importorskip("mcp", reason="the extra mcp isn't installed")
SERVER = Path(__file__).parent / "mcp_server.py"
STDIO = McpServer(command=sys.executable, args=(str(SERVER),))


@pytest.fixture
def inside(monkeypatch) -> McpServer:
    """A server in this process, which each connection has by itself."""
    from mcp import Client

    from tests.rl.agent.mcp_server import make

    monkeypatch.setattr(McpServer, "client", lambda self: Client(make()))
    return STDIO


def called(name: str, **arguments: object) -> str:
    import json

    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def answered(renderer, tools, script, samples=1, **options):
    """What each trajectory of a rollout shows between its turns, and how it ended."""
    parts, _ = parts_of(renderer, {0: script})
    agent = replace(parts.agent, max_response_length=2000, **options)
    parts = replace(parts, tools={tool.name: tool for tool in tools}, agent=agent)

    async def run():
        try:
            requests = [(prompt_of(renderer, 0), k) for k in range(samples)]
            return await roll_out(parts, requests, Sampling(), 0)
        finally:
            await close_tools(tools)

    found = [member.trajectory for member in asyncio.run(run())]
    shown = [renderer.tokenizer.decode(entry.tokens[~entry.mask]) for entry in found]
    return [
        re.findall(r"<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL) for text in shown
    ], found


def test_a_server_s_tools_are_listed_and_called(inside, renderer_of) -> None:
    tools = mcp_tools(inside)
    assert [tool.name for tool in tools] == ["add", "keep", "fail", "die", "sleep"]
    function = tools[0].schema["function"]
    assert function["description"] == "Adds two numbers."
    assert function["parameters"]["required"] == ["first", "second"]
    script = [
        called("add", first=2, second=40),
        called("fail", reason="no"),
        called("add", first="x", second=1),
        "42",
    ]
    (shown,), (trajectory,) = answered(renderer_of("hermes"), tools, script)
    assert shown[0] == "42" and "Error executing tool fail" in shown[1]
    assert "valid integer" in shown[2]
    assert (trajectory.tool_calls, trajectory.tool_errors) == (3, 2)
    assert trajectory.stop is Stop.NO_CALL
    (tool,) = mcp_tools(replace(inside, tools=("keep",)))
    assert tool.name == "keep"
    with pytest.raises(ValueError, match="has no multiply; it has add, keep"):
        mcp_tools(replace(inside, tools=("add", "multiply")))


def test_a_connection_is_shared_or_a_trajectory_s_own(inside, renderer_of) -> None:
    renderer = renderer_of("hermes")
    script = [called("keep", number=1), called("keep", number=2), "done"]
    shown, _ = answered(renderer, mcp_tools(inside), script, samples=2)
    texts = sorted((text for texts in shown for text in texts), key=len)
    # In whatever order the two trajectories came
    assert [len(text.split()) for text in texts] == [1, 2, 3, 4]
    assert all(texts[-1].startswith(text) for text in texts)
    assert sorted(texts[-1].split()) == ["1", "1", "2", "2"]
    tools = mcp_tools(replace(inside, connection="trajectory"))
    assert all(isinstance(tool, McpTrajectoryTool) for tool in tools)
    shown, _ = answered(renderer, tools, script, samples=2)
    assert shown == [["1", "1 2"]] * 2
    assert not tools[0]._connections._open, "each is closed with its trajectory"


def test_servers_that_can_t_be_are_told_of(tmp_path) -> None:
    wrong = {
        "needs a command, or a url": {},
        "did you mean 'command'": {"comand": "x"},
        "connection=own: use shared or trajectory": {"command": "x", "connection": "own"},
    }
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            read_server(given)
    file = tmp_path / "tools.yaml"
    file.write_text("tools: [{mcp: {command: /nowhere/server}}]")
    with pytest.raises(
        ValueError, match=r"tools\[0\]: the MCP server /nowhere/server can't be reached"
    ):
        load_tools(file)


# --- real servers ---


@pytest.mark.slow
def test_a_server_that_is_started_and_killed(renderer_of, tmp_path) -> None:
    """The call that it dies of loses its trajectory, and the next one has another process."""
    file = tmp_path / "tools.yaml"
    file.write_text(f"tools: [{{mcp: {{command: {sys.executable}, args: [{SERVER}]}}}}]")
    renderer = renderer_of("hermes")
    tools = load_tools(file)

    async def run():
        by_name = {tool.name: tool for tool in tools}
        try:
            first = await by_name["keep"].call({"number": 1})
            with pytest.raises(ConnectionError, match="is away"):
                await by_name["die"].call({})
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            second = await by_name["keep"].call({"number": 2})
            (pid,) = [
                int(each)
                for each in children.read_text().split()
                if str(SERVER) in Path(f"/proc/{each}/cmdline").read_text()
            ]
            sleeping = asyncio.create_task(by_name["sleep"].call({"seconds": 60}))
            await asyncio.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionError, match="is away"):
                await asyncio.wait_for(sleeping, 20)
            third = await by_name["keep"].call({"number": 3})
            return first.text, second.text, third.text
        finally:
            await close_tools(tools)

    assert asyncio.run(run()) == ("1", "2", "3")
    tools = load_tools(file)
    begin = time.perf_counter()
    script = [called("die"), "42"]
    _, (trajectory,) = answered(renderer, tools, script)
    assert trajectory.stop is Stop.INFRASTRUCTURE and "is away" in trajectory.tool_failure
    assert time.perf_counter() - begin < 30


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["shared", "trajectory"])
def test_a_server_over_http_that_goes_away_and_comes_back(renderer_of, connection) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), str(port)]
    server = McpServer(url=f"http://127.0.0.1:{port}/mcp", connection=connection)
    renderer = renderer_of("hermes")
    process = started(command, port)
    try:
        tools = mcp_tools(server)
        script = [called("add", first=1, second=2), called("add", first=3, second=4), "7"]
        shown, _ = answered(renderer, tools, script, samples=3)
        assert shown == [["3", "7"]] * 3
        process.kill()
        process.wait()
        _, gone = answered(renderer, mcp_again(server, tools), script, samples=2)
        assert all(entry.stop is Stop.INFRASTRUCTURE for entry in gone)
        assert "can't be reached" in gone[0].tool_failure
        process = started(command, port)
        shown, _ = answered(renderer, mcp_again(server, tools), script)
        assert shown == [["3", "7"]]
    finally:
        process.kill()
        process.wait()


def mcp_again(server: McpServer, tools):
    """The same tools with connections of their own, as the next run has them."""
    return [
        type(tool)(
            server,
            type(vars(tool).get("_connection", vars(tool).get("_connections")))(server),
            tool.schema,
        )
        for tool in tools
    ]


def started(command: list[str], port: int) -> subprocess.Popen:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the server doesn't listen")
