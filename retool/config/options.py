"""The keys that SFT and RL share: how weights are sharded, kept, updated and saved, and the run
around them.

A command's own configuration (`retool.sft.config`, `retool.rl.config`) takes these, or adds to them
and overrides defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Literal

from retool.config import Fault, option

Dtype = Literal["fp32", "bf16", "fp64"]
AutoDtype = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
DTYPE_SPELLINGS = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float64": "fp64",
    "double": "fp64",
    "float16": "fp16",
    "half": "fp16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float64": "fp64",
}
SAVE_CONTENTS = ("model", "optimizer", "extra", "hf_model")
TEMPLATE_DATE = (
    "The date (YYYY-MM-DD) for a chat template that asks for today's (strftime_now); "
    "null = the day on which the run began, also after a resume."
)
FILES = (
    "A file (.parquet, .jsonl, .json, .csv; each also .gz or .zst), a folder of them or one of "
    "datasets' save_to_disk, a glob, a URL (hdfs://, s3://), a data set of the Hugging Face hub "
    "(org/name, org/name:split), or a list [a,b]."
)
DATASET_NAME = "Which configuration to read, if a data set of the hub has several, e.g. main."
TRAIN_SPLIT = (
    "Split of a data set that has several (of the hub, or saved by datasets); null = train."
)
VAL_SPLIT = "The same for data.val_files; null = the only one."
OPTIM_SYNONYMS = {
    "lr_warmup_steps_ratio": "warmup_steps_ratio",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_style": "lr_scheduler",
}

# What retool.metrics can open
LOGGERS = (
    "console",
    "jsonl",
    "tensorboard",
    "wandb",
    "mlflow",
    "swanlab",
)


@dataclass(frozen=True)
class FSDPConfig:
    """How parameters are sharded."""

    model_dtype: Dtype = option(
        "fp32", "Master weights and optimizer state.", spellings=DTYPE_SPELLINGS
    )
    param_dtype: AutoDtype = option(
        "auto",
        "Gathered weights and compute; auto = bf16 on GPUs, model_dtype on the CPU. "
        "fp16 is more exact than bf16 but overflows sooner: the loss is scaled, and "
        "steps whose gradient overflows are skipped.",
        spellings=DTYPE_SPELLINGS,
    )
    reduce_dtype: Dtype = option(
        "fp32", "Gradient reduction; fp64 where model_dtype is.", spellings=DTYPE_SPELLINGS
    )
    param_offload: bool = option(False, "Keep master weights in host memory.")
    optimizer_offload: bool = option(
        False, "Keep optimizer state in host memory; it is copied to the GPU for each update."
    )
    fsdp_size: int = option(
        -1,
        "Ranks that share each parameter; fewer than all = replicated groups (HSDP); -1 = all.",
        minimum=-1,
    )
    expert_parallel_size: int = option(
        1,
        "Over how many neighbouring ranks a layer's experts are divided: each rank "
        "gathers its own experts, and tokens are sent to them. Must divide the number "
        "of experts and of the ranks that share a parameter.",
        minimum=1,
    )
    reshard_after_forward: bool | Literal["auto"] = option(
        "auto",
        "Free a block's gathered weights after its forward pass, and gather them "
        "again for the backward; auto = if they don't all fit, and always in RL.",
    )
    forward_prefetch: bool = option(
        True, "Gather the next block's weights during this one's forward."
    )

    @property
    def reduced_in(self) -> Dtype:
        """The dtype of sums of gradients. Weights in fp64 ask for it: nothing less is exact to them."""
        return "fp64" if self.model_dtype == "fp64" else self.reduce_dtype


@dataclass(frozen=True)
class DecoderConfig:
    """How the model is run in training; where it comes from is the command's own key."""

    attn: Literal["auto", "flash", "flash3", "flash4", "varlen", "cudnn", "reference"] = option(
        "auto",
        (
            "Attention kernel in training; the choice is logged. flash, flash3 and "
            "flash4 come from the packages of FlashAttention 2, 3 and 4, varlen from "
            "torch."
        ),
    )
    enable_gradient_checkpointing: bool | Literal["auto", "selective"] = option(
        "auto",
        "Recompute activations in the backward pass: auto = as little as fits; "
        "selective = only the cheap parts.",
    )
    activation_offload: bool | Literal["auto"] = option(
        False,
        "Hold in host memory what fully recomputed blocks keep for the backward pass, for "
        "very long sequences: true = always; auto = if nothing else fits.",
    )
    fp32_residual: bool | Literal["auto"] = option(
        "auto",
        "Keep the residual stream in fp32, even with bf16 weights: more exact, but "
        "takes some memory; auto = on in retool.rl, where sampler and trainer then "
        "agree better.",
    )
    trust_remote_code: bool = option(
        False, "Run the tokenizer's own Python code from the model folder."
    )
    use_compile: bool | Literal["auto"] = option(
        "auto", "torch.compile for the decoder blocks; auto = on GPUs."
    )
    impl: Literal["auto", "transformers"] = option(
        "auto",
        "Whose code runs the model: auto = retool's decoder if it has the model_type, "
        "else transformers' module; transformers = always transformers' module, to "
        "compare.",
    )


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its schedule."""

    lr: float = option(1e-5, "Peak learning rate.", above=0)
    betas: tuple[float, float] = option(
        (0.9, 0.95), "AdamW's decay rates.", minimum=0, maximum=0.999999
    )
    weight_decay: float = option(
        0.01, "Weight decay of every parameter, norms and biases too.", minimum=0
    )
    lr_scheduler: Literal["cosine", "wsd", "constant"] = option(
        "cosine", "Shape of the schedule after warm-up."
    )
    warmup_steps_ratio: float = option(
        0.1, "Share of the optimizer steps that warm up linearly.", minimum=0, maximum=1
    )
    min_lr_ratio: float = option(
        0.0, "The last learning rate, as a share of lr.", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint holds."""

    save_contents: tuple[str, ...] = option(
        SAVE_CONTENTS, "What to save: model, optimizer, extra, hf_model (for transformers to load)."
    )
    async_save: bool | None = option(
        None, "Write in the background, after a copy to host memory; null = on GPUs."
    )


