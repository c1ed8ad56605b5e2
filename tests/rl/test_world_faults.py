"""Runs on two ranks whose tools' servers die: they go on, nothing is dropped silently, and a killed
run goes on bit for bit where its tools are deterministic.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retool.data.render.renderer import Renderer
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import make_mesh
from retool.rl.agent.environments.play import Worlds
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools.given import as_tool
from retool.rl.agent.tools.load import close_tools
from retool.rl.agent.tools.mcp import Connection, McpServer, McpTool
from retool.rl.metrics import tool_metrics
from retool.rl.types import Stop
from tests import warm
from tests.ranks import run_ranks
from tests.rl.agent.test_rollout import parts_of, prompt_of
from tests.rl.agent.worlds import Digits
from tests.rl.killed import kill_in_mid_step, told
from tests.rl.test_command import ARR, TORCHRUN, steps, words

SERVER = Path(__file__).parent / "agent" / "dying_server.py"
ANSWERS = 16  # of a step

# Whatever the model writes is a call, so that a run of a random model calls as often as it may.
ALWAYS = """
from retool.rl.agent.reading.call import Call


def always(text, tools):
    return [Call(tool["function"]["name"], {}) for tool in tools[:1]]
"""

# What it draws depends on the question and the answer alone, and what it gives on its calls so far.
DRAWS = """
import random

SCHEMA = {"type": "function", "function": {"name": "draw", "description": "Draws a card.",
    "parameters": {"type": "object", "properties": {}}}}


class Cards:
    schema = SCHEMA

    def open(self, row):
        return {"draws": random.Random(f"{row['index']}/{row['sample']}"), "sum": 0}

    def call(self, state, arguments):
        state["sum"] += state["draws"].randint(1, 10)
        return f"{state['sum']} so far", state["sum"] / 10, state["sum"] > 15

    def close(self, state):
        return state["sum"] / 100
