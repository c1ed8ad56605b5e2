"""Environments of the package verifiers with a scripted model: what it samples is trained as it
was sampled, verifiers' own rewards come back, and what breaks is told.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retool.data.read.rows import to_conversation
from retool.rl.agent.environments.load import find_environment, let_go
from retool.rl.agent.environments.play import Attempt, Worlds, run_in_world
from retool.rl.agent.options import Agent
from retool.rl.types import Prompt, Stop
from tests.rl.agent.test_loop import OPTIONS, Scripted, say

BORROWED = Path(__file__).parent / "borrowed"
TASKSETS = ("retool_guess", "retool_sums")


@pytest.fixture
def tasksets(monkeypatch):
    """The tasksets of the tests can be imported, by the servers of their tools, too."""
    pytest.importorskip("verifiers.v1", reason="needs retool-train[verifiers]")
    monkeypatch.syspath_prepend(str(BORROWED))
    paths = [str(BORROWED), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def made(name: str, **kwargs: Any):
    source = find_environment(None, f"verifiers:{name}", kwargs)
    assert source is not None
    return source.load()


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    from retool.rl.agent.environments.verifiers.rows import rows

    found = rows(name)
    return [next(found) for _ in range(count)]


def prompt_of(renderer, row) -> Prompt:
    ids = np.asarray(renderer.render_prompt(row["prompt"], None), np.int32)
    truth = row["reward_model"]["ground_truth"]
    extra = row.get("extra_info", {})
    return Prompt(0, row["prompt"], None, ids, row["data_source"], truth, extra, row=row)


def played(renderer, make, row, turns, **changes):
    """(trajectory, the model) of a trajectory that says `turns`."""
    model = Scripted(turns)
    agent = Agent({}, renderer, replace(OPTIONS, **changes))
    attempt = Attempt(prompt_of(renderer, row), 0, seed=11, version=7)
    worlds = Worlds(make, 60.0, 600)
    return asyncio.run(run_in_world(attempt, lambda *_: model, agent, worlds)), model


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def same_as_training(renderer, trajectory, messages, tools) -> bool:
    """Whether the tokens and the mask are those that training makes of the conversation."""
    checked = to_conversation({"messages": messages, "tools": tools}, "rows", 0)
    sample = renderer.tokenise(renderer.pieces(checked)[0])
    n = len(trajectory)
    same = np.array_equal(sample.tokens[:n], trajectory.tokens)
    return same and np.array_equal(sample.mask[:n], trajectory.mask)


def test_without_the_package_it_is_told_how_to_get_it() -> None:
    try:
        import verifiers.v1  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'retool-train\[verifiers\]'"):
            made("anything")
    with pytest.raises(ValueError, match="'gym' is none of verifiers"):
        find_environment(None, "gym:CartPole", {})


def test_a_game_is_played_and_scored_by_verifiers(renderer_of, tasksets) -> None:
    """Its environment speaks as the user, in one process with the policy."""
    renderer = renderer_of("chatml")
    first, second = rows_of("retool_guess", 2)
    assert first["prompt"] == [{"role": "user", "content": "Guess my number."}]
    make = made("retool_guess")
    try:
        turns = [say(renderer, "5"), say(renderer, "3")]
        trajectory, _ = played(renderer, make, first, turns)
        assert trajectory.stop is Stop.DONE, trajectory.tool_failure
        assert trajectory.turn_rewards == pytest.approx((0.0, 1.02))
        said = [
            {"role": "user", "content": "Guess my number."},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "It is another one."},
            {"role": "assistant", "content": "3"},
        ]
        assert same_as_training(renderer, trajectory, said, None)
        # A turn that is cut off is scored, too, and so is one after which no turn is left
        half = [say(renderer, "5"), say(renderer, "7")[:1]]
        trajectory, _ = played(renderer, make, second, half)
        assert trajectory.stop is Stop.LENGTH and trajectory.turn_rewards[1] == pytest.approx(1.02)
        trajectory, _ = played(renderer, make, second, turns, max_assistant_turns=1)
        assert trajectory.stop is Stop.MAX_TURNS
        assert trajectory.turn_rewards == pytest.approx((0.01,))
        # What fails there is nobody's reward
        task = json.loads(first["extra_info"]["task"])
        broken = {**first, "extra_info": {"task": {**task, "raises": True}}}
        trajectory, _ = played(renderer, make, broken, [say(renderer, "3")])
        assert trajectory.stop is Stop.INFRASTRUCTURE
        assert "the referee is away" in trajectory.tool_failure
    finally:
        let_go(make)


def test_two_seats_can_t_be_the_policy(renderer_of, tasksets) -> None:
    renderer = renderer_of("chatml")
    (row, _) = rows_of("retool_guess", 2)
    make = made("retool_guess", pairs=True)
    try:
        trajectory, _ = played(renderer, make, row, [say(renderer, "3"), say(renderer, "3")])
        assert trajectory.stop is Stop.INFRASTRUCTURE
        assert "plays two seats, 'player' and 'second'" in trajectory.tool_failure
    finally:
        let_go(make)
    with pytest.raises(ValueError, match="taskset 'nowhere' not found"):
        made("nowhere")
    with pytest.raises(ValueError, match="moist"):
        made("retool_guess", moist=3)


@pytest.mark.slow
def test_tools_of_a_taskset_are_called_by_verifiers(renderer_of, tasksets) -> None:
    renderer = renderer_of("hermes")
    (row,) = rows_of("retool_sums", 1)
    make = made("retool_sums")
    try:
        texts = ["I add.\n" + call("sums_add", a=1, b=2), "It is 3."]
        turns = [say(renderer, text) for text in texts]
        trajectory, model = played(renderer, make, row, turns)
        assert trajectory.stop is Stop.DONE, trajectory.tool_failure
        assert trajectory.turn_rewards == (0.0, 2.5)
        shown = renderer.tokenizer.decode(model.asked[0][0])
        assert "Add." in shown and "Adds two numbers." in shown
        assert [message["content"] for message in trajectory.messages[1:2]] == ["3"]
        assert trajectory.messages[1]["role"] == "tool"
        # A task's @stop ends it before the model is asked again; a wrong call isn't told verifiers
        turns = [call("sums_add", a="one"), "please " + call("sums_add", a=1, b=1)]
        trajectory, _ = played(renderer, make, row, [say(renderer, text) for text in turns])
        assert trajectory.stop is Stop.DONE, trajectory.tool_failure
        assert trajectory.turn_rewards == (0.0, 0.5)
    finally:
        let_go(make)
