"""A user's own loss and advantage estimator: a run that trains with them, and what is refused
before it starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.preflight.identity import changes
from retool.rl.__main__ import main
from tests.rl.test_command import steps, words
from tests.rl.test_preflight import check, said

LOSS_KEY = "actor_rollout_ref.actor.policy_loss.loss_mode"
ESTIMATOR_KEY = "algorithm.adv_estimator"
# REINFORCE on the sampler's own log-probabilities, and scores against the batch's mean.
OWN = """
import torch

def reinforce(inputs):
    ratio = torch.exp(inputs.logp_T.detach() - inputs.sampler_T)
    loss = inputs.sum(-ratio * inputs.advantages_T * inputs.logp_T)
    apart = inputs.sum(inputs.sequence_log_ratio_T.abs())
    return loss, {"actor/pg_loss": loss.detach(), "actor/mine": apart}

def centred(inputs):
    values = inputs.scores - inputs.scores.mean()
    advantages = [mask * value for mask, value in zip(inputs.masks, values)]
    return advantages, advantages
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_run_trains_with_them(work: Path, tmp_path: Path, own: Path) -> None:
    mine = [f"{LOSS_KEY}={own}/reinforce", f"{ESTIMATOR_KEY}={own}/centred"]
    run = words(work, tmp_path / "run", *mine, "trainer.total_training_steps=2")
    assert main(run) == 0
    first, second = steps(tmp_path / "run")
    assert abs(first["critic/advantages/mean"]) < 0.1 and first["actor/grad_norm"] > 0
    assert first["actor/mine"] == 0.0 and "actor/pg_clipfrac" not in second


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        (LOSS_KEY, "nowhere.py/reinforce", "doesn't exist"),
        (
            LOSS_KEY,
            "own.py/reinforced",
            "has no 'reinforced'; it has Loss, attached, broken, centred",
        ),
        (LOSS_KEY, "own.py/two", "can't be called with one argument"),
        (LOSS_KEY, "own.py/Loss", "give a function (inputs: LossInputs) -> (loss_sum, metrics)."),
        (LOSS_KEY, "own.py/half", "no single number with a gradient"),
        (LOSS_KEY, "own.py/attached", "metric 'actor/x' is no single number without a gradient"),
        (LOSS_KEY, "own.py/broken", "it raises ZeroDivisionError: division by zero"),
        (ESTIMATOR_KEY, "nowhere.py/centred", "doesn't exist"),
        (ESTIMATOR_KEY, "own.py/two", "can't be called with one argument"),
        (ESTIMATOR_KEY, "own.py/short", "gave advantages of 1 trajectories, with 4 tokens"),
        (ESTIMATOR_KEY, "own.py/broken", "it raises ZeroDivisionError: division by zero"),
    ],
)
def test_what_can_not_be_used_is_refused_before_the_run(
    work: Path, tmp_path: Path, own: Path, key: str, name: str, expected: str
) -> None:
    with own.open("a") as file:
        file.write(
            "\ndef two(inputs, more): ...\n"
            "\nclass Loss: ...\n"
            "\ndef half(inputs): return inputs.logp_T, {}\n"
            "\ndef attached(inputs): return inputs.logp_T.sum(), {'actor/x': inputs.logp_T.sum()}\n"
            "\ndef broken(inputs): 1 / 0\n"
            "\ndef short(inputs): return inputs.token_rewards[:1], inputs.token_rewards[:1]\n"
        )
    asked = [f"{key}={tmp_path}/{name}", "trainer.device=cpu", "reward_model.trial_answer=null"]
    report = check(work, tmp_path / "out", *asked)
    assert [fault.where for fault in report.faults] == [key] and expected in said(report)


def test_another_content_is_another_objective(work: Path, tmp_path: Path, own: Path) -> None:
    asked = [f"{LOSS_KEY}={own}/reinforce", "trainer.device=cpu", "reward_model.trial_answer=null"]
    before = check(work, tmp_path / "out", *asked)
    own.write_text(OWN.replace("-ratio", "-2 * ratio"))
    after = check(work, tmp_path / "out", *asked)
    assert not before.faults
    assert [change.where for change in changes(before.record["identity"], after.identity)] == [
        LOSS_KEY
    ]
