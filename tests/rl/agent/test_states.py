"""Tools that keep a state for each trajectory: what they are told, what they give, and that a state
is closed once on every way in which a trajectory can end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retool.rl.agent.environments.play import Attempt, Worlds, run_in_world
from retool.rl.agent.episode import Episode
from retool.rl.agent.loop import play
from retool.rl.agent.options import Agent
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools import state as state_module
from retool.rl.agent.tools.given import as_tool
from retool.rl.agent.tools.load import load_tools, make_tools
from retool.rl.agent.tools.protocol import ToolResult, keeps_state
from retool.rl.metrics import tool_metrics
from retool.rl.reward.foreign import own_copy
from retool.rl.types import Scored, Stop
from tests.data.conftest import TOOLS
from tests.rl.agent.test_environments import Told, played
from tests.rl.agent.test_loop import OPTIONS, Scripted, call_text, episode, prompt_of, say
from tests.rl.agent.test_rollout import called, parts_of
from tests.rl.agent.test_rollout import prompt_of as asked

NAME = "calculator"


@dataclass
class Counts:
    """Counts a trajectory's calls. `broken` says what goes wrong: method → what it does first."""

    broken: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] = field(default_factory=lambda: TOOLS[0])
    opened: list[Any] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    answer: Any = None

    async def _break(self, method: str) -> None:
        fault = self.broken.get(method)
        if isinstance(fault, (int, float)):
            await asyncio.sleep(fault)
        elif fault is not None:
            raise fault

    async def open(self, row):
        await self._break("open")
        self.rows.append(row)
        state = {"calls": 0, "number": len(self.opened)}
        self.opened.append(state)
        return state

    async def call(self, state, arguments):
        await self._break("call")
        state["calls"] += 1
        text = f"call {state['calls']} of {state['number']}: {arguments['code']}"
        return text if self.answer is None else (text, *self.answer)

    async def close(self, state):
        self.closed.append(state["number"])
        await self._break("close")
        return float(state["calls"])


def play_out(renderer, row, tool, turns=2, **changes):
    calls = [say(renderer, call_text(str(i))) for i in range(turns)]
    return episode(renderer, row, [*calls, say(renderer, "Done.")], as_tool(tool), **changes)[0]


def said(renderer, trajectory) -> str:
    return renderer.tokenizer.decode(trajectory.tokens[trajectory.prompt_length :])


def test_a_state_lives_as_long_as_its_trajectory(renderer_of, tool_row) -> None:
    renderer = renderer_of("hermes")
    tool = Counts()
    trajectory = play_out(renderer, tool_row, tool)
    text = said(renderer, trajectory)
    assert "call 1 of 0: 0" in text and "call 2 of 0: 1" in text
    assert trajectory.stop is Stop.NO_CALL and tool.closed == [0]
    assert trajectory.tool_scores == {NAME: 2.0} and trajectory.turn_rewards == ()
    (row,) = tool.rows
    assert row["reward_model"] == {"ground_truth": "42"} and row["data_source"] == "rows"
    assert row["prompt"][-1]["role"] == "user" and (row["index"], row["sample"]) == (0, 0)


def test_sync_methods_run_off_the_event_loop(renderer_of, tool_row) -> None:
    class Plain:
        schema = TOOLS[0]

        def __init__(self) -> None:
            self.threads = set()
            self.closed = 0

        def open(self, row):
            self.threads.add(threading.current_thread())
            return []

        def call(self, state, arguments):
            self.threads.add(threading.current_thread())
            state.append(arguments["code"])
            return state

        def close(self, state):
            self.threads.add(threading.current_thread())
            self.closed += 1

    tool = Plain()
    trajectory = play_out(renderer_of("hermes"), tool_row, tool)
    assert '["0", "1"]' in said(renderer_of("hermes"), trajectory)
    assert tool.closed == 1 and threading.main_thread() not in tool.threads
    assert trajectory.tool_scores == {}


