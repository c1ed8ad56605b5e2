"""Every key of `python -m retool.rl`, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from retool.config import REQUIRED, option, options
from retool.config.options import DTYPE_SPELLINGS, AutoDtype, CheckpointConfig, FSDPConfig

KL = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]
KL_SPELLINGS = {
    "kl": "k1",
    "mse": "k2",
    "low_var_kl": "k3",
    "kl+": "k1+",
    "mse+": "k2+",
    "low_var_kl+": "k3+",
}
ANSWER_FORMAT = "The answer format must be: \\boxed{'The final answer goes here.'}"


@dataclass(frozen=True)
class KLControlConfig:
    """The coefficient of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = option(
        "fixed", "adaptive moves the coefficient towards target_kl (arXiv 1909.08593)."
    )
    kl_coef: float = option(0.001, "Coefficient, or where it starts.", minimum=0)
    horizon: int = option(
        10_000, "Trajectories over which the adaptive controller acts.", minimum=1
    )
    target_kl: float = option(0.1, "KL per token that the adaptive controller aims at.", above=0)


@dataclass(frozen=True)
class FilterGroupsConfig:
    """DAPO's dynamic sampling: groups whose samples all score the same teach nothing."""

    enable: bool = option(
        False, "Sample until the batch is full of groups whose metric differs among their samples."
    )
    metric: str = option(
        "acc",
        "What must differ: acc, score, reward, or another number that the reward function returns.",
    )
    max_num_gen_batches: int = option(
        0, "Train on what there is after that many rounds of sampling; 0 = no limit.", minimum=0
    )


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """Importance weights for the difference between the sampler's distribution and the trainer's."""

    rollout_is: Literal["token", "sequence"] | None = option(
        None, "Weigh by exp(old - logp_behaviour): per token, or per sequence."
    )
    rollout_is_threshold: float = option(2.0, "Weights are cut to this.", above=0)
    bypass_mode: bool = option(
        False, "Take the sampler's log-probabilities as the old ones, which saves a forward pass."
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    """How rewards become advantages."""

    adv_estimator: str = option(
        "grpo",
        "grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, or file.py/function.",
    )
    norm_adv_by_std_in_grpo: bool = option(
        True, "Divide by the group's standard deviation; false is Dr. GRPO."
    )
    gamma: float = option(1.0, "Discount per token (reinforce_plus_plus).", minimum=0, maximum=1)
    lam: float = option(
        1.0, "Of generalised advantages; none of the estimators here uses it.", minimum=0, maximum=1
    )
    use_kl_in_reward: bool = option(
        False, "Subtract the KL to the reference policy from the reward, token by token."
    )
    kl_penalty: KL = option("k1", "Estimator of that KL.", spellings=KL_SPELLINGS)
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)


@dataclass(frozen=True)
class FunctionConfig:
    """A function of the user's."""

    path: str | None = option(None, "Python file.")
    name: str | None = option(None, "Function in that file.")


@dataclass(frozen=True)
class DataConfig:
    """The questions."""

    train_files: tuple[str, ...] = option(
        REQUIRED, "Parquet or jsonl: a file, a list [a,b], a folder, a glob, or a URL."
    )
    val_files: tuple[str, ...] | None = option(None, "The same, for validation; null = none.")
    prompt_key: str = option("prompt", "Column with the chat messages (or the question's text).")
    train_max_samples: int = option(-1, "Use the first N training rows; -1 = all.", minimum=-1)
    val_max_samples: int = option(-1, "Use the first N validation rows; -1 = all.", minimum=-1)
    train_batch_size: int = option(
        512, "Prompts per step over all GPUs, whatever dp or sp.", minimum=1
    )
    gen_batch_size: int | None = option(
        None,
        "Prompts per round of sampling under filter_groups; null = train_batch_size.",
        minimum=1,
    )
    max_prompt_length: int = option(
        2048, "Longest prompt in tokens, tool schemas included.", minimum=1
    )
    max_response_length: int = option(
        16384, "Longest response in tokens, all turns and tool text together.", minimum=1
    )
    filter_overlong_prompts: bool = option(True, "Leave longer prompts out; they are counted.")
    truncation: Literal["error", "left", "right"] = option(
        "error",
        "What happens to longer prompts that aren't filtered: refused, or cut at that side (by tokens).",
    )
    return_raw_chat: bool = option(
        True, "Prompts are always kept as messages here; either value is accepted."
    )
    answer_format: str | None = option(
        ANSWER_FORMAT,
        "Line added to math questions that don't say how to answer; null = none is added.",
        spellings={"true": ANSWER_FORMAT},
    )
    shuffle: bool = option(
        True, "Shuffle each epoch; the order is a function of (data.seed, epoch) alone."
    )
    seed: int = option("${trainer.seed}", "Seed of the data order.", minimum=0)
    chat_template: str | None = option(
        None, "Replaces the model's chat template: a file, or hermes (ours: ChatML with tools)."
    )
    template_date: str | None = option(None, options.TEMPLATE_DATE)
    apply_chat_template_kwargs: dict[str, Any] = option(
        {}, "Passed on to the chat template, e.g. {enable_thinking: false}."
    )
    custom_cls: FunctionConfig = field(default_factory=FunctionConfig)


