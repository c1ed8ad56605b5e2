"""A run against a plain program that computes the same update: transformers' model, torch's AdamW,
one trajectory after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from retool.rl import train
from retool.rl.__main__ import main
from retool.rl.types import Group, Trajectory
from tests.rl.killed import steps
from tests.rl.test_command import ARR, weights, words

LOOPS = Path(__file__).parent / "agent" / "own_loops.py"
STEPS = 2
TEMPERATURE = 0.7
RATE = 3e-3
LOW, HIGH, CEILING = 0.01, 0.02, 1.03
ENTROPY = 0.02
KL_LOSS = 0.3
MOST_WEIGHT = 0.9005  # top_p makes them a little more than 0.9
LONGEST, BUFFER = 26, 10
TARGET, HORIZON = 0.01, 100
OPTIONS = [
    f"trainer.total_training_steps={STEPS}",
    "trainer.val_before_train=false",
    "trainer.test_freq=1",
    f"{ARR}rollout.val_kwargs.temperature={TEMPERATURE}",
    f"data.max_response_length={LONGEST}",
    "data.gen_batch_size=6",
    f"{ARR}rollout.agent.path={LOOPS}",
    f"{ARR}rollout.agent.name=asking_again",
    f"{ARR}rollout.temperature={TEMPERATURE}",
    f"{ARR}rollout.top_p=0.9",
    f"{ARR}actor.ppo_mini_batch_size=2",
    f"{ARR}actor.ppo_epochs=2",
    f"{ARR}actor.ppo_max_token_len_per_gpu=150",
    f"{ARR}actor.clip_ratio_low={LOW}",
    f"{ARR}actor.clip_ratio_high={HIGH}",
    f"{ARR}actor.clip_ratio_c={CEILING}",
    f"{ARR}actor.loss_agg_mode=seq-mean-token-mean",
    f"{ARR}actor.entropy_coeff={ENTROPY}",
    f"{ARR}actor.use_kl_loss=true",
    f"{ARR}actor.kl_loss_coef={KL_LOSS}",
    f"{ARR}actor.kl_loss_type=k2",
    f"{ARR}actor.optim.lr={RATE}",
    f"{ARR}actor.optim.lr_scheduler=cosine",
    f"{ARR}actor.optim.warmup_steps_ratio=0.25",
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.metric=reward",
    "algorithm.norm_adv_by_std_in_grpo=false",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_penalty=abs",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.kl_coef=0.2",
    f"algorithm.kl_ctrl.target_kl={TARGET}",
    f"algorithm.kl_ctrl.horizon={HORIZON}",
    "algorithm.rollout_correction.rollout_is=token",
    f"algorithm.rollout_correction.rollout_is_threshold={MOST_WEIGHT}",
    "reward_model.overlong_buffer.enable=true",
    f"reward_model.overlong_buffer.len={BUFFER}",
    "reward_model.overlong_buffer.penalty_factor=0.5",
]


@dataclass
class Plain:
    """A policy, its reference and optimizer, and what it told of its updates."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    optimizer: torch.optim.Optimizer
    kl_coef: float = 0.2
    updates: int = 0
    told: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def of(folder: Path) -> Plain:
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2)
        )
        rates = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        return Plain(policy, reference, torch.optim.AdamW(policy.parameters(), **rates))

    def train(self, groups: list[Group], asked_before: int) -> None:
        """A step: everything that is read before the first update, then the updates. Of the groups
        some are of the step before: questions whose place in the stream is below `asked_before`.
        """
        members = [member for group in groups for member in group.members]
        found = [member.trajectory for member in members]
        with torch.no_grad():
            ref = [sampled(self.reference, t)[0] for t in found]
            present = [sampled(self.policy, t)[0] for t in found]
        drawn = [told_by(t.logp, t) for t in found]
        fresh = [t.prompt.index >= asked_before for t in found]
        assert any(fresh)
        for of_sampler, of_trainer, new in zip(drawn, present, fresh, strict=True):
            assert torch.allclose(of_sampler, of_trainer, atol=1e-4) == new
        old = [p if new else d for p, d, new in zip(present, drawn, fresh, strict=True)]
        penalties = [(a - b).abs() for a, b in zip(old, ref, strict=True)]
        rewards = [
            member.score + too_long(member.trajectory) - self.kl_coef * float(penalty.sum())
            for member, penalty in zip(members, penalties, strict=True)
        ]
        size = len(groups[0].members)
        advantages = np.array(rewards).reshape(-1, size)
        advantages = (advantages - advantages.mean(1, keepdims=True)).reshape(-1)
        behaviour = [told_by(t.logp_behaviour, t) for t in found]
        corrections = [
            (a - b).exp().clamp(max=MOST_WEIGHT) for a, b in zip(old, behaviour, strict=True)
        ]
        for _ in range(2):
            for first in range(0, len(found), 2 * size):
                chosen = range(first, min(first + 2 * size, len(found)))
                loss = torch.zeros((), dtype=torch.float64)
                for i in chosen:
                    weighted = advantages[i] * corrections[i]
                    loss = loss + self.loss(found[i], weighted, old[i], ref[i]) / len(chosen)
                self.update(loss)
        kl = float(torch.cat(penalties).mean())
        error = min(max(kl / TARGET - 1, -0.2), 0.2)
        self.told.append({"kl": kl, "coef": self.kl_coef, "reward": float(np.mean(rewards))})
        self.kl_coef *= 1 + error * len(found) / HORIZON

    def loss(self, trajectory: Trajectory, advantages, old, ref) -> torch.Tensor:
        logp, entropy = sampled(self.policy, trajectory)
        ratio = (logp - old).exp()
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH))
        most = torch.where(advantages < 0, -advantages * CEILING, torch.inf)
        divergence = 0.5 * (ref - logp).square()
        return (torch.minimum(losses, most) - ENTROPY * entropy + KL_LOSS * divergence).mean()

    def update(self, loss: torch.Tensor) -> None:
        total = STEPS * 4
        warmup = total // 4
        rate = RATE * (self.updates + 1) / warmup
        if self.updates >= warmup:
            progress = (self.updates - warmup) / (total - warmup)
            rate = RATE * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.updates += 1