def test_rewards_go_to_their_turns_and_done_ends_it(renderer_of, tool_row) -> None:
    renderer = renderer_of("hermes")
    given = play_out(renderer, tool_row, Counts(answer=(0.5, False)))
    assert given.turn_rewards == (0.5, 0.5, 0.0) and given.stop is Stop.NO_CALL
    over = Counts(answer=(1, True))
    ended = play_out(renderer, tool_row, over)
    assert ended.stop is Stop.DONE and ended.turn_rewards == (1.0,) and over.closed == [0]
    assert ended.mask[ended.prompt_length :].all(), "nothing is appended that nobody answers"
    assert ended.messages[-1]["content"] == "call 1 of 0: 0"


@pytest.mark.parametrize("answer", [(float("nan"), False), ("much", False), (1.0,)])
def test_a_reward_that_is_none_is_a_failed_call(renderer_of, tool_row, answer) -> None:
    trajectory = play_out(renderer_of("hermes"), tool_row, Counts(answer=answer), turns=1)
    assert trajectory.tool_failed_calls == trajectory.tool_errors == 1
    assert trajectory.turn_rewards == ()


def test_calls_of_a_turn_come_one_after_the_other(renderer_of, tool_row) -> None:
    class Slow(Counts):
        inside = 0

        async def call(self, state, arguments):
            assert not self.inside
            self.inside += 1
            await asyncio.sleep(0.01)
            self.inside -= 1
            return await super().call(state, arguments)

    renderer = renderer_of("hermes")
    turn = say(renderer, "\n".join(call_text(str(i)) for i in range(3)))
    tool = Slow()
    trajectory, _ = episode(renderer, tool_row, [turn, say(renderer, "Done.")], as_tool(tool))
    assert trajectory.tool_failed_calls == 0 and tool.opened == [{"calls": 3, "number": 0}]
    assert "call 3 of 0: 2" in said(renderer, trajectory)


