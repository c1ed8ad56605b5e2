"""What isn't the policy's fault isn't trained: samples lost to infrastructure are counted, left
out, and end the run when they are many.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from retool.rl import collect
from retool.rl.__main__ import main
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools import interpreter
from retool.rl.agent.tools.interpreter import CodeInterpreter, InterpreterConfig
from retool.rl.agent.tools.load import RunLimits, load_tools
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.failures import count_lost
from retool.rl.metrics import score_metrics, tool_metrics
from retool.rl.objective.filter import add, begin, has_signal
from retool.rl.reward import protocol
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.protocol import JUDGES_LOST, Judged
from retool.rl.reward.source import RewardSource
from retool.rl.state import TrainState
from retool.rl.types import TOOL_FAILURE, Group, Scored, Stop, trainable
from retool.rl.validate import validation_metrics
from retool.run.skips import require_trained
from retool.sandbox import Result
from tests.rl.agent.test_loop import Answers, call_text, episode, say
from tests.rl.agent.test_rollout import Tool, called, parts_of, prompt_of
from tests.rl.conftest import judged_by, make_prompt, make_trajectory
from tests.rl.reward.test_rewards import HERE
from tests.rl.test_command import ARR, FILTER, steps, words

GONE = "code_interpreter: SandboxError: the supervisor is gone"


def member(score: float, stop: Stop = Stop.NO_CALL, prompt: Any = None, **more: Any) -> Scored:
    return Scored(make_trajectory(prompt, stop=stop, **more), score, score, {"acc": score})


# --- how a sample is lost ---


@pytest.mark.parametrize(
    ("answer", "stop"),
    [
        (ToolResult("gone", "sandbox_error"), Stop.INFRASTRUCTURE),
        (ToolResult("gone", "infrastructure"), Stop.INFRASTRUCTURE),
        (ConnectionRefusedError("nobody there"), Stop.INFRASTRUCTURE),
        (httpx.ConnectTimeout("nobody there"), Stop.INFRASTRUCTURE),
        (
            FileNotFoundError("no such file"),
            Stop.NO_CALL,
        ),  # the model's doing: it is told, and may try again
    ],
)
def test_a_tool_that_is_away_loses_the_trajectory_and_one_that_refuses_does_not(
    renderer_of, tool_row, answer, stop
) -> None:
    renderer = renderer_of("hermes")
    trajectory, _ = episode(
        renderer,
        tool_row,
        [say(renderer, call_text("1")), say(renderer, "Done.")],
        Answers([answer]),
    )
    assert trajectory.stop is stop and bool(trajectory.tool_failure) == (
        stop is Stop.INFRASTRUCTURE
    )


def test_lost_answers_are_not_judged_and_lost_judges_lose_the_answer(renderer_of) -> None:
    class Away(Tool):
        async def call(self, arguments):
            return ToolResult("SandboxError: the supervisor is gone", "sandbox_error")

    class Judges:
        asked = 0

        seen = ()

        async def score(self, asked):
            self.asked += 1
            return Judged(-1.0, failure=JUDGES_LOST, reason="the processes that judge are gone")

    judges = Judges()
    parts, _ = parts_of(renderer_of("hermes"), {0: [called("1")], 1: ["42"]}, Away(0), judge=judges)
    found = asyncio.run(
        roll_out(parts, [(prompt_of(parts.renderer, i), 0) for i in range(2)], Sampling(), 0)
    )
    assert judges.asked == 1 and all(scored.lost and scored.failure is None for scored in found)
    assert [scored.info[TOOL_FAILURE] for scored in found] == [
        GONE,
        "the processes that judge are gone",
    ]


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits before asking again."""
    monkeypatch.setattr(
        protocol, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0))
    )


def test_judges_that_are_gone_are_replaced_and_asked_again(monkeypatch) -> None:
    async def ask(pool):
        inner = pool._attempt
        broken = [True]

        async def attempt(asked, timeout):
            if broken:
                broken.pop()
                return pool._failed(JUDGES_LOST, "the processes that judge are gone")
            return await inner(asked, timeout)

        monkeypatch.setattr(pool, "_attempt", attempt)
        return await judged_by(pool, make_trajectory(text="4"))

    quickly(monkeypatch)
    with RewardPool(RewardSource("compute_score", HERE), workers=1) as pool:
        assert asyncio.run(ask(pool)).score == 0.5


