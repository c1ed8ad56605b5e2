"""Rollouts with an engine that plays turns back: who waits for whom, what is counted, and that
nothing is left behind.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.engine.types import TurnDone
from retool.metrics.transcripts import read_transcripts
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import Overlong, RolloutParts, RolloutTimes, Sampling, roll_out
from retool.rl.agent.tools.interpreter import SCHEMA, CodeInterpreter
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.agent.work_thread import WorkThread
from retool.rl.collect import _sample_share
from retool.rl.failures import warn_of_failures
from retool.rl.report import write_training, write_validation
from retool.rl.reward.protocol import Judged
from retool.rl.state import TrainState, adapted_kl_coef, group_to_plain, regroup, restored
from retool.rl.types import Group, Prompt, Scored, Stop, Trajectory
from retool.run.session import Skips
from tests.rl.conftest import make_prompt, make_trajectory


@dataclass
class PlayedBack:
    """An engine that gives the turns of `script[prompt index]` in order, one finished turn per
    step.
    """

    renderer: Renderer
    script: dict
    live: dict = field(default_factory=dict)
    queue: list = field(default_factory=list)
    seeds: dict = field(default_factory=dict)
    filters: set = field(default_factory=set)  # (temperature, top_p, top_k) that it was asked for
    steps: int = 0
    any_group: bool = False  # worlds make prompts of their own

    def start(self, key, ids, params, group=None):
        assert (
            key not in self.live
            and (self.any_group or group == key[0])
            and params.stop_ids == self.renderer.end_of_turn_ids
        )
        self.live[key], self.seeds[key] = list(self.script[key[0]]), params.seed
        self.filters.add((params.temperature, params.top_p, params.top_k))
        self.queue.append(key)

    def extend(self, key, ids, params):
        assert params.seed == self.seeds[key]
        self.queue.append(key)

    def drop(self, key):
        del self.live[key]
        self.queue = [k for k in self.queue if k != key]

    def idle(self):
        return not self.queue

    def step(self):
        self.steps += 1
        key = self.queue.pop(0)
        text = self.live[key].pop(0)
        if text in ("capacity", "stop"):
            return [TurnDone(key, [], [], [], text)]
        ids = self.renderer.encode(["x", text + "<|im_end|>"])[1]
        return [TurnDone(key, ids, [-1.0] * len(ids), [-0.5] * len(ids), "stop")]


class Judge:
    def __init__(self, delay=0.0):
        self.delay = delay

    seen = ()

    async def score(self, asked):
        await asyncio.sleep(self.delay)
        good = "42" in asked.solution
        return Judged(float(good), {"acc": float(good)})


class Tool:
    schema = SCHEMA
    name = "code_interpreter"

    def __init__(self, seconds):
        self.seconds = seconds
        self.running = 0
        self.most = 0

    async def call(self, arguments):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return ToolResult("ok", "success", self.seconds)

    async def close(self):
        pass


def prompt_of(renderer, index) -> Prompt:
    checked = to_conversation(
        {"messages": [{"role": "user", "content": "?"}], "tools": [SCHEMA]},
        "rows",
        0,
        prompt_only=True,
    )
    ids = np.asarray(renderer.render_prompt(checked.messages, checked.tools), np.int32)
    return Prompt(index, checked.messages, checked.tools, ids, "rows", "42")


def called(code) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"


def parts_of(renderer, script, tool=None, **changes):
    engine = PlayedBack(renderer, script)
    agent = AgentOptions(max_response_length=500, max_assistant_turns=4)
    return replace(
        RolloutParts(engine, Judge(), {tool.name: tool} if tool else {}, renderer, agent), **changes
    ), engine


def test_a_judge_that_has_no_score_is_told_before_anything_is_sampled(renderer_of) -> None:
    class Older:
        async def judge(self, trajectory):
            return 1.0

    with pytest.raises(ValueError, match=r"Older has no score and no seen: give it an async"):
        parts_of(renderer_of("hermes"), {}, judge=Older())


class Talkative(Tool):
    """Says this much."""

    def __init__(self, text):
        super().__init__(0.0)
        self.text = text

    async def call(self, arguments):
        return ToolResult(self.text, "success", 0.01)


@pytest.mark.parametrize("text", ["short", "line after line\n" * 40, "a flood " * 3_000])
def test_long_answers_are_tokenised_beside_the_engine_and_alike(
    renderer_of, text, monkeypatch
) -> None:
    renderer = renderer_of("hermes")
    threads = []
    render = renderer.render_tool_turn

    def watched(*given):
        threads.append(threading.current_thread())
        return render(*given)

    monkeypatch.setattr(renderer, "render_tool_turn", watched)
    found = {}
    for texts in (WorkThread(), None):
        parts, _ = parts_of(renderer, {0: [called("1"), "42"]}, Talkative(text), texts=texts)
        parts = replace(parts, agent=replace(parts.agent, max_response_length=2_000))
        (member,) = asyncio.run(roll_out(parts, [(prompt_of(renderer, 0), 0)], Sampling(), 0))
        found[texts is None] = member.trajectory
        if texts is not None:
            texts.end()
    assert np.array_equal(found[True].tokens, found[False].tokens) and found[True].tool_calls == 1
    beside = [thread is not threading.main_thread() for thread in threads]
    assert any(beside) == (text != "short") and not beside[-1]


def test_a_straggler_s_tool_holds_nobody_up(renderer_of) -> None:
    renderer = renderer_of("hermes")
    tool = Tool(0.3)
    script = {0: [called("1"), "42"], 1: [called("2"), "7"], 2: ["42"]}
    parts, engine = parts_of(renderer, script, tool)
    requests = [(prompt_of(renderer, i), k) for i in range(3) for k in range(2)]
    times = RolloutTimes()
    sampling = Sampling(0.7, 0.8, 9, seed=9, split=1)
    found = asyncio.run(roll_out(parts, requests, sampling, 5, times))
    assert engine.filters == {(0.7, 0.8, 9)}
    assert [(s.trajectory.prompt.index, s.trajectory.sample, s.score) for s in found] == [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (1, 0, 0.0),
        (1, 1, 0.0),
        (2, 0, 1.0),
        (2, 1, 1.0),
    ]
    assert tool.most == 4, "the tools ran at once"
    assert 0.2 < times.tools < times.total
    assert (
        not engine.live
        and engine.seeds[(1, 0)] == (9, 1, 5, 1, 0)
        and all(s.trajectory.policy_version == 5 for s in found)
    )


class OneSlowTurn(PlayedBack):
    """Prompt 1's turn takes four steps of 50 ms."""

    def step(self):
        if self.queue[0][0] == 1:
            time.sleep(0.05)
            self.steps += 1
            if self.steps < 5:
                return []
        return super().step()