@dataclass(frozen=True)
class TrainerConfig:
    """The run."""

    default_local_dir: str = option(
        "checkpoints/${trainer.project_name}/${trainer.experiment_name}", "The run's folder."
    )
    default_hdfs_dir: str | None = option(
        None, "A fsspec or pyarrow URL to which finished checkpoints are copied, too."
    )
    project_name: str = option("retool", "Project, for the loggers and the folder.")
    experiment_name: str = option("test", "Experiment, for the loggers and the folder.")
    logger: tuple[str, ...] = option(
        ("console",), f"Any of {', '.join(LOGGERS)}; jsonl is always on."
    )
    total_epochs: int = option(1, "Passes over the training data.", minimum=1)
    total_training_steps: int | None = option(
        None, "Steps; overrides total_epochs, the schedule included.", minimum=1
    )
    save_freq: int | Literal["after_each_epoch"] = option(
        -1, "Steps between checkpoints; -1 = only after the last step.", minimum=-1
    )
    test_freq: int | Literal["after_each_epoch"] = option(
        -1, "Steps between validations; -1 = only after the last step.", minimum=-1
    )
    max_ckpt_to_keep: int | None = option(
        None,
        "Older checkpoints are deleted once a newer one is complete; null = keep all.",
        minimum=1,
    )
    resume_mode: Literal["auto", "disable", "resume_path"] = option(
        "auto",
        (
            "auto = from the newest complete checkpoint in the run's folder; disable "
            "= from the start (an earlier run's files are moved to previous_N in that "
            "folder); resume_path = from trainer.resume_from_path."
        ),
    )
    resume_from_path: str | None = option(
        None, "The global_step_N folder for resume_mode=resume_path."
    )
    resume_fallback: bool = option(
        True,
        "With resume_mode=auto: if a checkpoint is damaged, take the newest complete "
        "one and say so; false = refuse.",
    )
    seed: int = option(1, "Seeds everything.", minimum=0)
    deterministic: bool = option(
        False, "Deterministic kernels: a resumed run is bit-equal on the same layout."
    )
    nnodes: int | None = option(
        None,
        "Machines; null = what the launcher says. Another number than the launcher's is an error.",
        minimum=1,
    )
    n_gpus_per_node: int | None = option(
        None, "Processes per machine; null = what the launcher says.", minimum=1
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto = CUDA where there is a GPU.")
    device_memory_gb: float | None = option(
        None, "With --check: plan for GPUs of this many GiB; null = those of this machine.", above=0
    )
    watchdog_s: float = option(
        600,
        (
            "After so many seconds without progress, every rank writes its stacks "
            "into the run's folder and the run ends; 0 = never."
        ),
        minimum=0,
    )
    max_grad_skips: int = option(
        3,
        "The run stops after so many optimizer steps in a row with a non-finite "
        "gradient norm. In fp16 the 16 that bring the loss scale down to 1 don't "
        "count.",
        minimum=1,
    )


@dataclass(frozen=True)
class RunOptions:
    """What every command has: the parts above, and a few settings that each keeps elsewhere.

    The `…_key`s say what the keys of those parts begin with in the command's own configuration
    (`sp_key` and `pretrained_key`, of the model to begin with, are whole keys). `samples`: whether
    the command samples from the policy, too. `saves`: whether it trains and writes checkpoints, or
    only validates. `subfolder` of a checkpoint holds the model's files.
    """

    trainer: TrainerConfig
    model: DecoderConfig
    fsdp: FSDPConfig
    optim: AdamWConfig
    checkpoint: CheckpointConfig
    sp: int
    model_key: str = "model."
    fsdp_key: str = "model.fsdp_config."
    checkpoint_key: str = "trainer.checkpoint."
    sp_key: str = "ulysses_sequence_parallel_size"
    pretrained_key: str = "model.partial_pretrain"
    command: str = "retool.sft"
    samples: bool = False
    saves: bool = True
    subfolder: str = ""
    chat_template: str | None = None
    max_grad_norm: float = 1.0

    @property
    def fp32_residual(self) -> bool:
        wanted = self.model.fp32_residual
        return self.samples if wanted == "auto" else wanted


def contradictions(options: RunOptions) -> Iterator[Fault]:
    """Faults that only several keys together make, and what no single type can say."""
    trainer = options.trainer
    saved = options.checkpoint.save_contents
    for name in saved:
        if name not in SAVE_CONTENTS:
            yield Fault(
                f"{options.checkpoint_key}save_contents={name}",
                "is not known.",
                f"Use any of {', '.join(SAVE_CONTENTS)}.",
            )
    if not {"model", "hf_model"} & set(saved):
        yield Fault(
            f"{options.checkpoint_key}save_contents",
            "saves no weights.",
            "Add model (to resume) or hf_model (for transformers).",
        )
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        yield Fault(
            "trainer.resume_mode=resume_path",
            "needs trainer.resume_from_path.",
            "Give the global_step_N folder.",
        )
    if trainer.resume_from_path and trainer.resume_mode != "resume_path":
        where = f"trainer.resume_from_path={trainer.resume_from_path}"
        yield Fault(
            where,
            f"is not used under trainer.resume_mode={trainer.resume_mode}.",
            "Add trainer.resume_mode=resume_path.",
        )
    for key, value in (("save_freq", trainer.save_freq), ("test_freq", trainer.test_freq)):
        if value == 0:
            yield Fault(
                f"trainer.{key}=0",
                "is no number of steps.",
                "Use a positive number, or -1 (last step only).",
            )
    if options.fsdp.fsdp_size == 0:
        yield Fault(
            f"{options.fsdp_key}fsdp_size=0", "is no number of ranks.", "Use -1 for all of them."
        )
    recomputes = options.model.enable_gradient_checkpointing
    if options.model.activation_offload and recomputes not in (True, "auto"):
        where = (
            f"{options.model_key}activation_offload={str(options.model.activation_offload).lower()}"
        )
        problem = (
            "moves what fully recomputed blocks keep, against "
            f"enable_gradient_checkpointing={str(recomputes).lower()}."
        )
        yield Fault(
            where, problem, f"Use {options.model_key}enable_gradient_checkpointing=true or auto."
        )
    if options.model.attn == "cudnn" and trainer.deterministic:
        where = f"{options.model_key}attn=cudnn"
        yield Fault(
            where,
            "adds up gradients in no fixed order, against trainer.deterministic=true.",
            "Use varlen or auto.",
        )


def date_faults(day: str | None) -> Iterator[Fault]:
    """A fault unless data.template_date is a date."""
    try:
        if day is not None:
            date.fromisoformat(day)
    except ValueError:
        yield Fault(
            f"data.template_date={day}", "is no date.", "Write it as 2026-11-29, or leave it out."
        )


def resume_notes(options: RunOptions) -> Iterator[str]:
    """Notes on what a run that resumes these checkpoints would lack."""
    key = f"{options.checkpoint_key}save_contents"
    saved = options.checkpoint.save_contents
    if lacking := [name for name in ("model", "optimizer") if name not in saved]:
        yield f"{key} leaves out {' and '.join(lacking)}: a run can't be resumed from these checkpoints."
    elif "extra" not in saved:
        yield f"{key} leaves out extra: a run resumed from these checkpoints draws other random numbers."
