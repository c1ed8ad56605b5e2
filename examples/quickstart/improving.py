"""Reinforcement learning on from the SFT's half-way checkpoint: the published command for two CPU
processes, and what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.quickstart.data import TOOL
from examples.quickstart.evaluate import parse_turn
from examples.quickstart.training import Step, bar

# of a step: questions, and answers to each
PROMPTS = 16
SAMPLES = 8
HELD_OUT_SAMPLES = 4
ACCURACY = f"val-core/shop/acc/mean@{HELD_OUT_SAMPLES}"
EVERY = 3  # steps between lines
ARR = "actor_rollout_ref"


def write_tools(path: Path, isolation: str, seconds: float, memory_mb: int, workers: int) -> None:
    """The tool file: the SFT data's tool, run by the embedded sandbox."""
    config = {
        "isolation": isolation,
        "default_timeout": seconds,
        "memory_limit_mb": memory_mb,
        "num_workers": workers,
    }
    tool = {
        "class_name": "retool.rl.agent.tools.CodeInterpreter",
        "config": config,
        "tool_schema": TOOL,
    }
    path.write_text(yaml.safe_dump({"tools": [tool]}, sort_keys=False))


def rl_words(
    train: Path, held_out: Path, tools: Path, model: Path, run: Path, steps: int, seed: int
) -> list[str]:
    """DAPO as published, with the demo's paths and sizes: asymmetric clipping, groups without a
    signal sampled anew, token mean.
    """
    return [
        "--nnodes=1",
        "--nproc_per_node=2",
        "-m",
        "retool.rl",
        "algorithm.adv_estimator=grpo",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "algorithm.filter_groups.max_num_gen_batches=2",
        f"data.train_files={train}",
        f"data.val_files={held_out}",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=128",
        "data.max_response_length=128",
        "reward_model.name=retool",
        "reward_model.num_workers=1",
        f"{ARR}.model.path={model}",
        f"{ARR}.actor.clip_ratio_low=0.2",
        f"{ARR}.actor.clip_ratio_high=0.28",
        f"{ARR}.actor.clip_ratio_c=10.0",
        f"{ARR}.actor.optim.lr=3e-4",
        f"{ARR}.actor.ppo_mini_batch_size={PROMPTS}",
        f"{ARR}.rollout.n={SAMPLES}",
        f"{ARR}.rollout.multi_turn.enable=true",
        f"{ARR}.rollout.multi_turn.format=hermes",
        f"{ARR}.rollout.multi_turn.max_assistant_turns=4",
        f"{ARR}.rollout.multi_turn.max_user_turns=4",
        f"{ARR}.rollout.multi_turn.tool_config_path={tools}",
        f"{ARR}.rollout.val_kwargs.n={HELD_OUT_SAMPLES}",
        'trainer.logger=["console"]',
        f"trainer.default_local_dir={run}",
        "trainer.project_name=demo",
        "trainer.experiment_name=shop-dapo",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={max(1, steps // 3)}",
        f"trainer.seed={seed}",
        "trainer.device=cpu",
    ]


def step_line(steps: Sequence[Step]) -> str | None:
    """Accuracy on held-out questions whenever it was measured; every few steps what was sampled for
    training.
    """
    step = steps[-1]
    at = f"  step {int(step['step']):3d}/{int(step['steps'])}"
    if ACCURACY in step:
        return f"{at}  held-out questions: {step[ACCURACY]:4.0%} right  {bar(step[ACCURACY])}"
    if "tool/calls" not in step or step["step"] % EVERY:
        return None
    calls = int(step["tool/calls"])
    wrong = int(step["tool/errors"])
    reward = f"reward {step['critic/score/mean']:5.2f}, " if "critic/score/mean" in step else ""
    return f"{at}  {reward}{calls} tool calls, {wrong} of them invalid or failed"


def training_calls(steps: Sequence[Step]) -> int:
    """Tool calls of all trajectories that were trained on."""
    return round(sum(step.get("tool/calls", 0.0) for step in steps))


@dataclass(frozen=True)
class Answers:
    """Counts over sampled answers: tool calls tried and, of these, malformed ones; answers right;
    the mean reward.
    """

    answers: int
    right: int
    calls: int
    malformed: int
    reward: float


def read_answers(run: Path, step: int) -> list[dict[str, Any]]:
    """The validation transcripts of a step, in the same order at every step."""
    return [
        json.loads(line) for line in (run / f"report/val_{step:06d}.jsonl").read_text().splitlines()
    ]


def count(transcripts: Sequence[dict[str, Any]]) -> Answers:
    """Sum up; what counts as malformed is what does in the SFT's evaluation."""
    tried = [turn for t in transcripts for turn in own_turns(t) if "tool_call>" in turn]
    malformed = sum(parse_turn(turn) is None for turn in tried)
    right = sum(t["info"]["acc"] == 1 for t in transcripts)
    return Answers(
        len(transcripts),
        right,
        len(tried),
        malformed,
        sum(t["reward"] for t in transcripts) / len(transcripts),
    )


def own_turns(transcript: dict[str, Any]) -> list[str]:
    """What the model wrote, turn by turn."""
    return [segment["text"] for segment in transcript["segments"] if segment["role"] == "assistant"]


def changed(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The same sample before and after, the first that went from wrong to right, one with a
    malformed call if there is one.
    """
    pairs = [
        (b, a)
        for b, a in zip(before, after, strict=True)
        if b["info"]["acc"] != 1 and a["info"]["acc"] == 1
    ]
    malformed = [(b, a) for b, a in pairs if count([b]).malformed]
    return next(iter(malformed or pairs), None)
