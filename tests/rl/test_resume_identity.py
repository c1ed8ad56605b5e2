"""What makes an RL run this run: its questions and how they are judged, its reward, its tools, its
objective.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retool.preflight.identity import changes
from retool.preflight.ranks.alike import unlike
from retool.preflight.same_everywhere import shared_by_all
from retool.rl.preflight.identity import fingerprint, function_code
from retool.rl.preflight.plan import Questions
from tests.rl.conftest import make_prompt
from tests.rl.test_preflight import ACTOR, check

ARR = "actor_rollout_ref."


def of(*prompts: Any) -> tuple[int, str]:
    questions: Any = SimpleNamespace(prompts=prompts)
    return fingerprint(questions)


def test_questions_are_their_tokens_order_and_answers() -> None:
    a = make_prompt(ids=(1, 2, 3))
    b = make_prompt(ids=(4,))
    assert of(a, b) == of(replace(a, extra_info={"row": "elsewhere"}), b)
    found = {
        of(a, b),
        of(b, a),
        of(a),
        of(make_prompt(ids=(1, 2)), make_prompt(ids=(3, 4))),
        of(make_prompt(truth="5"), b),
    }
    assert len(found) == 5


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial of the reward, which starts processes."""
    monkeypatch.setattr("retool.rl.preflight.checks.try_reward", lambda *_: [])


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    path = tmp_path / "judge.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 1.0\n"
    )
    return path


def test_an_objective_is_compared_where_it_is_used(
    work: Path, tmp_path: Path, reward: Path
) -> None:
    """Another estimator, loss or reward is another run's; another coefficient or learning rate, or
    a key without effect, isn't.
    """
    base = ["trainer.device=cpu", "reward_model.name=null", f"custom_reward_function.path={reward}"]

    def other(*more: str, before: tuple[str, ...] = ()) -> list[str]:
        then = check(work, tmp_path / "out", *base, *before)
        now = check(work, tmp_path / "out", *base, *more)
        assert not then.faults and not now.faults, (then.faults, now.faults)
        return [
            change.where
            for change in changes(
                {name: trait.value for name, trait in then.identity.items()}, now.identity
            )
        ]

    assert (
        other(
            f"{ACTOR}optim.lr=1e-3",
            f"{ACTOR}clip_ratio=0.1",
            f"{ACTOR}kl_loss_type=k1",
            f"{ARR}rollout.temperature=0.5",
        )
        == []
    )
    assert other("algorithm.adv_estimator=rloo") == [
        "algorithm.adv_estimator",
        "algorithm.norm_adv_by_std_in_grpo",
    ]
    assert other(f"{ACTOR}policy_loss.loss_mode=gspo") == [
        f"{ACTOR}policy_loss.loss_mode",
        f"{ACTOR}loss_agg_mode",
    ]
    assert other(f"{ACTOR}use_kl_loss=true") == [f"{ACTOR}use_kl_loss", f"{ACTOR}kl_loss_type"]
    assert other("reward_model.overlong_buffer.enable=true") == ["reward_model.overlong_buffer"]
    assert other("custom_reward_function.path=null", "reward_model.name=math") == [
        "reward_model.name"
    ]
    tools = [
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_config_path={work}/tools.yaml",
    ]
    assert other(*tools, "data.max_prompt_length=4000") == [
        "data.train_files",
        f"{ARR}rollout.multi_turn.tool_config_path",
        f"{ARR}rollout.multi_turn.format",
    ]


def test_a_reward_function_is_what_its_file_says(work: Path, tmp_path: Path, reward: Path) -> None:
    more = ["trainer.device=cpu", "reward_model.name=null", f"custom_reward_function.path={reward}"]
    then = {
        name: trait.value for name, trait in check(work, tmp_path / "out", *more).identity.items()
    }
    reward.write_text(reward.read_text().replace("1.0", "0.0"))
    (change,) = changes(then, check(work, tmp_path / "out", *more).identity)
    assert (
        change.where == "custom_reward_function.path"
        and not change.strict
        and "compute_score in judge.py (" in change.words
    )


def test_with_a_reference_its_weights_are_strict(work: Path, tmp_path: Path) -> None:
    for more, strict in (([], False), ([f"{ACTOR}use_kl_loss=true"], True)):
        report = check(work, tmp_path / "out", "trainer.device=cpu", *more)
        assert (
            report.identity["the model's weights"].strict == strict
            and report.identity["questions"].strict
        )


def test_ranks_compare_all_that_a_step_uses_of_a_row(work: Path, tmp_path: Path) -> None:
    """Whatever isn't in the prompt too, but not where the row lies."""
    report = check(work, tmp_path / "out", "trainer.device=cpu")
    questions = report.train
    assert questions is not None
    first = questions.prompts[0]
    assert "row" in first.extra_info

    def among_others(**changed: Any) -> Any:
        prompts = [replace(first, **changed), *questions.prompts[1:]]
        return replace(report, train=replace(questions, prompts=prompts))

    elsewhere = among_others(extra_info={**first.extra_info, "row": "elsewhere"})
    assert elsewhere.fingerprints == report.fingerprints
    for other in (among_others(extra_info={"level": 3}), among_others(row={"tests": "x"})):
        assert other.fingerprints != report.fingerprints
        (fault,) = unlike(["a", "b"], [shared_by_all(report), shared_by_all(other)])
        assert fault.where == "data.train_files"


def test_code_without_a_source_is_the_same_in_each_process() -> None:
    """The order of the set that a comparison is compiled to isn't, no more than an address."""

    def code_of(test: str) -> list[str | bytes]:
        names: dict[str, Any] = {}
        exec(f"def judge(said):\n    return said in {test}", names)
        return [*function_code(names["judge"])]

    assert code_of("{0, 8}") == code_of("{8, 0}") != code_of("{0, 9}")


def test_what_is_a_processs_own_is_not_compared() -> None:
    """The order of a set and the address of an object: the row is the same one."""

    def of_row(things: set[int]) -> tuple[int, str]:
        prompt = replace(make_prompt(extra={"things": things}), row={"image": object()})
        unread: Any = None
        return Questions([prompt], unread).fingerprint

    first, second = {0, 8}, {8, 0}
    assert str(first) != str(second)
    assert of_row(first) == of_row(second) != of_row({0, 9})


def test_ranks_compare_what_a_reward_function_says(
    work: Path, tmp_path: Path, reward: Path
) -> None:
    """It may lie at another path."""
    named = "custom_reward_function.name=compute_score"
    keys = ("trainer.device=cpu", "reward_model.name=null", named)
    copies = [tmp_path / name / "judge.py" for name in "ab"]
    for copy in copies:
        copy.parent.mkdir()
        copy.write_text(reward.read_text())
    copies[1].write_text(reward.read_text().replace("1.0", "2.0"))
    said = [
        shared_by_all(check(work, tmp_path / "out", *keys, f"custom_reward_function.path={copy}"))
        for copy in copies
    ]
    (fault,) = unlike(["a", "b"], said)
    assert fault.where == "custom_reward_function.path" and "(on b)" in fault.problem
