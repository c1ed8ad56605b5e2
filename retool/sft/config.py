"""Every key of `python -m retool.sft`, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from retool.config import REQUIRED, Fault, option
from retool.metrics import LOGGERS

Dtype = Literal["fp32", "bf16", "fp64"]
DTYPE_SPELLINGS = {
    "float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float64": "fp64", "double": "fp64",
    "torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float64": "fp64",
}  # fmt: skip
SAVE_CONTENTS = ("model", "optimizer", "extra", "hf_model")


@dataclass(frozen=True)
class MultiturnConfig:
    """Conversations with several turns and tools."""

    enable: bool = option(True, "false: single turn, from data.prompt_key and data.response_key.")
    messages_key: str = option("messages", "Column with the list of messages.")
    tools_key: str = option("tools", "Column with the function schemas, a list or a JSON string of it; may be absent.")
    enable_thinking_key: str = option("enable_thinking", "Column with the template's enable_thinking per row; may be absent.")
    history: Literal["error", "last", "split"] = option(
        "error",
        "For templates that rewrite earlier turns: error = refuse; last = train only turns whose context is what inference would show; "
        "split = one sample per assistant turn.",
    )


@dataclass(frozen=True)
class CustomClsConfig:
    """The user's own rows."""

    path: str | None = option(None, "Python file with a function `(path) -> Iterable[dict]` that reads the data files.")
    name: str | None = option(None, "Name of that function.")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train_files: tuple[str, ...] = option(
        REQUIRED, "Parquet or jsonl: a file, a list [a,b], a folder, a glob, or a URL (hdfs://, s3://) for fsspec/pyarrow."
    )
    val_files: tuple[str, ...] | None = option(None, "The same, for validation; null = none.")
    train_max_samples: int = option(-1, "Use the first N training rows; -1 = all.", minimum=-1)
    val_max_samples: int = option(-1, "Use the first N validation rows; -1 = all.", minimum=-1)
    train_batch_size: int = option(256, "Samples per optimizer step over all GPUs, whatever dp, sp or micro-batching.", minimum=1)
    micro_batch_size_per_gpu: int | None = option(
        None, "Samples per micro-batch of one sequence-parallel group; null = by tokens.", minimum=1
    )
    fill_micro_batches: bool = option(
        True,
        "With data.micro_batch_size_per_gpu: short samples share a micro-batch as long as it holds no more tokens than that many of the "
        "longest, for which the memory is planned. The results are the same. false: never more samples.",
    )
    max_token_len_per_gpu: int | None = option(
        None,
        "Token budget of a micro-batch per GPU (an sp group holds sp times that); a single longer sample is its own micro-batch. "
        "With this and data.micro_batch_size_per_gpu null, preflight picks a budget that fits.",
        minimum=1,
    )
    max_length: int = option(4096, "Longest sample in tokens.", minimum=2)
    truncation: Literal["error", "left", "right", "drop"] = option(
        "error", "What happens to longer samples; dropped rows are counted and reported."
    )
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    prompt_key: str = option("prompt", "Column with the prompt when data.multiturn.enable=false.")
    response_key: str = option("response", "Column with the response when data.multiturn.enable=false.")
    shuffle: bool = option(True, "Shuffle each epoch; the order is a function of (data.seed, epoch) alone.")
    seed: int = option("${trainer.seed}", "Seed of the data order.", minimum=0)
    num_workers: int = option(2, "Processes that render and tokenise in the background; 0 = in the main process.", minimum=0)
    apply_chat_template_kwargs: dict[str, Any] = option({}, "Passed on to the chat template, e.g. {enable_thinking: false}.")
    chat_template: str | None = option(
        None,
        "Replaces the model's chat template: a file, or hermes (ours: ChatML with tools). It is saved into the export.",
    )
    custom_cls: CustomClsConfig = field(default_factory=CustomClsConfig)
    cache_dir: str | None = option(None, "Where rendered data is cached; null = ~/.cache/retool.")