@pytest.mark.parametrize(
    ("broken", "stop", "failed"),
    [
        ({"open": KeyError("no board")}, Stop.INFRASTRUCTURE, (1, 0, 0)),
        ({"open": SystemExit(3)}, Stop.INFRASTRUCTURE, (1, 0, 0)),
        ({"open": 60}, Stop.INFRASTRUCTURE, (1, 0, 0)),
        ({"call": ValueError("no such move")}, Stop.NO_CALL, (0, 2, 0)),
        ({"call": SystemExit(3)}, Stop.NO_CALL, (0, 2, 0)),
        ({"call": ConnectionResetError("gone")}, Stop.INFRASTRUCTURE, (0, 1, 0)),
        ({"close": RuntimeError("stuck")}, Stop.NO_CALL, (0, 0, 1)),
        ({"close": SystemExit(3)}, Stop.NO_CALL, (0, 0, 1)),
        ({"close": 60}, Stop.NO_CALL, (0, 0, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:the tool calculator did not close")
def test_what_breaks_is_counted_and_nothing_hangs(
    renderer_of, tool_row, monkeypatch, broken, stop, failed
) -> None:
    monkeypatch.setattr(state_module, "CLOSE_SECONDS", 0.05)
    tool = Counts(broken)
    begin = time.monotonic()
    trajectory = play_out(renderer_of("hermes"), tool_row, tool, tool_timeout_seconds=0.05)
    assert time.monotonic() - begin < 30
    assert trajectory.stop is stop and tool.closed == [s["number"] for s in tool.opened]
    metrics = tool_metrics([Scored(trajectory, 0.0, 0.0)])
    names = ("tool/failed_opens", "tool/failed_calls", "tool/failed_closes")
    assert tuple(metrics[name] for name in names) == failed
    if stop is Stop.INFRASTRUCTURE:
        assert trajectory.tool_failure.startswith(f"{NAME}: ")


def test_a_call_that_is_given_up_ends_its_state_and_the_next_begins_anew(
    renderer_of, tool_row
) -> None:
    renderer = renderer_of("hermes")

    class Once(Counts):
        async def call(self, state, arguments):
            if state["number"] == 0:
                await asyncio.sleep(60)
            return await super().call(state, arguments)

    tool = Once()
    trajectory = play_out(renderer, tool_row, tool, tool_timeout_seconds=0.05)
    text = said(renderer, trajectory)
    assert "the next call begins anew" in text and "call 1 of 1: 1" in text
    assert tool.closed == [0, 1] and trajectory.tool_timeouts == 1


@pytest.mark.parametrize(
    ("changes", "stop"),
    [({"max_response_length": 70}, Stop.LENGTH), ({"max_assistant_turns": 2}, Stop.MAX_TURNS)],
)
def test_it_is_closed_where_the_trajectory_is_cut(renderer_of, tool_row, changes, stop) -> None:
    tool = Counts()
    trajectory = play_out(renderer_of("hermes"), tool_row, tool, **changes)
    assert trajectory.stop is stop and tool.closed == [0] and len(tool.opened) == 1


@pytest.mark.parametrize("during", ["open", "call", "close", "generate"])
def test_it_is_closed_where_the_trajectory_is_cancelled(renderer_of, tool_row, during) -> None:
    renderer = renderer_of("hermes")
    tool = Counts({during: 0.2})
    model = Scripted([say(renderer, call_text("1")), say(renderer, "Done.")])

    async def generate(ids, max_tokens):
        if model.asked and during == "generate":
            await asyncio.sleep(60)
        return await model(ids, max_tokens)

    async def main():
        agent = Agent({NAME: as_tool(tool)}, renderer, OPTIONS)
        underway = Episode.begin(prompt_of(renderer, tool_row))
        task = asyncio.create_task(play(underway, generate, agent))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.2)

    asyncio.run(main())
    assert Counter(tool.closed) == Counter(s["number"] for s in tool.opened)
    assert len(tool.opened) == (during != "open")


def test_a_state_that_a_thread_makes_too_late_is_closed(renderer_of, tool_row) -> None:
    let_go = threading.Event()
    closed = threading.Event()

    class Late:
        schema = TOOLS[0]

        def open(self, row):
            let_go.wait(10)
            return 1

        def call(self, state, arguments):
            return "never"

        def close(self, state):
            closed.set()

    trajectory = play_out(
        renderer_of("hermes"), tool_row, Late(), turns=1, tool_timeout_seconds=0.05
    )
    assert trajectory.stop is Stop.INFRASTRUCTURE and not closed.is_set()
    let_go.set()
    assert closed.wait(30)


def test_the_stop_of_the_run_closes_all(renderer_of) -> None:
    renderer = renderer_of("hermes")
    tool = Counts({"call": 30}, schema=named("code_interpreter"))
    begin = time.monotonic()
    parts, engine = parts_of(
        renderer,
        {0: [called("1"), "42"], 1: ["42"]},
        as_tool(tool),
        stopped=lambda: time.monotonic() > begin + 0.2,
    )
    requests = [(asked(renderer, i), k) for i in range(2) for k in range(2)]
    assert asyncio.run(roll_out(parts, requests, Sampling(), 0)) is None
    assert time.monotonic() < begin + 20 and not engine.live
    assert sorted(tool.closed) == [0, 1] == [state["number"] for state in tool.opened]


def named(name: str) -> dict[str, Any]:
    function = {**TOOLS[0]["function"], "name": name}
    return {**TOOLS[0], "function": function}


FILE = '''
SCHEMA = {"type": "function", "function": {"name": "adder", "parameters": {
    "type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}}}

class Adder:
    schema = SCHEMA
    def __init__(self, start=0):
        self.start = start
    def open(self, row):
        return [self.start]
    def call(self, state, arguments):
        state[0] += int(arguments["code"])
        return str(state[0]), 1.0, state[0] > 9
    def close(self, state):
        pass

adder = Adder(5)

def double(x: int) -> int:
    """Doubles.

    Args:
        x: A number.
    """
    return 2 * x
'''


def test_a_file_names_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    config = tmp_path / "tools.yaml"
    config.write_text(
        f"tools:\n  - {{class_name: {file}/Adder, config: {{start: 3}}}}\n  - function: {file}/double\n"
    )
    adder, double = load_tools(config)
    assert keeps_state(adder) and not keeps_state(double) and double.name == "double"

    async def two_calls(tool):
        state = await tool.open_state({})
        return [await tool.call_state(state, {"code": "4"}) for _ in range(2)]

    first, second = asyncio.run(two_calls(adder))
    assert first == ToolResult("7", "success", reward=1.0) and second.done
    for name, text in ((f"{file}/adder", "9"), (f"{file}/Adder", "4")):
        (tool,) = load_tools(None, names=[name])
        assert asyncio.run(two_calls(tool))[0].text == text
    assert [tool.name for tool in load_tools(f"{file}/double", names=[f"{file}/adder"])] == [
        "double",
        "adder",
    ]
    with pytest.raises(ValueError, match="tool names must differ"):
        load_tools(config, names=[f"{file}/double"])
    with pytest.raises(ValueError, match=r"mine.py has no 'triple'"):
        load_tools(None, names=[f"{file}/triple"])


def test_a_program_gives_an_object() -> None:
    (tool,) = make_tools([Counts()])
    assert keeps_state(tool) and tool.name == NAME
    with pytest.raises(ValueError, match="tool_schema is missing"):
        make_tools([Counts(schema=None)])  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [None, (1.0, True)])
def test_in_a_world_it_is_closed_too_and_may_end_it(renderer_of, answer) -> None:
    renderer = renderer_of("hermes")
    tool = Counts(answer=answer)
    world = Told([("So?", 0.5, False), ("", 0.0, True)])
    turns = [call_text("1"), "Hm.", "Well."]
    spoken = [say(renderer, text) for text in turns]
    trajectory, _ = played(renderer, world, spoken, as_tool(tool))
    assert trajectory.stop is Stop.DONE and tool.closed == [0] and world.closed == 1
    assert trajectory.turn_rewards == ((1.0,) if answer else (0.0, 0.5, 0.0))
    assert trajectory.tool_scores == {NAME: 1.0}


def test_what_anybody_changes_of_what_it_is_given_is_its_own(renderer_of) -> None:
    """Of a row, and of what the model wrote: other answers, rewards and later epochs see it whole."""

    class Greedy(Told):
        def reset(self, row):
            row["extra_info"]["words"].pop()
            row["prompt"][0]["content"] = "Changed."
            row["prompt"].append("nonsense")
            return [{"role": "user", "content": str(len(row["extra_info"]["words"]))}]

    class Taking(Counts):
        async def call(self, state, arguments):
            self.rows[-1]["prompt"].clear()
            self.rows[-1]["extra_info"]["words"].clear()
            return arguments.pop("code")

    renderer = renderer_of("hermes")
    words = ["a", "b"]
    prompt = replace(asked(renderer, 0), extra_info={"words": words})
    before = [dict(message) for message in prompt.messages]
    tool = as_tool(Taking())
    agent = Agent({NAME: tool}, renderer, OPTIONS)
    for sample in range(2):
        model = Scripted([say(renderer, call_text("1")), say(renderer, "2")])
        worlds = Worlds(lambda: Greedy([([], 0.0, True)]), 5.0, 600)
        lost = run_in_world(Attempt(prompt, sample), lambda *_, m=model: m, agent, worlds)
        trajectory = asyncio.run(lost)
        assert trajectory.prompt.messages[0]["content"] == "1", trajectory.tool_failure
        assert [use.arguments for use in trajectory.tool_uses] == [{"code": "1"}]
    assert words == ["a", "b"] and prompt.messages == before
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"x": deep}
    # What can't be copied ends nothing
    assert own_copy(deep)["x"] is deep["x"]


def test_a_copy_shares_nothing_that_can_change_and_is_quick() -> None:
    cases = [{"input": f"{i}", "output": [i]} for i in range(2_000)]
    row = {"cases": cases, "names": ["a"] * 2_000, "array": np.arange(3), "pair": ([1], "b")}
    copied = own_copy(row)
    copied["cases"][0]["output"].append(5)
    copied["names"].append("c")
    copied["array"][0] = 7
    copied["pair"][0].append(2)
    assert row["cases"][0] == {"input": "0", "output": [0]} and row["pair"] == ([1], "b")
    assert row["names"] == ["a"] * 2_000 and row["array"][0] == 0
    seconds = {}
    for copy in (deepcopy, own_copy):
        begin = time.process_time()
        for _ in range(3):
            copy(row)
        seconds[copy] = time.process_time() - begin
    assert seconds[own_copy] < 0.6 * seconds[deepcopy]