class Blocking(Tool):
    """Keeps everybody waiting before it begins."""

    async def call(self, arguments):
        time.sleep(0.05)
        return await super().call(arguments)


def test_tools_are_told_by_the_answers_they_hold_and_the_loop_apart(renderer_of) -> None:
    renderer = renderer_of("hermes")
    script = {0: [called("1"), "42"], 1: ["42"]}
    parts, _ = parts_of(renderer, script, Blocking(0.35))
    parts = replace(parts, engine=OneSlowTurn(renderer, script))
    times = RolloutTimes()
    asyncio.run(
        roll_out(parts, [(prompt_of(renderer, i), 0) for i in (0, 1)], Sampling(), 0, times)
    )
    # Half of 0.2 s in which the engine has the other one, and 0.15 s in which it has none
    assert 0.17 < times.tools < times.total - 0.05
    assert 0.05 < times.loop < times.total - 0.3


def test_waiting_for_judges_is_told_apart(renderer_of) -> None:
    parts, _ = parts_of(renderer_of("hermes"), {0: ["42"]}, judge=Judge(0.2))
    times = RolloutTimes()
    asyncio.run(roll_out(parts, [(prompt_of(parts.renderer, 0), 0)], Sampling(), 0, times))
    assert times.reward > 0.15 and times.tools < times.reward / 2


@pytest.mark.parametrize("reason", ["capacity", "stop"])
def test_a_sequence_of_which_nothing_is_sampled_is_aborted_and_counted(renderer_of, reason) -> None:
    parts, engine = parts_of(renderer_of("hermes"), {0: [reason]})
    (scored,) = asyncio.run(roll_out(parts, [(prompt_of(parts.renderer, 0), 0)], Sampling(), 0))
    assert (
        scored.trajectory.stop is Stop.ABORTED
        and scored.trajectory.sampled == 0
        and scored.lost
        and not engine.live
    )


def test_what_a_broken_tool_said_is_kept_told_and_written(renderer_of, tmp_path, recwarn) -> None:
    class Broken(Tool):
        async def call(self, arguments):
            return ToolResult("SandboxError: nobody there", "sandbox_error")

    parts, _ = parts_of(renderer_of("hermes"), {0: [called("1")], 1: ["42"]}, Broken(0))
    found = asyncio.run(
        roll_out(parts, [(prompt_of(parts.renderer, i), 0) for i in range(2)], Sampling(), 0)
    )
    reason, (broken, fine) = "code_interpreter: SandboxError: nobody there", found
    assert (
        broken.trajectory.stop is Stop.INFRASTRUCTURE
        and broken.info["tool_failure"] == reason
        and "tool_failure" not in fine.info
    )
    warn_of_failures([fine])
    assert not recwarn
    warn_of_failures(found)
    assert f"samples are lost ({reason})" in str(recwarn[-1].message)
    write_validation(tmp_path, 1, [Group(broken.trajectory.prompt, [broken])], parts.renderer)
    assert [line["info"]["tool_failure"] for line in read_transcripts(tmp_path)] == [reason]


