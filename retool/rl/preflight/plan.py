"""What preflight finds of an RL run: its prompts, tools and reward, and the memory of a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retool.config.options import RunOptions
from retool.data.render.renderer import Renderer
from retool.preflight.identity import digest
from retool.preflight.plan import Fingerprint, RunReport, gpu_memory, setting_of
from retool.rl.agent.environments.load import EnvironmentSource
from retool.rl.agent.loops.load import LoopSource
from retool.rl.agent.reading.form import Format
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.config import RLConfig, run_options
from retool.rl.data import PromptReport
from retool.rl.objective.advantages import Estimator
from retool.rl.objective.losses import PolicyLoss
from retool.rl.preflight.memory import StepMemory, engine_options, step_memory
from retool.rl.reward.model_judge import reward_model_bytes, reward_model_folder
from retool.rl.reward.source import RewardSource
from retool.rl.types import Prompt, beside_json


@dataclass(frozen=True)
class Questions:
    """The prompts of training or of validation, and a report on the rows that they come from."""

    prompts: list[Prompt]
    said: PromptReport

    @property
    def fingerprint(self) -> Fingerprint:
        """(questions, hash of all that a step may use of them, in their order)."""
        parts = (
            part
            for prompt in self.prompts
            for part in (
                prompt.ids.tobytes(),
                prompt.data_source,
                prompt.truth_text,
                _given_besides(prompt),
            )
        )
        return len(self.prompts), digest(*parts)


@dataclass(frozen=True)
class Held:
    """What the program that asks for a run holds, instead of naming files: its reward, its
    environment, its loop, and its tools (None: as the configuration says).
    """

    reward: RewardSource | None = None
    tools: Sequence[Any] | None = None
    environment: EnvironmentSource | None = None
    loop: LoopSource | None = None


NOTHING_HELD = Held()


@dataclass(frozen=True)
class RLReport(RunReport):
    """What preflight found. Without faults everything but `val`, `calls`, `environment` and `loop` is
    there.

    `calls` is how the model writes them, by name; None where nobody could answer one. `sees` names
    what the reward asks for besides what every reward gets.
    """

    config: RLConfig
    renderer: Renderer | None = None
    tools: tuple[AnyTool, ...] = ()
    calls: tuple[str, Format] | None = None
    environment: EnvironmentSource | None = None
    loop: LoopSource | None = None
    reward: RewardSource | None = None
    sees: tuple[str, ...] = ()
    estimator: Estimator | None = None
    loss: PolicyLoss | None = None
    train: Questions | None = None
    val: Questions | None = None

    @property
    def options(self) -> RunOptions:
        return run_options(self.config)

    @property
    def steps_of_data(self) -> int:
        prompts = len(self.train.prompts) if self.train else 0
        return prompts * self.config.trainer.total_epochs // self.config.data.train_batch_size

    @property
    def fingerprints(self) -> dict[str, Fingerprint]:
        splits = {"data.train_files": self.train, "data.val_files": self.val}
        return {
            key: (0, "") if questions is None else questions.fingerprint
            for key, questions in splits.items()
        }

    @property
    def memory(self) -> StepMemory:
        """The memory of a step by phase, the engine's part included."""
        wanted = self.config.actor_rollout_ref
        assert self.model is not None and self.choice is not None
        return step_memory(
            self.model,
            setting_of(self.options, self.world),
            self.choice,
            engine_options(self.config),
            wanted.rollout.tensor_model_parallel_size,
            wanted.rollout.free_cache_engine,
            uses_reference(self.config),
            gpu_memory(self.options),
            backend=wanted.rollout.name,
            judge=self.judge_bytes,
        )

    @property
    def judge_bytes(self) -> float:
        """Bytes of a reward model's weights on each GPU that samples; 0 without one."""
        if self.reward is None or not self.reward.asks_a_model:
            return 0.0
        return float(reward_model_bytes(reward_model_folder(self.config.reward_model.model)))

    @property
    def aggregation(self) -> str:
        """How token losses become one number."""
        assert self.loss is not None
        return self.loss.aggregated_by(self.config.actor_rollout_ref.actor.loss_agg_mode)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in a step with a full batch."""
        actor = self.config.actor_rollout_ref.actor
        return -(-self.config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs


def _given_besides(prompt: Prompt) -> str:
    """What rewards, tools and environments are given of a row, but for where it lies."""
    extra = {name: value for name, value in prompt.extra_info.items() if name != "row"}
    return json.dumps([extra, dict(prompt.row)], default=beside_json)


def uses_reference(config: RLConfig) -> bool:
    """Whether a reference policy is needed."""
    return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
