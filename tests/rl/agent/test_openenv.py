"""Environments of OpenEnv with a scripted model: in this process, and over a loopback's server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from retool.rl.agent.environments.load import find_environment
from retool.rl.agent.environments.openenv.interface import Interface, name_of_tool
from retool.rl.types import Stop
from tests.ranks import free_port
from tests.rl.agent.test_loop import say
from tests.rl.agent.test_verifiers import BORROWED, call, played, same_as_training

LIGHTS = str(BORROWED / "openenv_lights.py")
ROW = {
    "data_source": "lights",
    "prompt": [{"role": "user", "content": "Switch them on."}],
    "reward_model": {"ground_truth": ""},
}
ALL_ON = [call("press", light=0), call("press", light=1) + call("press", light=2)]


@pytest.fixture
def openenv() -> None:
    pytest.importorskip("openenv.core", reason="needs retool-train[openenv]")


def made(name: str, **kwargs: Any):
    source = find_environment(None, f"openenv:{name}", kwargs)
    assert source is not None
    return source.load()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server of lights, and its process."""
    pytest.importorskip("openenv.core", reason="needs retool-train[openenv]")
    port = free_port()
    process = subprocess.Popen([sys.executable, LIGHTS, str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()


def test_what_an_observation_shows_and_a_tool_is_called() -> None:
    plain = Interface({})
    assert plain.shown({"board": "x.o", "hint": ""}) == "x.o"
    assert plain.shown({"board": "x.o", "moves": [1, 2]}) == '{"board": "x.o", "moves": [1, 2]}'
    assert plain.shown({"left": 3}) == '{"left": 3}' and plain.shown({"hint": None}) == ""
    names = ["PlaceBetAction", "CodeAction", "Action", "Move"]
    assert [*map(name_of_tool, names)] == ["place_bet", "code", "act", "move"]


def test_without_the_package_it_is_told_how_to_get_it() -> None:
    with pytest.raises(ValueError, match="unknown key 'txet' of kwargs; did you mean 'text'"):
        made(LIGHTS, txet="light")
    try:
        import openenv.core  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'retool-train\[openenv\]'"):
            made(LIGHTS)


def check_lights(renderer, make) -> None:
    """Calls of its tool are steps; what doesn't fit is told, and no step."""
    wrong = call("press", light=7)
    texts = [ALL_ON[0], wrong, ALL_ON[1]]
    trajectory, model = played(renderer, make, ROW, [say(renderer, text) for text in texts])
    assert trajectory.stop is Stop.DONE, trajectory.tool_failure
    assert trajectory.turn_rewards == (1.0, 0.0, 2.0)
    first = trajectory.prompt.messages[-1]["content"]
    assert first == "Switch them on.\n\noff off off"
    assert trajectory.messages[1]["content"] == "on off off"
    told = renderer.tokenizer.decode(model.asked[2][0])
    assert "error: " in told
    (tool,) = trajectory.prompt.tools
    assert tool["function"]["description"] == "Presses a light's button."
    assert set(tool["function"]["parameters"]["properties"]) == {"light"}
    # A turn without a call is the last
    trajectory, _ = played(renderer, make, ROW, [say(renderer, "I give up.")])
    assert trajectory.stop is Stop.DONE and trajectory.turn_rewards == (0.0,)
    # What breaks there is nobody's reward
    broken = {**ROW, "extra_info": {"reset": {"broken": "a fuse"}}}
    trajectory, _ = played(renderer, make, broken, [say(renderer, ALL_ON[0])])
    assert trajectory.stop is Stop.INFRASTRUCTURE and "a fuse" in trajectory.tool_failure


def test_an_environment_runs_in_this_process(renderer_of, openenv) -> None:
    renderer = renderer_of("hermes")
    check_lights(renderer, made(LIGHTS + "/LightsEnvironment"))
    # With a user's functions there is no tool, and what was sampled is what training renders
    maps = str(BORROWED / "openenv_maps.py")
    functions = {"to_action": f"{maps}/pressed", "to_messages": f"{maps}/said"}
    make = made(LIGHTS + "/LightsEnvironment", make={"dark": 2}, **functions)
    plain = renderer_of("chatml")
    turns = [say(plain, text) for text in ("2", "0 and 1")]
    trajectory, _ = played(plain, make, ROW, turns)
    assert trajectory.stop is Stop.DONE and sum(trajectory.turn_rewards) in (1.5, 2.0)
    begins = trajectory.prompt.messages
    said = [*begins, {"role": "assistant", "content": "2"}, trajectory.messages[1]]
    assert begins[-1]["content"].startswith("Switch them on.\n\nThe lights are ")
    assert said[-1]["content"].startswith("The lights are ")
    whole = [*said, {"role": "assistant", "content": "0 and 1"}]
    assert same_as_training(plain, trajectory, whole, None)
    with pytest.raises(ValueError, match="SUPPORTS_CONCURRENT_SESSIONS = True"):
        made(LIGHTS + "/OneAtATime")
    with pytest.raises(ValueError, match="the action has"):
        made(LIGHTS + "/LightsEnvironment", text="words")
    with pytest.raises(ValueError, match="a client: it needs one"):
        made(LIGHTS + "/LightsClient")


def test_tools_of_mcp_are_listed_and_called(renderer_of, openenv) -> None:
    renderer = renderer_of("hermes")
    turns = [say(renderer, call("echo", words="on")), say(renderer, "Done.")]
    trajectory, _ = played(renderer, made(LIGHTS + "/Echo"), ROW, turns)
    assert trajectory.stop is Stop.DONE, trajectory.tool_failure
    assert trajectory.messages[1]["content"] == "ON"
    assert [tool["function"]["name"] for tool in trajectory.prompt.tools] == ["echo"]


@pytest.mark.slow
def test_a_server_is_spoken_to(renderer_of, server) -> None:
    address, process = server
    renderer = renderer_of("hermes")
    make = made(address, tool="press")
    check_lights(renderer, make)
    check_lights(renderer, made(LIGHTS + "/LightsClient", base_url=address))
    # One that is away loses the trajectory, and is a fault of a run that is to begin
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trajectory, _ = played(renderer, make, ROW, [say(renderer, ALL_ON[0])])
    assert trajectory.stop is Stop.INFRASTRUCTURE
    assert "environment.reset: ConnectionError" in trajectory.tool_failure
    with pytest.raises(ValueError, match="no OpenEnv server answers at"):
        made(address)
