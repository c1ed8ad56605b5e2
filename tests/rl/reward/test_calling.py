"""What a reward function is given: what its signature names, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retool.rl.preflight.trial import try_reward
from retool.rl.reward.calling import SEEN, Asked, adapted, seen_by
from retool.rl.reward.judges import open_judges
from retool.rl.reward.source import RewardSource
from retool.rl.types import ToolUse, Trajectory
from tests.rl.conftest import judged_by, make_prompt, make_trajectory
from tests.rl.reward.test_async_judge import HERE, SETTINGS
from tests.rl.test_preflight import check, said

SAID = [
    {"role": "assistant", "content": "<tool_call>…"},
    {"role": "tool", "content": "391", "name": "sum"},
    {"role": "assistant", "content": "It is 391."},
]


def seen_trajectory(row: dict[str, Any] | None = None) -> Trajectory:
    """Two turns and a call between them, the first turn rewarded by its tool."""
    prompt = replace(make_prompt(truth="391"), row=row or {"question": "?", "level": 3})
    return make_trajectory(
        prompt,
        text="It is 391.",
        messages=SAID,
        tool_uses=[ToolUse(0, "sum", {"a": 17}, "success", "391")],
        turn_rewards=(0.25, 0.0),
    )


def called(function: Any, trajectory: Trajectory | None = None) -> Any:
    usable = adapted(function, "it", "f")
    asked = Asked.about(trajectory or seen_trajectory(), seen_by(usable))
    return usable(**asked.arguments())


def test_a_function_sees_what_it_names() -> None:
    question = {"role": "user", "content": "?"}
    assert called(lambda messages: messages) == [question, *SAID]
    assert called(lambda response, solution_str: (response, solution_str)) == (SAID, "It is 391.")
    assert called(lambda tool_calls: tool_calls) == [
        {"turn": 0, "name": "sum", "arguments": {"a": 17}}
    ]
    assert called(lambda tool_results: tool_results) == [
        {"turn": 0, "name": "sum", "status": "success", "content": "391"}
    ]
    assert called(lambda turn_rewards, row: (turn_rewards, row["level"])) == ([0.25, 0.0], 3)


def test_a_function_of_today_gets_what_it_got_and_pays_for_nothing_more() -> None:
    def score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
        return 1.0

    def lenient(data_source: str, solution_str: str, **more: Any) -> dict[str, Any]:
        return more

    assert adapted(score, "it", "score") is score and not seen_by(score)
    assert set(called(lenient)) == {"ground_truth", "extra_info"}
    everything = Asked.about(seen_trajectory(), SEEN).arguments()
    assert set(everything) == {*SEEN, "data_source", "solution_str", "ground_truth", "extra_info"}


def test_a_function_of_trls_gets_lists_of_one() -> None:
    def by_messages(completions: list[Any], prompts: list[Any], **columns: Any) -> list[float]:
        assert columns["level"] == [3] and "prompt" not in columns
        assert prompts == [[{"role": "user", "content": "?"}]]
        return [float(len(answer)) for answer in completions]

    def by_text(prompts: list[str], completions: list[str], level: list[int]) -> list[float]:
        return [len(p) + len(c) + n for p, c, n in zip(prompts, completions, level, strict=True)]

    async def later(completions: list[Any], **_: Any) -> list[float]:
        return [0.5 for _ in completions]

    assert called(by_messages) == 3.0
    assert called(by_text, seen_trajectory({"prompt": "Why?", "level": 3})) == 4 + 10 + 3
    assert asyncio.run(called(later)) == 0.5
    with pytest.raises(ValueError, match="asks for 'depth', which is no column"):
        called(lambda completions, depth: [1.0])
    with pytest.raises(ValueError, match=r"returned \[1.0, 2.0\]: return a list with a number"):
        called(lambda completions: [1.0, 2.0])


@pytest.mark.parametrize("more", [{}, {"concurrent": True}])
def test_in_a_process_of_its_own_it_sees_the_same(more: dict[str, bool]) -> None:
    judges = open_judges(RewardSource("seeing", HERE), replace(SETTINGS, **more))
    try:
        judged = asyncio.run(judged_by(judges, seen_trajectory()))
    finally:
        judges.close()
    assert (judged.score, judged.info) == (1.25, {"last": "It is 391.", "level": 3})


def test_what_it_sees_is_tried_before_the_run_and_told(work: Path, tmp_path: Path) -> None:
    more = ["trainer.device=cpu", f"reward_model.name={HERE}/seeing"]
    report = check(work, tmp_path / "out", *more)
    assert "asks for 'level'" not in said(report)
    assert report.sees == ("response", "tool_calls", "turn_rewards", "row")
    # The made answer has no call, and these rows have no level: the function's own failure is shown
    (fault,) = report.faults
    assert "KeyError: 'level'" in fault.problem
    assert report.train is not None and report.train.prompts[0].row["data_source"] == "shop"
    prompt = replace(make_prompt(), row={"level": 3})
    assert not list(try_reward(RewardSource("seeing", HERE), SETTINGS, [prompt]))