def sampled(model: torch.nn.Module, trajectory: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) of the tokens that the model wrote, at the run's temperature."""
    ids = torch.from_numpy(trajectory.tokens).long()[None]
    every = log_softmax(model(ids).logits[0, :-1] / TEMPERATURE, -1)
    chosen = torch.from_numpy(trajectory.mask[1:])
    logp = every.gather(1, ids[0, 1:, None])[:, 0]
    return logp[chosen], -(every.exp() * every).sum(-1)[chosen]


def told_by(values: np.ndarray, trajectory: Trajectory) -> torch.Tensor:
    return torch.from_numpy(values[trajectory.mask]).double()


def too_long(trajectory: Trajectory) -> float:
    length = len(trajectory.tokens) - len(trajectory.prompt.ids)
    return min(0.0, -0.5 * (length - (LONGEST - BUFFER)) / BUFFER)


def test_a_run_is_what_a_plain_program_computes(work, tmp_path, monkeypatch) -> None:
    """With groups kept from the step before, tokens that others wrote, everything that the loss and
    the reward may have added, and each clip at work.
    """
    plain = Plain.of(work / "model")

    def observed(run, state, times):
        asked_before = state.position
        found = collect(run, state, times)
        assert found is not None
        taken.append((found.groups, asked_before))
        return found

    def validated(*args):
        answered = sample(*args)
        checked.append([member.trajectory for group in answered for member in group.members])
        return answered

    taken: list[tuple[list[Group], int]] = []
    checked: list[list[Trajectory]] = []
    collect = train.collect
    sample = train.sample
    monkeypatch.setattr(train, "collect", observed)
    monkeypatch.setattr(train, "sample", validated)
    assert main(words(work, tmp_path, *OPTIONS, f"data.val_files={work}/val.jsonl")) == 0
    asked = [[group.prompt.index for group in groups] for groups, _ in taken]
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]  # places in the stream: each is trained once
    for (groups, asked_before), answers in zip(taken, checked, strict=True):
        plain.train(groups, asked_before)
        assert len(answers) == 3
        for answer in answers:  # a validation asks what came of the last update
            wanted = sampled(plain.policy, answer)[0].detach()
            assert torch.allclose(told_by(answer.logp, answer), wanted, atol=2e-3)
    entries = steps(tmp_path)
    for entry, told in zip(entries, plain.told, strict=True):
        assert entry["actor/reward_kl_penalty"] == pytest.approx(told["kl"], rel=1e-3, abs=1e-6)
        assert entry["actor/reward_kl_penalty_coeff"] == pytest.approx(told["coef"], rel=1e-6)
        assert entry["critic/rewards/mean"] == pytest.approx(told["reward"], rel=1e-3)
        at_work = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "rollout_correction/cut")
        assert all(0 < entry[name] < 1 for name in at_work)
        assert 0 < entry["training/rollout_logp_diff_mean"] < 1e-5  # of those just sampled
    assert [entry["filter/groups_reused"] for entry in entries] == [0, 2]
    before = plain.reference.state_dict()
    after = plain.policy.state_dict()
    apart = moved = 0.0
    for name, value in weights(tmp_path, STEPS).items():
        apart += float((value.double() - after[name]).square().sum())
        moved += float((after[name] - before[name]).square().sum())
    assert moved > 1e-3 and (apart / moved) ** 0.5 < 1e-3