"""


def schema_of(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": "Of a test.", "parameters": parameters}
    return {"type": "function", "function": function}


def asks(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'


def calling(work: Path, out: Path, folder: Path, *more: str) -> list[str]:
    """A small run in which every turn calls."""
    file = folder / "always.py"
    file.write_text(ALWAYS)
    return [
        *words(work, out),
        "data.max_response_length=300",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.format={file}/always",
        f"{ARR}rollout.multi_turn.max_assistant_turns=3",
        f"{ARR}rollout.max_lost_share=1.0",
        *more,
    ]


def server_file(folder: Path, connection: str, *more: str, **keys: Any) -> str:
    """A file of tools with a server, which is started with `more`."""
    entry = {
        "command": sys.executable,
        "args": [str(SERVER), *more],
        "connection": connection,
        **keys,
    }
    file = folder / "tools.yaml"
    file.write_text(json.dumps({"tools": [{"mcp": entry}]}))
    return f"{ARR}rollout.multi_turn.tool_config_path={file}"


def all_counted(entries: list[dict[str, Any]]) -> float:
    """How many answers were lost, of steps in which every answer ended in a way that is counted."""
    for entry in entries:
        ended = {stop: entry[f"stop/{stop.value}"] for stop in Stop}
        assert sum(ended.values()) == ANSWERS, ended
    return sum(entry["stop/infrastructure"] for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["trajectory", "shared"])
def test_mcp_servers_that_are_killed_in_the_middle(work, tmp_path, connection) -> None:
    pytest.importorskip("mcp", reason="the extra mcp isn't installed")
    log = tmp_path / "calls"
    log.touch()
    tools = server_file(tmp_path, connection, str(log), "3")
    more = [tools, "trainer.total_training_steps=2"]
    command = [*TORCHRUN, *calling(work, tmp_path / "run", tmp_path, *more)]
    done = warm.run(command, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = steps(tmp_path / "run")
    lost = all_counted(found)
    lines = [line.split() for line in log.read_text().splitlines()]
    happened = Counter(what for what, _ in lines)
    assert len(found) == 2 and happened["died"] >= 2
    if connection == "trajectory":
        assert lost == happened["died"], "each death costs the answer whose server it was"
    else:  # whoever waits for the same server loses its answer, too
        assert happened["died"] <= lost < 2 * ANSWERS
    assert "is away" in done.stderr
    left = [pid for _, pid in lines if Path(f"/proc/{pid}").exists()]
    assert not left, "no server outlives the run"


class Pipe:
    """What `mcp` connects with, to a server of one tool. The third call of a process breaks it."""

    calls = 0

    def __init__(self) -> None:
        self.broken = False

    async def __aenter__(self) -> Pipe:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def call_tool(self, name: str, arguments: Any) -> SimpleNamespace:
        Pipe.calls += 1
        self.broken = self.broken or Pipe.calls == 3
        await self.list_tools()
        return SimpleNamespace(content=[SimpleNamespace(text="counted")], is_error=False)

    async def list_tools(self, **more: Any) -> None:
        if self.broken:
            raise ConnectionResetError("the pipe is closed")


class Flaky:
    """Breaks in another way for each of the four answers to a question."""

    schema = schema_of("flaky")

    def open(self, row: Any) -> int:
        if row["sample"] == 0:
            raise OSError("no room for another")
        return row["sample"]

    async def call(self, sample: int, arguments: Any) -> str:
        if sample == 1:
            raise RuntimeError("broken")
        if sample == 3:
            await asyncio.sleep(600)
        return "fine"

    def close(self, sample: int) -> None:
        if sample == 2:
            raise ValueError("it is stuck")


def _sampled_in_a_rank(renderer: Renderer) -> list[dict[str, float]]:
    """What all ranks together count of a step with tools that break, and of one in worlds."""
    mesh = make_mesh(device="cpu")
    server = McpServer(command="a server")
    tools = [
        as_tool(Flaky()),
        McpTool(server, Connection(server), schema_of("count")),
    ]
    begin = {0: "flaky", 1: "flaky", 2: "count", 3: "count"}
    script = {index: [asks(name), asks(name), "42"] for index, name in begin.items()}
    parts, engine = parts_of(renderer, script)
    agent = replace(parts.agent, tool_timeout_seconds=0.5)
    calling = replace(parts, agent=agent, tools={tool.name: tool for tool in tools})
    worlds = Worlds(partial(Digits, broken="step", hangs=True), 1.0, 600)
    engine.any_group = True  # worlds make prompts of their own
    mine = [
        (prompt_of(renderer, index), answer)
        for index in range(mesh.rank, 4, mesh.world)
        for answer in range(4)
    ]
    loop = asyncio.new_event_loop()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(McpServer, "client", lambda self: Pipe())
        for each in (calling, replace(parts, worlds=worlds)):
            scored = loop.run_until_complete(roll_out(each, mine, Sampling(), 0))
            everyone = gather_objects(scored, mesh.world_group)
            found.append(tool_metrics([member for part in everyone for member in part]))
        loop.run_until_complete(close_tools(tools))
    return found


def test_two_ranks_count_all_that_breaks_in_tools_and_worlds(renderer_of) -> None:
    """The same counts on both: of tools that break in each of their calls, of an MCP server that
    breaks off in mid-step, of worlds that raise and that hang.
    """
    one, other = run_ranks(_sampled_in_a_rank, 2, renderer_of("hermes"))
    of_tools, of_worlds = one
    told = ("tool/failed_opens", "tool/failed_calls", "tool/failed_closes", "tool/timeouts")
    assert [of_tools[name] for name in told] == [2, 6, 2, 4]
    # Two didn't open, and on each rank a server's pipe broke under one, which is a failed call, too
    assert of_tools["stop/infrastructure"] == 4 and of_tools["stop/no_call"] == 12
    assert of_worlds["stop/infrastructure"] == 8 and of_worlds["stop/done"] == 8
    for counts, again in zip(one, other, strict=True):
        assert sum(counts[f"stop/{stop.value}"] for stop in Stop) == ANSWERS
        assert counts == again


@pytest.mark.slow
def test_killed_in_mid_step_a_run_with_tools_that_remember_goes_on_bit_for_bit(
    work, tmp_path
) -> None:
    file = tmp_path / "cards.py"
    file.write_text(DRAWS)
    common = [
        f"{ARR}rollout.multi_turn.tools=[{file}/Cards]",
        "trainer.deterministic=true",
        "trainer.total_training_steps=4",
        "trainer.save_freq=1",
    ]
    whole = [*TORCHRUN, *calling(work, tmp_path / "whole", tmp_path, *common)]
    subprocess.run(whole, check=True, capture_output=True, timeout=170)
    out = tmp_path / "killed"
    command = [*TORCHRUN, *calling(work, out, tmp_path, *common)]
    kill_in_mid_step(command, out, (1, 3))
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    whole_run, killed_run = (
        told(tmp_path / folder, "tool/latency") for folder in ("whole", "killed")
    )
    assert len(whole_run) == 4 and whole_run == killed_run
    assert all(entry["tool/calls"] > 0 for entry in whole_run)
    shards = [
        sorted((tmp_path / folder / "global_step_4").rglob("*rank_*.pt"))
        for folder in ("whole", "killed")
    ]
    assert len(shards[0]) >= 2
    for one, other in zip(*shards, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes(), one.name
