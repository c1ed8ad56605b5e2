"""Reinforcement learning on one page: sample groups, judge, GRPO, update, sync, again.

No trainer, no configuration.

    python examples/rl_from_scratch.py MODEL_FOLDER [STEPS]

It rewards answers that consist of digits, which any model learns in a few dozen steps.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.render.renderer import Renderer
from retool.data.tokens.load import load_tokenizer
from retool.engine import Engine, EngineOptions
from retool.model.catalogue.families import read_model_config
from retool.optim import AdamW, AdamWOptions
from retool.parallel.mesh import make_mesh
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import RolloutParts, Sampling, roll_out
from retool.rl.objective.advantages import grpo
from retool.rl.objective.batching import Budget, Row, rank_batches
from retool.rl.objective.policy import LossSpec, update_step
from retool.rl.reward.calling import Asked
from retool.rl.reward.protocol import Judged
from retool.rl.types import Prompt

PROMPTS = 4
SAMPLES = 8
TOKENS = 12
LR = 1e-2


class Digits:
    """Scores the share of digits.

    (A reward that runs code or could hang belongs into a `RewardPool`.)
    """

    seen = ()

    async def score(self, asked: Asked) -> Judged:
        text = asked.solution
        return Judged(sum(c.isdigit() for c in text) / max(len(text), 1))


def main(folder: Path, steps: int) -> list[float]:
    """The mean score of each step."""
    mesh = make_mesh()
    model = load_pretrained(folder, mesh)
    optimizer = AdamW(model, AdamWOptions(betas=(0.9, 0.99), weight_decay=0.0))
    engine = Engine(
        read_model_config(folder), mesh.device, EngineOptions(max_num_seqs=PROMPTS * SAMPLES)
    )
    renderer = Renderer(load_tokenizer(str(folder)))
    rollout = RolloutParts(engine, Digits(), {}, renderer, AgentOptions(max_response_length=TOKENS))
    prompts = []
    for i in range(PROMPTS):
        messages = [{"role": "user", "content": f"What is {3 * i + 1} plus {i + 2}?"}]
        prompts.append(
            Prompt(
                i,
                messages,
                None,
                np.asarray(renderer.render_prompt(messages), np.int32),
                "sums",
                str(4 * i + 3),
            )
        )
    means = []
    for step in range(steps):
        engine.sync(model)
        scored = asyncio.run(
            roll_out(
                rollout, [(p, k) for p in prompts for k in range(SAMPLES)], Sampling(seed=1), step
            )
        )
        assert scored is not None
        scores = np.array([s.reward for s in scored])
        groups = np.array([s.trajectory.prompt.index for s in scored])
        rows = []
        for s, advantage in zip(scored, grpo(scores, groups), strict=True):
            t = s.trajectory
            rows.append(
                Row(
                    t.tokens,
                    t.mask,
                    old=t.logp,
                    sampler=t.logp,
                    advantage=np.where(t.mask, advantage, 0.0),
                    correction=t.mask.astype(np.float64),
                )
            )
        batches = rank_batches(
            rows, "token-mean", TOKENS, mesh.dp_rank, mesh.dp, mesh.sp, Budget(4096)
        )
        done = update_step(model, optimizer, batches, LossSpec(on_policy=True), LR)
        means.append(float(scores.mean()))
        print(
            f"step {step + 1}: score {means[-1]:.3f}, gradient norm {done.grad_norm:.3f}, entropy "
            f"{done.metrics['actor/entropy']:.2f}"
        )
    return means


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