def test_length_shaping_is_in_the_reward_only(renderer_of) -> None:
    parts, _ = parts_of(renderer_of("hermes"), {0: ["42"]}, overlong=Overlong(499, 1.0))
    (scored,) = asyncio.run(roll_out(parts, [(prompt_of(parts.renderer, 0), 0)], Sampling(), 0))
    n = scored.trajectory.response_length
    assert n > 1  # 499 of the 500 tokens that it may have are punished
    assert scored.score == 1.0 and scored.reward == pytest.approx(1.0 - (n - 1) / 499)


def test_stopping_leaves_nothing_behind(renderer_of) -> None:
    renderer = renderer_of("hermes")
    tool = Tool(30.0)
    begin = time.monotonic()
    parts, engine = parts_of(
        renderer,
        {0: [called("1"), "42"], 1: ["42"]},
        tool,
        stopped=lambda: time.monotonic() > begin + 0.3,
    )
    assert (
        asyncio.run(roll_out(parts, [(prompt_of(renderer, i), 0) for i in range(2)], Sampling(), 0))
        is None
    )
    assert time.monotonic() < begin + 20 and not engine.live and not engine.queue


def test_a_quick_tool_s_answer_is_in_the_next_engine_step(renderer_of) -> None:
    class Busy(PlayedBack):
        def idle(self):
            return False

        def step(self):
            if self.queue:
                return super().step()
            self.steps += 1
            return []

        def extend(self, key, ids, params):
            extended.append(self.steps)
            super().extend(key, ids, params)

    class Quick(Tool):
        async def call(self, arguments):
            return ToolResult("ok", "success")

    extended = []
    tool = Quick(0.0)
    parts, engine = parts_of(renderer_of("hermes"), {0: [called("1"), called("2"), "42"]}, tool)
    parts = replace(parts, engine=Busy(engine.renderer, engine.script))
    asyncio.run(roll_out(parts, [(prompt_of(parts.renderer, 0), 0)], Sampling(), 0))
    assert extended == [1, 2]


class Interrupted(Tool):
    async def call(self, arguments):
        await asyncio.sleep(self.seconds)
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_that_would_sample_on(renderer_of) -> None:
    """The event loop runs once more, to close the tools; the engine's other ranks are gone then."""

    class Shared(PlayedBack):
        ends = 0

        def end(self):
            self.ends += 1

    renderer = renderer_of("hermes")
    script = {0: [called("1"), "42"], 1: ["42"] * 9, 2: ["42"] * 9}
    parts, _ = parts_of(renderer, script, Interrupted(0))
    engine = Shared(renderer, script)
    loop = asyncio.new_event_loop()
    run = SimpleNamespace(rollout=replace(parts, engine=engine), engine=engine, loop=loop)
    requests = [(prompt_of(renderer, i), 0) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        _sample_share(run, requests, Sampling(), 0, RolloutTimes())
    assert engine.ends == 1 and not engine.live and not asyncio.all_tasks(loop)
    steps = engine.steps
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert engine.steps == steps


def test_an_episode_s_error_ends_it_at_once(renderer_of) -> None:
    class Broken(Judge):
        async def score(self, asked):
            if asked.solution == "7":
                raise RuntimeError("no judge")
            return await super().score(asked)

    parts, engine = parts_of(renderer_of("hermes"), {0: ["42"], 1: ["7"]}, judge=Broken(30.0))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="no judge"):
        asyncio.run(
            roll_out(parts, [(prompt_of(parts.renderer, i), 0) for i in range(2)], Sampling(), 0)
        )
    assert time.monotonic() < begin + 20 and not engine.live


def test_an_engine_s_error_ends_it(renderer_of) -> None:
    parts, engine = parts_of(renderer_of("hermes"), {0: ["42"]})
    engine.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(roll_out(parts, [(prompt_of(parts.renderer, 0), 0)], Sampling(), 0))
    assert not engine.live