@dataclass(frozen=True)
class FSDPConfig:
    """How parameters are sharded."""

    model_dtype: Dtype = option("fp32", "Master weights and optimizer state.", spellings=DTYPE_SPELLINGS)
    param_dtype: Literal["auto", "fp32", "bf16", "fp64"] = option(
        "auto", "Gathered weights and compute; auto = bf16 on GPUs, model_dtype on the CPU.", spellings=DTYPE_SPELLINGS
    )
    reduce_dtype: Dtype = option("fp32", "Gradient reduction.", spellings=DTYPE_SPELLINGS)
    param_offload: bool = option(False, "Keep master weights in host memory.")
    optimizer_offload: bool = option(False, "Keep optimizer state in host memory; it visits the device for the update.")
    fsdp_size: int = option(-1, "Ranks that share a parameter; fewer than the world = replicated groups (HSDP); -1 = all.", minimum=-1)
    reshard_after_forward: bool = option(True, "Free a block's gathered weights after its forward.")
    forward_prefetch: bool = option(True, "Gather the next block's weights during this one's forward.")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    partial_pretrain: str = option(REQUIRED, "Hugging Face model folder or hub id: llama, qwen2 or qwen3.")
    strategy: Literal["fsdp"] = option("fsdp", "fsdp2 means the same.", spellings={"fsdp2": "fsdp"})
    attn: Literal["auto", "flash", "varlen", "cudnn", "reference"] = option("auto", "Attention backend; the choice is logged.")
    enable_gradient_checkpointing: bool | Literal["auto", "selective"] = option(
        "auto", "Recompute activations in backward: auto = the least that fits; selective = only cheap parts."
    )
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    trust_remote_code: bool = option(False, "Run the tokenizer's own Python code from the model folder.")
    use_compile: bool | Literal["auto"] = option("auto", "torch.compile for the decoder blocks; auto = on GPUs.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = option(1e-5, "Peak learning rate.", above=0)
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay rates.", minimum=0, maximum=0.999999)
    weight_decay: float = option(0.01, "On every parameter, norms and biases too.", minimum=0)
    clip_grad: float = option(1.0, "Largest global gradient norm.", above=0)
    lr_scheduler: Literal["cosine", "wsd", "constant"] = option("cosine", "Shape of the schedule after warm-up.")
    warmup_steps_ratio: float = option(0.1, "Share of the steps that warm up linearly.", minimum=0, maximum=1)
    min_lr_ratio: float = option(0.0, "Last learning rate as a share of optim.lr.", minimum=0, maximum=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint holds."""

    save_contents: tuple[str, ...] = option(SAVE_CONTENTS, "What to save: model, optimizer, extra, hf_model (for transformers to load).")
    async_save: bool | None = option(None, "Write in the background, after a copy to host memory; null = on GPUs.")


@dataclass(frozen=True)
class TrainerConfig:
    """The run."""

    default_local_dir: str = option("checkpoints/${trainer.project_name}/${trainer.experiment_name}", "The run's folder.")
    default_hdfs_dir: str | None = option(None, "Finished checkpoints are copied to this fsspec/pyarrow URL too.")
    project_name: str = option("retool-sft", "Project, for the loggers and the folder.")
    experiment_name: str = option("test", "Experiment, for the loggers and the folder.")
    logger: tuple[str, ...] = option(("console",), f"Any of {', '.join(LOGGERS)}; jsonl is always on.")
    total_epochs: int = option(1, "Passes over the training data.", minimum=1)
    total_training_steps: int | None = option(None, "Optimizer steps; overrides total_epochs, the schedule included.", minimum=1)
    save_freq: int | Literal["after_each_epoch"] = option(-1, "Steps between checkpoints; -1 = only after the last step.", minimum=-1)
    test_freq: int | Literal["after_each_epoch"] = option(-1, "Steps between validations; -1 = only after the last step.", minimum=-1)
    max_ckpt_to_keep: int | None = option(None, "Older checkpoints are deleted once a newer one is complete; null = keep all.", minimum=1)
    resume_mode: Literal["auto", "disable", "resume_path"] = option("auto", "auto = from the run folder's newest complete checkpoint.")
    resume_from_path: str | None = option(None, "The global_step_N folder for resume_mode=resume_path.")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = option(1, "Seeds everything.", minimum=0)
    deterministic: bool = option(False, "Deterministic kernels: a resumed run is bit-equal on the same layout.")
    nnodes: int | None = option(None, "Machines; null = what the launcher says. Another number than the launcher's is an error.", minimum=1)
    n_gpus_per_node: int | None = option(None, "Processes per machine; null = what the launcher says.", minimum=1)
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto = CUDA where there is a GPU.")
    device_memory_gb: float | None = option(None, "Plan (--check) for GPUs of this many GiB; null = the GPU at hand.", above=0)
    watchdog_s: float = option(
        600, "Seconds without progress after which every rank writes its stacks into the run folder and the run ends; 0 = never.", minimum=0
    )
    max_grad_skips: int = option(3, "Steps in a row with a non-finite gradient norm after which the run stops.", minimum=1)


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a model on multi-turn conversations with tools."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ulysses_sequence_parallel_size: int = option(
        1, "GPUs that share one sequence: 1 to the number of query heads; must divide the world size.", minimum=1
    )
    use_remove_padding: bool = option(True, "false pads each sample to data.max_length first.")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


_FSDP_KEYS = (
    "model_dtype", "param_dtype", "reduce_dtype", "param_offload", "optimizer_offload", "fsdp_size", "reshard_after_forward",
    "forward_prefetch",
)  # fmt: skip
SYNONYMS = {
    "model.path": "model.partial_pretrain",
    "model.use_remove_padding": "use_remove_padding",
    "model.custom_chat_template": "data.chat_template",
    "engine.strategy": "model.strategy",
    "engine.ulysses_sequence_parallel_size": "ulysses_sequence_parallel_size",
    "model.ulysses_sequence_parallel_size": "ulysses_sequence_parallel_size",
    "engine.dtype": "model.fsdp_config.param_dtype",
    "engine.use_torch_compile": "model.use_compile",
    "model.fsdp_config.offload_params": "model.fsdp_config.param_offload",
    **{f"engine.{key}": f"model.fsdp_config.{key}" for key in _FSDP_KEYS},
    "data.messages_key": "data.multiturn.messages_key",
    "data.tools_key": "data.multiturn.tools_key",
    "data.enable_thinking_key": "data.multiturn.enable_thinking_key",
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "optim.lr_scheduler_type": "optim.lr_scheduler",
    "optim.total_training_steps": "trainer.total_training_steps",
    "checkpoint.save_contents": "trainer.checkpoint.save_contents",
    "checkpoint.async_save": "trainer.checkpoint.async_save",
}
EXAMPLE = """
torchrun --nproc_per_node=2 -m retool.sft \\
    data.train_files=train.parquet data.val_files=test.parquet data.max_length=16384 data.train_batch_size=16 \\
    model.partial_pretrain=Qwen2.5-0.5B-Instruct trainer.total_epochs=2 ulysses_sequence_parallel_size=2
"""


def contradictions(config: SFTConfig) -> Iterator[Fault]:
    """Faults that only several keys together make, and what no single type can say."""
    data, trainer = config.data, config.trainer
    for name in trainer.checkpoint.save_contents:
        if name not in SAVE_CONTENTS:
            yield Fault(f"trainer.checkpoint.save_contents={name}", "is not known.", f"Use any of {', '.join(SAVE_CONTENTS)}.")
    if (data.custom_cls.path is None) != (data.custom_cls.name is None):
        yield Fault("data.custom_cls", "needs both path and name.", "Give the Python file and the function in it, or neither.")
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        yield Fault("trainer.resume_mode=resume_path", "needs trainer.resume_from_path.", "Give the global_step_N folder.")
    if trainer.resume_from_path and trainer.resume_mode != "resume_path":
        yield Fault(
            f"trainer.resume_from_path={trainer.resume_from_path}",
            f"is not used under trainer.resume_mode={trainer.resume_mode}.",
            "Add trainer.resume_mode=resume_path.",
        )
    for key, value in (("save_freq", trainer.save_freq), ("test_freq", trainer.test_freq)):
        if value == 0:
            yield Fault(f"trainer.{key}=0", "is no number of steps.", "Use a positive number, -1 (last step only) or after_each_epoch.")
    if config.model.fsdp_config.fsdp_size == 0:
        yield Fault("model.fsdp_config.fsdp_size=0", "is no number of ranks.", "Use -1 for all of them.")
    saved = trainer.checkpoint.save_contents
    if "hf_model" not in saved and "model" not in saved:
        yield Fault("trainer.checkpoint.save_contents", "saves no weights.", "Add model (to resume) or hf_model (for transformers).")