@dataclass(frozen=True)
class ModelConfig(options.DecoderConfig):
    """The policy."""

    path: str = option(
        REQUIRED,
        "Hugging Face model folder or hub id, such as global_step_N/huggingface of an SFT run.",
    )
    use_remove_padding: bool = option(
        True, "Batches are always packed here; either value is accepted."
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
    """Which surrogate."""

    loss_mode: str = option(
        "vanilla",
        "vanilla (PPO with dual clip), gspo (arXiv 2507.18071), cispo (arXiv 2506.13585), or "
        "file.py/function.",
    )


@dataclass(frozen=True)
class ActorConfig:
    """The update."""

    ppo_mini_batch_size: int = option(
        64, "Prompts per optimizer step over all GPUs, whatever dp, sp or n.", minimum=1
    )
    ppo_micro_batch_size_per_gpu: int | None = option(
        None, "Trajectories per micro-batch, with use_dynamic_bsz=false.", minimum=1
    )
    use_dynamic_bsz: bool = option(True, "Micro-batches by tokens (ppo_max_token_len_per_gpu).")
    ppo_max_token_len_per_gpu: int = option(
        16384, "Token budget of a micro-batch per GPU; an sp group holds sp times that.", minimum=1
    )
    ppo_epochs: int = option(1, "Passes over a step's batch.", minimum=1)
    clip_ratio: float = option(0.2, "Both clip ratios, where they aren't given.", above=0)
    clip_ratio_low: float = option(
        "${actor_rollout_ref.actor.clip_ratio}", "The ratio is clipped below 1 - this.", above=0
    )
    clip_ratio_high: float = option(
        "${actor_rollout_ref.actor.clip_ratio}", "The ratio is clipped above 1 + this.", above=0
    )
    clip_ratio_c: float = option(
        3.0, "Dual clip: with a negative advantage the loss is at most this times it.", above=1
    )
    use_kl_loss: bool = option(False, "Add the KL to the reference policy to the loss.")
    kl_loss_coef: float = option(0.001, "Its coefficient.", minimum=0)
    kl_loss_type: KL = option(
        "k3", "Its estimator; with + its gradient is that of k2.", spellings=KL_SPELLINGS
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
            "How token losses become one number; null = as the loss was published: gspo seq-mean-token-mean, "
            "else token-mean."
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
        None, "Token budget per GPU; null = the actor's.", minimum=1
    )
    param_offload: bool = option(False, "Keep the reference's weights in host memory.")


@dataclass(frozen=True)
class ValKwargsConfig:
    """Sampling in validation."""

    temperature: float = option(1.0, "0 = the likeliest token.", minimum=0)
    top_p: float = option(
        1.0, "Smallest set of tokens with that much probability.", above=0, maximum=1
    )
    top_k: int = option(-1, "The k likeliest tokens; -1 = all.", minimum=-1)
    n: int = option(1, "Samples per question.", minimum=1)
    do_sample: bool = option(True, "false: the likeliest token, as temperature 0.")


@dataclass(frozen=True)
class MultiTurnConfig:
    """Tools and turns."""

    enable: bool = option(False, "Let the model call tools.")
    max_user_turns: int | None = option(
        None, "Rounds of tool output; null = no limit but the others.", minimum=1
    )
    max_assistant_turns: int | None = option(
        None, "Turns of the model; null = no limit but the others.", minimum=1
    )
    tool_config_path: str | None = option(
        None, "Tools as YAML; null = the code interpreter on this machine."
    )
    format: Literal["hermes", "code_block", "retool"] = option(
        "hermes", "How the model writes calls: JSON, ```python or <code>."
    )
    max_tool_response_length: int = option(
        512, "Tokens of tool output per call; the rest is cut, with a marker.", minimum=1
    )
    tool_response_truncate_side: Literal["left", "middle", "right"] = option(
        "middle", "Where it is cut: left loses the beginning."
    )
    max_parallel_calls: int = option(
        1, "Calls of one turn that are run; the others are answered that they weren't.", minimum=1
    )
    tool_timeout_seconds: float = option(
        120.0,
        (
            "A tool that takes longer is given up, whatever its own limit; a program's clock starts when it "
            "does, not while it waits."
        ),
        above=0,
    )
    tool_workers: int | None = option(
        None,
        (
            "Programs of the code interpreter that run at once on a node; null = the tool's num_workers, at "
            "most one a core (or 4)."
        ),
        minimum=1,
    )
    tool_isolation: Literal["auto", "strict", "best_effort"] = option(
        "auto",
        "strict: programs aren't run where a guarantee of the sandbox can't be given (`doctor` "
        "tells); best_effort: say so and run them; auto: the tool's own, else strict.",
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling."""

    name: Literal["native", "vllm", "sglang", "hf"] = option(
        "native", "Our engine; vllm, sglang and hf mean native here."
    )
    mode: Literal["async", "sync"] = option(
        "async", "Trajectories advance independently either way."
    )
    n: int = option(16, "Samples per prompt.", minimum=1)
    temperature: float = option(1.0, "Of the policy, in training too.", above=0)
    top_p: float = option(
        1.0, "Smallest set of tokens with that much probability.", above=0, maximum=1
    )
    top_k: int = option(-1, "The k likeliest tokens; -1 = all.", minimum=-1)
    tensor_model_parallel_size: int = option(
        1, "GPUs that share one copy of the engine's weights.", minimum=1
    )
    gpu_memory_utilization: float = option(
        0.5, "Share of the free memory that the KV cache may take.", above=0, maximum=1
    )
    max_num_seqs: int = option(256, "Sequences that decode at once per GPU.", minimum=1)
    max_num_batched_tokens: int = option(8192, "Tokens of one engine step.", minimum=1)
    enforce_eager: bool = option(False, "No CUDA graphs.")
    free_cache_engine: bool | Literal["auto"] = option(
        "auto",
        "Free the engine's memory during the update; auto = where the update doesn't fit beside it.",
    )
    calculate_log_probs: bool = option(
        True, "The engine always returns log-probabilities; either value is accepted."
    )
    dtype: AutoDtype = option("auto", "auto = as training.", spellings=DTYPE_SPELLINGS)
    max_lost_share: float = option(
        0.3,
        (
            "Samples lost to infrastructure (a dead sandbox, no room in the engine) aren't trained on; more "
            "than this share in"
        ),
        minimum=0,
        maximum=1,
    )
    max_lost_steps: int = option(
        3, "so many steps in a row ends the run with the cause.", minimum=1
    )
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    """The policy, its update, its sampling, its reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True)
class OverlongConfig:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13)."""

    enable: bool = option(False, "Add it to the reward.")
    len: int = option(
        4096, "The last tokens before max_response_length over which it grows.", minimum=1
    )
    penalty_factor: float = option(1.0, "What it is at max_response_length.", minimum=0)


@dataclass(frozen=True)
class RewardConfig:
    """How answers are judged."""

    name: str | None = option(
        None,
        "retool, boxed, math, or file.py/function; null = custom_reward_function, else by data_source.",
    )
    num_workers: int = option(
        2, "Processes that judge, per rank; no secrets in their environment, no network.", minimum=1
    )
    network: bool = option(False, "Let them use the network: for a judge behind an address.")
    environment: tuple[str, ...] = option(
        (), "Names of environment variables that they get, such as [OPENAI_API_KEY]; no others."
    )
    concurrent: bool = option(
        False,
        (
            "Await an async function in the run's own process, many answers at once; it has the "
            "run's network and environment."
        ),
    )
    max_concurrent: int = option(64, "That many at once.", minimum=1)
    timeout_seconds: float = option(2.0, "An answer that takes longer gets the floor.", above=0)
    memory_mb: int = option(2048, "Memory of a worker.", minimum=64)
    floor: float = option(-1.0, "Score where the reward function fails: exception, timeout, NaN.")
    max_failed_share: float = option(
        0.5,
        (
            "The run ends where the reward fails on a larger share of a step's answers (or of a "
            "validation's), or on all."
        ),
        above=0,
        maximum=1,
    )
    trial_answer: str | None = option(
        "auto",
        (
            "Answer on which the reward is tried before the run; auto = the row's truth in a "
            "\\boxed{}, null = it isn't tried."
        ),
    )
    overlong_buffer: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass(frozen=True)
class TrainerConfig(options.TrainerConfig):
    """The run."""

    project_name: str = option("retool-rl", "Project, for the loggers and the folder.")
    total_training_steps: int | None = option(
        None, "Steps (of train_batch_size prompts); overrides total_epochs.", minimum=1
    )
    val_before_train: bool = option(True, "Validate before the first step.")
    val_only: bool = option(False, "Validate and stop.")
    log_val_generations: int = option(
        0, "Validation answers shown to the loggers; all are written to report/.", minimum=0
    )
    save_freq: int = option(
        -1, "Steps between checkpoints; the last step is always saved; -1 = only that.", minimum=-1
    )
    test_freq: int = option(
        -1,
        "Steps between validations; the last step is always validated; -1 = only that.",
        minimum=-1,
    )
    deterministic: bool = option(
        False, "Deterministic kernels and batches: a resumed run is bit-equal on the same layout."
    )
    watchdog_s: float = option(
        3600,
        (
            "Seconds without progress after which all ranks write their stacks into the run folder "
            "and the run ends; 0: never."
        ),
        minimum=0,
    )


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
    actor = config.actor_rollout_ref.actor
    keys = (
        "model.",
        "actor.fsdp_config.",
        "actor.checkpoint.",
        "actor.ulysses_sequence_parallel_size",
        "model.path",
    )
    return options.RunOptions(
        config.trainer,
        wanted.model,
        actor.fsdp_config,
        actor.optim,
        actor.checkpoint,
        actor.ulysses_sequence_parallel_size,
        *(f"actor_rollout_ref.{key}" for key in keys),
        command="retool.rl",
        samples=True,
        saves=not config.trainer.val_only,
        subfolder="actor",
        chat_template=config.data.chat_template,
        max_grad_norm=actor.grad_clip,
    )
