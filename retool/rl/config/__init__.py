"""Every key of `python -m retool.rl`, its default and its meaning: a file for each group of keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from retool.config import options
from retool.rl.config.actor import ActorConfig, ModelConfig, RefConfig
from retool.rl.config.algorithm import AlgorithmConfig
from retool.rl.config.data import DataConfig, FunctionConfig
from retool.rl.config.reward import RewardConfig
from retool.rl.config.rollout import RolloutConfig
from retool.rl.config.trainer import TrainerConfig


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    """The policy, its update, its sampling, its reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True)
class RLConfig:
    """Improve a model by reinforcement learning with tools: GRPO, DAPO and their relatives."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    reward_model: RewardConfig = field(default_factory=RewardConfig)
    custom_reward_function: FunctionConfig = field(default_factory=FunctionConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def run_options(config: RLConfig) -> options.RunOptions:
    """What every command has."""
    wanted = config.actor_rollout_ref
    return options.RunOptions(
        trainer=config.trainer,
        model=wanted.model,
        fsdp=wanted.actor.fsdp_config,
        optim=wanted.actor.optim,
        checkpoint=wanted.actor.checkpoint,
        sp=wanted.actor.ulysses_sequence_parallel_size,
        model_key="actor_rollout_ref.model.",
        fsdp_key="actor_rollout_ref.actor.fsdp_config.",
        checkpoint_key="actor_rollout_ref.actor.checkpoint.",
        sp_key="actor_rollout_ref.actor.ulysses_sequence_parallel_size",
        pretrained_key="actor_rollout_ref.model.path",
        command="retool.rl",
        samples=True,
        saves=not config.trainer.val_only,
        subfolder="actor",
        chat_template=config.data.chat_template,
        max_grad_norm=wanted.actor.grad_clip,
    )