def test_a_sandbox_that_is_killed_is_there_again_for_the_next_program(renderer_of) -> None:
    """The program that its death interrupted is run again: the model learns nothing of it."""
    renderer = renderer_of("hermes")
    try:
        tool = CodeInterpreter(InterpreterConfig(workers=1))
    except (ValueError, OSError) as error:
        pytest.skip(f"no sandbox here: {error}")
    parts, _ = parts_of(
        renderer, {0: [called("import time; time.sleep(0.3); print(6 * 7)"), "42"]}, tool
    )

    async def run():
        asyncio.get_running_loop().call_later(0.15, os.kill, tool._backend.pid, signal.SIGKILL)
        try:
            return await roll_out(parts, [(prompt_of(renderer, 0), 0)], Sampling(), 0)
        finally:
            await tool.close()

    (scored,) = asyncio.run(run())
    assert (
        scored.trajectory.stop is Stop.NO_CALL
        and scored.trajectory.tool_errors == 0
        and tool._backend.restarts == 1
    )
    assert "\n42\n</tool_response>" in renderer.tokenizer.decode(scored.trajectory.tokens)


# --- the clock of a program ---


class Queueing:
    """A sandbox with two workers, without programs."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.gate = seconds, asyncio.Semaphore(2)

    async def run(
        self, code: str, timeout: float, files: Mapping[str, bytes] | None = None
    ) -> Result:
        begun = asyncio.get_running_loop().time()
        async with self.gate:
            queued = asyncio.get_running_loop().time() - begun
            await asyncio.sleep(self.seconds)
        return Result("success", "1", execution_time=self.seconds, queue_seconds=queued)


def test_waiting_for_a_worker_is_no_time_of_the_program(renderer_of, monkeypatch) -> None:
    monkeypatch.setattr(interpreter, "_open_backend", lambda config: Queueing(0.05))
    renderer = renderer_of("hermes")
    # Twenty calls, two at a time: the last ones wait for half a second
    parts, _ = parts_of(renderer, {i: [called("1"), "42"] for i in range(20)}, CodeInterpreter())
    parts = replace(parts, agent=replace(parts.agent, tool_timeout_seconds=0.3))
    found = asyncio.run(
        roll_out(parts, [(prompt_of(renderer, i), 0) for i in range(20)], Sampling(), 0)
    )
    metrics = tool_metrics(found)
    assert metrics["tool/timeouts"] == metrics["tool/errors"] == 0 and metrics["tool/calls"] == 20
    assert metrics["tool/latency"] == pytest.approx(0.05)
    assert 0.2 < metrics["tool/queue_s"] < 3, "the mean of all, not their sum of 4.5 s"


def test_a_sandbox_that_answers_nobody_is_infrastructure_s_failure(monkeypatch) -> None:
    monkeypatch.setattr(interpreter, "_open_backend", lambda config: Queueing(3.0))
    monkeypatch.setattr(interpreter, "STALLED_SECONDS", 0.1)
    result = asyncio.run(
        CodeInterpreter(InterpreterConfig(default_timeout=0.1)).call({"code": "1"})
    )
    assert result.lost and "no program has ended for 0.2 s" in result.text


def test_workers_and_the_programs_limit_are_the_runs(monkeypatch, tmp_path) -> None:
    made = []
    monkeypatch.setattr(
        interpreter,
        "Sandbox",
        lambda limits, workers, isolation, share: made.append((workers, limits.wall_seconds)),
    )
    file = tmp_path / "tools.yaml"
    file.write_text(
        "tools: [{class_name: retool.rl.agent.tools.CodeInterpreter, config: {workers: 7, default_timeout: 9}}]"
    )
    load_tools(None, RunLimits(33, 5.0))
    load_tools(file)
    load_tools(file, RunLimits(2, 120.0))
    assert made == [(33, 5.0), (7, 9), (2, 9)]
    with pytest.raises(ValueError, match="workers=0 must be a number above 0"):
        InterpreterConfig(workers=0)


# --- what becomes of it ---


def test_lost_samples_are_in_no_mean() -> None:
    prompt = make_prompt(3)
    good = member(1.0, prompt=prompt)
    bad = member(0.0, prompt=prompt)
    lost = member(0.0, Stop.INFRASTRUCTURE, prompt)
    aborted = member(0.0, Stop.ABORTED, prompt)
    assert trainable([Group(prompt, [good, lost, bad, aborted])]) == [Group(prompt, [good, bad])]
    assert trainable(
        [Group(prompt, [good, lost]), Group(prompt, [lost]), Group(prompt, [good])]
    ) == [Group(prompt, [good])]
    assert score_metrics([good, lost])["critic/score/mean"] == 1.0
    assert not has_signal(Group(prompt, [good, lost]), "acc") and not has_signal(
        Group(prompt, [lost, lost]), "acc"
    )
    assert (
        add(begin([], 0), [Group(prompt, [good, lost]), Group(prompt, [lost])], "acc").metrics(0)[
            "filter/metric_mean"
        ]
        == 1.0
    )
    found = validation_metrics(
        [Group(prompt, [good, lost, good, aborted]), Group(make_prompt(4), [lost] * 4)]
    )
    assert found["val-core/numbers/acc/mean@4"] == found["val-core/numbers/acc/best@4/mean"] == 1.0


def lose(monkeypatch: pytest.MonkeyPatch, which: Any) -> None:
    """`which(trajectory)` are lost."""

    async def some_lost(*args: Any) -> Any:
        found = await inner(*args)
        return [lost(scored) if which(scored.trajectory) else scored for scored in found]

    def lost(scored: Scored) -> Scored:
        return Scored(
            replace(scored.trajectory, stop=Stop.INFRASTRUCTURE), 0.0, 0.0, {TOOL_FAILURE: GONE}
        )

    inner = collect.roll_out
    monkeypatch.setattr(collect, "roll_out", some_lost)


def test_a_step_with_lost_samples_is_the_step_without_them(work, tmp_path, monkeypatch) -> None:
    """Sample 3 of each group of 4 is lost: what is trained is what groups of 3 train, to the bit."""
    common = ["trainer.total_training_steps=2", "trainer.deterministic=false"]
    assert main(words(work, tmp_path / "three", *common, f"{ARR}rollout.n=3")) == 0
    lose(monkeypatch, lambda trajectory: trajectory.sample == 3)
    assert main(words(work, tmp_path / "four", *common)) == 0
    three = steps(tmp_path / "three")
    four = steps(tmp_path / "four")
    assert [entry["stop/infrastructure"] for entry in four] == [4, 4] and [
        entry["stop/infrastructure"] for entry in three
    ] == [0, 0]
    for name in ("actor/pg_loss", "actor/grad_norm", "critic/score/mean", "critic/advantages/max"):
        assert [entry[name] for entry in four] == pytest.approx(
            [entry[name] for entry in three], rel=1e-6, abs=1e-9
        ), name


@pytest.mark.parametrize("more", [(), FILTER[:3]])
def test_a_run_whose_samples_are_lost_ends_with_the_cause_and_its_checkpoint(
    work, tmp_path, monkeypatch, capsys, more
) -> None:
    lose(monkeypatch, lambda trajectory: trajectory.policy_version >= 1)
    limits = [f"{ARR}rollout.max_lost_steps=2", "trainer.total_training_steps=9"]
    assert main(words(work, tmp_path, *more, *limits)) == 1
    said = capsys.readouterr()
    assert (
        f"more than 30% in each of the last 2 steps, to what isn't the policy's fault: {GONE}"
        in said.err
    )
    assert [entry["stop/infrastructure"] > 0 for entry in steps(tmp_path)] == [False, True, True]
    assert "actor/pg_loss" not in steps(tmp_path)[-1] and re.search(
        "lost to infrastructure (16|24)", said.out
    )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_a_validation_that_is_lost_is_no_accuracy(work, tmp_path, monkeypatch, capsys) -> None:
    lose(monkeypatch, lambda trajectory: True)
    assert (
        main(words(work, tmp_path, "trainer.val_only=true", f"data.val_files={work}/val.jsonl"))
        == 1
    )
    assert f"3 of the 3 answers of the validation were lost: {GONE}" in capsys.readouterr().err


def test_a_run_of_which_all_is_lost_says_to_what() -> None:
    """Too short for max_lost_steps to end it."""
    gone = replace(make_trajectory(), stop=Stop.INFRASTRUCTURE)
    state = TrainState(0.0)
    count_lost(state, [Scored(gone, 0.0, 0.0, {TOOL_FAILURE: "agent.mine: it returned None"})], 0.3)
    session: Any = SimpleNamespace(folder="run", report=SimpleNamespace(folder="model"))
    with pytest.raises(ValueError, match=r"nothing was trained: all samples .*it returned None\)"):
        require_trained(session, state, updates=0)
