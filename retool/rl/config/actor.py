"""`actor_rollout_ref.{model,actor,ref}.*`: the policy, its update, its reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retool.config import REQUIRED, option, options
from retool.config.options import CheckpointConfig, FSDPConfig
from retool.rl.config.algorithm import KL, KL_SPELLINGS


@dataclass(frozen=True)
class ModelConfig(options.DecoderConfig):
    """The policy."""

    path: str = option(
        REQUIRED,
        "Hugging Face model folder or hub id, such as global_step_N/huggingface of an SFT run.",
    )


@dataclass(frozen=True)
class OptimConfig(options.AdamWConfig):
    """AdamW and its schedule."""

    lr: float = option(1e-6, "Peak learning rate.", above=0)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "AdamW's decay rates.", minimum=0, maximum=0.999999
    )
    lr_scheduler: Literal["cosine", "wsd", "constant"] = option(
        "constant", "Shape of the schedule after warm-up."
    )
    warmup_steps_ratio: float = option(
        0.0, "Share of the optimizer steps that warm up linearly.", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy loss."""

    loss_mode: str = option(
        "vanilla",
        "vanilla (PPO with dual clip), gspo (arXiv 2507.18071), cispo (arXiv 2506.13585), or "
        "file.py/function.",
    )


@dataclass(frozen=True)
class ActorConfig:
    """The update."""

    ppo_mini_batch_size: int = option(
        64, "Prompts per optimizer step over all GPUs; each has n answers.", minimum=1
    )
    ppo_micro_batch_size_per_gpu: int | None = option(
        None, "Trajectories per micro-batch, with use_dynamic_bsz=false.", minimum=1
    )
    use_dynamic_bsz: bool = option(
        True, "Make micro-batches by tokens (ppo_max_token_len_per_gpu), not by trajectories."
    )
    ppo_max_token_len_per_gpu: int = option(
        16384,
        "Token budget of a micro-batch per GPU (a sequence-parallel group holds that "
        "times its size).",
        minimum=1,
    )
    ppo_epochs: int = option(1, "Passes over a step's batch.", minimum=1)
    clip_ratio: float = option(
        0.2,
        "Clip ratio in both directions, unless clip_ratio_low or clip_ratio_high is given.",
        above=0,
    )
    clip_ratio_low: float = option(
        "${actor_rollout_ref.actor.clip_ratio}", "The ratio is clipped below 1 - this.", above=0
    )
    clip_ratio_high: float = option(
        "${actor_rollout_ref.actor.clip_ratio}", "The ratio is clipped above 1 + this.", above=0
    )
    clip_ratio_c: float = option(
        3.0,
        "Dual clip: the ratio of a token with a negative advantage counts as at most this.",
        above=1,
    )
    use_kl_loss: bool = option(False, "Add the KL to the reference policy to the loss.")
    kl_loss_coef: float = option(0.001, "Coefficient of the KL loss.", minimum=0)
    kl_loss_type: KL = option(
        "k3",
        "Estimator of the KL in the loss; with + it has the gradient of k2.",
        spellings=KL_SPELLINGS,
    )
    entropy_coeff: float = option(0.0, "Coefficient of the entropy bonus.")
    loss_agg_mode: (
        Literal[
            "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
        ]
        | None
    ) = option(
        None,
        (
            "How the losses of tokens become one number; null = as the loss was "
            "published: seq-mean-token-mean for gspo, else token-mean."
        ),
    )
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    grad_clip: float = option(1.0, "Largest global gradient norm.", above=0)
    ulysses_sequence_parallel_size: int = option(
        1, "GPUs that share one sequence in training.", minimum=1
    )
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    strategy: Literal["fsdp"] = option("fsdp", "fsdp2 means the same.", spellings={"fsdp2": "fsdp"})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class RefConfig:
    """Log-probabilities without gradients: of the old policy and of the reference."""

    log_prob_max_token_len_per_gpu: int | None = option(
        None, "Token budget of a micro-batch per GPU; null = the actor's.", minimum=1
    )
    param_offload: bool = option(False, "Keep the reference's weights in host memory.")