def test_real_programs(renderer_of) -> None:
    """The model's program runs in the sandbox; what it prints comes back, errors too, and the
    sandbox outlives them.
    """
    renderer = renderer_of("hermes")
    try:
        tool = CodeInterpreter()
    except (ValueError, OSError) as error:
        pytest.skip(f"no sandbox here: {error}")
    script = {
        0: [called("print(6 * 7)"), "42"],
        1: [called("1 / 0"), called("import os; os._exit(3)"), "7"],
    }
    parts, _ = parts_of(renderer, script, tool)

    async def run():
        try:
            return await roll_out(
                parts, [(prompt_of(renderer, i), 0) for i in range(2)], Sampling(), 0
            )
        finally:
            await tool.close()

    good, bad = asyncio.run(run())
    texts = [
        renderer.tokenizer.decode(s.trajectory.tokens[s.trajectory.prompt_length :])
        for s in (good, bad)
    ]
    assert (
        "\n42\n</tool_response>" in texts[0]
        and good.trajectory.tool_errors == 0
        and good.trajectory.tool_seconds > 0
    )
    assert (
        "ZeroDivisionError" in texts[1]
        and "return code 3" in texts[1]
        and bad.trajectory.tool_errors == 2
    )


def scored(prompt, sample, score, version=3):
    trajectory = make_trajectory(
        prompt,
        sample,
        response=(5, 6, 7, 8),
        mask=(True, False, True, True),
        version=version,
        text="é",
        turn_rewards=(0.0, 0.25),
    )
    return Scored(trajectory, score, score - 0.5, {"acc": 1.0, "pred": "x"})


def test_groups_come_together_in_order_whoever_made_them() -> None:
    prompts = [make_prompt(7), make_prompt(3)]
    members = [scored(p, k, float(k)) for k in (1, 0) for p in prompts]
    groups = regroup(prompts, members)
    assert [(g.prompt.index, [m.trajectory.sample for m in g.members]) for g in groups] == [
        (7, [0, 1]),
        (3, [0, 1]),
    ]


def test_kept_groups_survive_a_checkpoint(tmp_path) -> None:
    import torch

    from retool.checkpoint.format.state_dicts import frozen

    prompt = make_prompt(11)
    members = [scored(prompt, k, 1.0) for k in range(2)]
    # Without these a resumed run would route the tokens anew, and go on with other numbers.
    routed = members[0].trajectory
    experts = np.arange(2 * len(routed), dtype=np.int16).reshape(-1, 1, 2)
    members[0] = replace(members[0], trajectory=replace(routed, experts=experts))
    state = TrainState(
        0.5,
        step=4,
        updates=8,
        position=24,
        skips=Skips(3),
        kept=[Group(prompt, members)],
    )
    (tmp_path / "data.pt").write_bytes(frozen(state.data_state(), "data_state"))
    data = torch.load(tmp_path / "data.pt", weights_only=True)
    back = restored(4, data, 0.0, lambda index: {11: prompt}[index])
    assert (back.kl_coef, back.step, back.updates, back.position, back.saved_step) == (
        0.5,
        4,
        8,
        24,
        4,
    )
    assert back.skips.total == 3
    first, second = (member.trajectory for member in back.kept[0].members)
    assert first.experts is not None and np.array_equal(first.experts, experts)
    assert second.experts is None and second.turn_rewards == (0.0, 0.25)
    before = group_to_plain(state.kept[0])
    # What was said went to the judge, and what a lost one was lost to is in its `info`
    left_out = {"prompt", "messages", "tool_uses", "tool_failure"}
    assert {field.name for field in fields(Trajectory)} - left_out <= set(before["members"][0])
    after = group_to_plain(back.kept[0])
    for one, other in zip(before["members"], after["members"], strict=True):
        assert all(
            torch.equal(one[k], other[k])
            if isinstance(one[k], torch.Tensor)
            else one[k] == other[k]
            for k in one
        )
    assert restored(4, {}, 0.25, None).kl_coef == 0.25


def test_the_adaptive_controller_by_hand() -> None:
    assert adapted_kl_coef(0.2, 0.105, 0.1, 10_000, 1000) == pytest.approx(0.2 * (1 + 0.05 * 0.1))
    assert adapted_kl_coef(0.2, 9.0, 0.1, 10_000, 1000) == pytest.approx(0.2 * 1.02)
    assert adapted_kl_coef(0.2, 0.0, 0.1, 10_000, 1000) == pytest.approx(0.2 * 0.98)


def test_reports_show_what_was_sampled(tmp_path, renderer_of) -> None:
    renderer = renderer_of("hermes")
    prompt = make_prompt(0)
    group = Group(prompt, [scored(prompt, k, 1.0) for k in range(2)])
    write_validation(tmp_path, 3, [group], renderer)
    write_training(tmp_path, 3, [group], [np.arange(7.0), np.arange(7.0)], renderer)
    train, val = (
        [line for line in read_transcripts(tmp_path) if line["split"] == split]
        for split in ("train", "val")
    )
    assert len(train) == len(val) == 2 and [s["role"] for s in val[0]["segments"]] == [
        "assistant",
        "tool",
        "assistant",
    ]
    assert (
        train[0]["segments"][2]["advantage"] == [5.0, 6.0]
        and train[0]["reward"] == 0.5
        and train[0]["info"]["score"] == 1.0
    )
