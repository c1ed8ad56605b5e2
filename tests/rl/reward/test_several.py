"""Several rewards: the sum is the weighted one of what each gives when it is called alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from retool.rl.api import functions_given
from retool.rl.metrics import score_metrics
from retool.rl.reward.builtin import math_score
from retool.rl.reward.calling import Asked
from retool.rl.reward.judges import by_place, open_judges
from retool.rl.reward.protocol import JUDGES_LOST, Judged
from retool.rl.reward.score import score_answer
from retool.rl.reward.several import SeveralJudges, unfolded
from retool.rl.reward.source import RewardSource, find_several, own_reward, several
from retool.rl.types import Scored
from tests.rl.conftest import judged_by, make_trajectory
from tests.rl.reward.reward_functions import digits
from tests.rl.reward.test_async_judge import HERE, SETTINGS, score_all
from tests.rl.reward.test_calling import seen_trajectory
from tests.rl.test_preflight import check, said

WEIGHTS = (1.0, 0.25, -2.0)


def three() -> RewardSource:
    names = ("math", f"{HERE}/digits", f"{HERE}/asynchronous")
    return find_several(names, WEIGHTS)


@pytest.mark.parametrize("more", [{}, pytest.param({"concurrent": True}, marks=pytest.mark.slow)])
def test_the_sum_is_what_each_gives_alone_times_its_weight(more: dict[str, bool]) -> None:
    answers = ["\\boxed{4}", "is 17", "none"]
    judges = open_judges(three(), replace(SETTINGS, **more))

    async def ask() -> list[Judged]:
        return [await judges.score(Asked("x", answer, "4", {})) for answer in answers]

    try:
        found = asyncio.run(ask())
    finally:
        judges.close()
    for answer, judged in zip(answers, found, strict=True):
        right = math_score("x", answer, "4", {})
        share = digits("x", answer, "4", {})
        alone = {"math": right["score"], "digits": share["score"], "asynchronous": 0.25}
        wanted = sum(w * s for w, s in zip(WEIGHTS, alone.values(), strict=True))
        assert judged.failure is None and judged.score == pytest.approx(wanted, abs=1e-12)
        assert {name: judged.info[f"rewards/{name}"] for name in alone} == alone
        # The first tells acc and pred; the second's acc keeps its name
        assert (judged.info["acc"], judged.info["pred"]) == (right["acc"], right["pred"])
        assert judged.info["digits/acc"] == share["acc"]


def test_where_each_is_judged() -> None:
    settings = replace(SETTINGS, concurrent=True)
    places = by_place(three(), settings)
    assert [([part.name for part in group.parts], here) for group, here in places] == [
        (["asynchronous"], True),
        (["math", "digits"], False),
    ]
    ((group, here),) = by_place(three(), SETTINGS)
    assert len(group.parts) == 3 and not here
    with pytest.raises(ValueError, match=r"none of math \+ boxed is one"):
        by_place(find_several(("math", "boxed"), ()), settings)


def test_each_sees_what_it_asks_for_and_none_has_nothing_to_say() -> None:
    def uses(tool_calls: list[Any]) -> float:
        return float(len(tool_calls))

    async def level(row: dict[str, Any], completion: str) -> float | None:
        return row.get("level") if completion else None

    source = several([own_reward(uses), own_reward(level)])
    judges = open_judges(source, SETTINGS)
    assert judges.seen == ("tool_calls", "row")
    silent = replace(seen_trajectory(), assistant_text="")

    async def ask() -> list[Judged]:
        return [await judged_by(judges, answer) for answer in (seen_trajectory(), silent)]

    try:
        both, one = asyncio.run(ask())
    finally:
        judges.close()
    assert (both.score, both.info) == (4.0, {"rewards/uses": 1.0, "rewards/level": 3.0})
    assert (one.score, one.info) == (1.0, {"rewards/uses": 1.0})


class Saying:
    """Judges that say one thing."""

    seen = ()

    def __init__(self, judged: Judged) -> None:
        self.judged = judged
        self.closed = False

    def problem(self) -> str:
        return self.judged.reason

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged:
        return self.judged

    def close(self) -> None:
        self.closed = True


def test_what_one_changes_of_what_it_is_given_the_others_do_not_see() -> None:
    def takes(extra_info: dict[str, Any]) -> float:
        return extra_info.pop("points")

    def takes_too(extra_info: dict[str, Any]) -> float:
        return extra_info.pop("points", 0.0)

    weighed = several([own_reward(takes), own_reward(takes_too)]).load()
    asked = Asked("x", "", "", {"points": 2.0})
    assert score_answer(weighed, asked)[0] == 4.0 and asked.extra == {"points": 2.0}


def test_where_one_fails_the_answer_has_no_score() -> None:
    fine = Saying(Judged(1.0, {"rewards/a": 1.0}))
    failing = Saying(Judged(-2.0, {}, "timeout", "too slow"))
    away = Saying(Judged(-2.0, {}, JUDGES_LOST, "away"))
    silent = Saying(Judged(0.0))

    def of(*members: Saying) -> Judged:
        (judged,) = score_all(SeveralJudges(members, ["a", "b"], -2.0), ["x"])
        assert all(member.closed for member in members)
        return judged

    assert (of(fine, silent).score, of(fine, silent).failure) == (1.0, None)
    assert of(fine, failing).reason == "too slow"
    assert of(fine, failing, away).failure == JUDGES_LOST
    nothing = of(silent, silent)
    assert (nothing.score, nothing.failure) == (-2.0, "exception")
    assert "every reward function returned None" in nothing.reason
    assert SeveralJudges([fine, away], ["a"], 0.0).problem() == "away"


def test_what_parts_tell_alike_keeps_its_name() -> None:
    told = {"b/acc": 0.0, "b/why": "b", "a/acc": 1.0, "rewards/b": 2.0}
    assert unfolded(told, ["a", "b"]) == {"rewards/b": 2.0, "acc": 1.0, "b/acc": 0.0, "why": "b"}


def test_each_is_logged_by_its_name() -> None:
    values = [1.0, 0.0, 4.0]
    infos: list[dict[str, float]] = [{"rewards/short": value} for value in values]
    infos[0]["rewards/polite"] = 0.5
    members = [Scored(make_trajectory(), 0.0, 0.0, info) for info in infos]
    metrics = score_metrics(members)
    assert metrics["rewards/short/mean"] == pytest.approx(np.mean(values))
    assert metrics["rewards/short/std"] == pytest.approx(np.std(values))
    assert (metrics["rewards/polite/mean"], metrics["rewards/polite/std"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("names", "weights", "says"),
    [
        (("math", "boxed"), (1.0,), "2 rewards and 1 weights"),
        (("math", "math"), (), "two rewards are called 'math'"),
        (("math", "maths"), (), "maths is not known"),
    ],
)
def test_what_can_not_be_summed(names: Any, weights: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_several(names, weights)


@pytest.mark.slow
def test_several_in_a_plan(work: Path, tmp_path: Path) -> None:
    from retool.rl.preflight.show import in_words

    names = f"reward_model.functions=[math,{HERE}/digits]"
    more = ["trainer.device=cpu", "reward_model.name=null", names, "reward_model.weights=[1,0.25]"]
    report = check(work, tmp_path / "out", *more)
    assert not report.faults
    assert dict(in_words(report))["reward"] == f"math + 0.25 × digits in {HERE}"
    trait = report.identity["the reward function"]
    assert trait.where == "reward_model.functions" and "0.25 × digits in" in str(trait.value)
    wrong = [
        "reward_model.name=math",
        "reward_model.functions=[boxed]",
        f"custom_reward_function.path={HERE}",
    ]
    text = said(check(work, tmp_path / "out", "trainer.device=cpu", *wrong))
    assert "reward_model.functions: and reward_model.name are both given" in text
    assert "Put it into functions as file.py/function" in text
    alone = check(work, tmp_path / "out", "trainer.device=cpu", "reward_model.weights=[1]")
    assert "reward_model.weights: has nothing to weigh" in said(alone)


def test_in_python_a_list_of_functions_and_names() -> None:
    keys, held = functions_given(["math", digits], [1.0, 0.25], None)
    assert held.reward is not None
    assert [(part.name, part.weight) for part in held.reward.parts] == [
        ("math", 1.0),
        ("digits", 0.25),
    ]
    assert held.reward.key == "reward=math + digits"
    assert keys["custom_reward_function.path"] == "<program>"
    named, nothing = functions_given(["math", "boxed"], None, None)
    assert nothing.reward is None
    assert named == {"reward_model.functions": ["math", "boxed"], "reward_model.weights": []}
    for reward, words in (
        (5, "the reward 5 is no function: give a function"),
        (Saying, "Saying'> is a class: give a function"),
        (["math", None], "the reward None is no function"),
        ([], "there is no reward in the list"),
    ):
        with pytest.raises(ValueError, match=words):
            functions_given(cast(Any, reward), None, None)
    with pytest.raises(ValueError, match=r"a reward's weight isn't finite: \[1.0, nan\]"):
        several([own_reward(len), own_reward(max)], [1.0, float("nan")])
    with pytest.raises(ValueError, match="reward_weights weigh several rewards"):
        functions_given("math", [1.0], None)
