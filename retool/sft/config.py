"""Every key of `python -m retool.sft`, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from retool.config import REQUIRED, Fault, option, options
from retool.config.options import CheckpointConfig, FSDPConfig, RunOptions


@dataclass(frozen=True)
class MultiturnConfig:
    """Conversations with several turns and tools."""

    enable: bool = option(
        True, "false = a single turn, from the columns data.prompt_key and data.response_key."
    )
    messages_key: str = option("messages", "Column with the list of messages.")
    tools_key: str = option(
        "tools", "Column with the tools' schemas, as a list or as its JSON text; may be absent."
    )
    enable_thinking_key: str = option(
        "enable_thinking",
        "Column with each row's value for the chat template's enable_thinking; may be absent.",
    )
    history: Literal["error", "last", "split"] = option(
        "error",
        "For chat templates that rewrite earlier turns: error = refuse the row; last "
        "= train only the turns whose context is the one that inference would show; "
        "split = make one sample per assistant turn.",
    )
    inline_outputs: Literal["error", "mask", "train"] = option(
        "error",
        "For assistant texts with <interpreter>…</interpreter> behind </code>, as ReTool writes what "
        "programs print: error = refuse; mask = show it and don't train it; train = train it, too.",
    )


@dataclass(frozen=True)
class CustomClsConfig:
    """A function of your own that reads the data files."""

    path: str | None = option(
        None, "Python file with a function `(path) -> Iterable[dict]` that reads the data files."
    )
    name: str | None = option(None, "Name of that function.")


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    train_files: tuple[str, ...] = option(REQUIRED, options.FILES)
    val_files: tuple[str, ...] | None = option(None, "The same, for validation; null = none.")
    name: str | None = option(None, options.DATASET_NAME)
    train_split: str | None = option(None, options.TRAIN_SPLIT)
    val_split: str | None = option(None, options.VAL_SPLIT)
    train_max_samples: int = option(-1, "Use the first N training rows; -1 = all.", minimum=-1)
    val_max_samples: int = option(-1, "Use the first N validation rows; -1 = all.", minimum=-1)
    train_batch_size: int = option(
        256,
        "Samples per optimizer step over all GPUs, however they are divided.",
        minimum=1,
    )
    micro_batch_size_per_gpu: int | None = option(
        None,
        "Samples per micro-batch of one sequence-parallel group; null = micro-batches "
        "are made by tokens.",
        minimum=1,
    )
    fill_micro_batches: bool = option(
        True,
        "With data.micro_batch_size_per_gpu: let more, shorter samples into a "
        "micro-batch, as long as it holds no more tokens than that many of the "
        "longest samples would (or 8,192 per GPU, if these fit without more "
        "recomputation). The results are the same. false = never more samples.",
    )
    record_micro_batches: bool | Literal["auto"] = option(
        "auto",
        "Where a micro-batch has so few tokens that a GPU would wait for its host, launch it as "
        "one CUDA graph, recorded at the third of its size, if there is memory for it; not with "
        "experts or replicas. auto = on one machine, and not with trainer.deterministic.",
    )
    keep_documents_whole: bool = option(
        True,
        "With sequence parallelism: if the documents of a micro-batch spread evenly "
        "over the ranks of a group, each rank computes whole documents and sends "
        "nothing. The results are the same. false = divide every document.",
    )
    max_token_len_per_gpu: int | None = option(
        None,
        "Token budget of a micro-batch per GPU (a sequence-parallel group holds that "
        "times its size). A single longer sample is a micro-batch of its own. If this "
        "and data.micro_batch_size_per_gpu are null, preflight picks a budget that "
        "fits.",
        minimum=1,
    )
    max_length: int = option(4096, "Longest sample in tokens.", minimum=2)
    truncation: Literal["error", "left", "right", "drop"] = option(
        "error",
        "What happens to samples longer than data.max_length; dropped rows are "
        "counted and reported.",
    )
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "prompt_response"
    ] = option(
        "auto",
        "The form of the rows: messages (OpenAI's), sharegpt (conversations), alpaca "
        "(instruction, input, output), prompt_completion or prompt_response; auto = "
        "recognise it by the columns.",
    )
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    prompt_key: str = option("prompt", "Column with the prompt when data.multiturn.enable=false.")
    response_key: str = option(
        "response", "Column with the response when data.multiturn.enable=false."
    )
    shuffle: bool = option(
        True, "Shuffle each epoch; the order is a function of (data.seed, epoch) alone."
    )
    seed: int = option("${trainer.seed}", "Seed of the data order.", minimum=0)
    num_workers: int | None = option(
        None,
        "Processes that render and tokenise rows; null = as many as cores, 16 at most; 0 = none but "
        "the main process.",
        minimum=0,
    )
    apply_chat_template_kwargs: dict[str, Any] = option(
        {}, "Passed on to the chat template, e.g. {enable_thinking: false}."
    )
    chat_template: str | None = option(
        None,
        (
            "Replaces the model's chat template: a file, or hermes (ours: ChatML with tools). It "
            "is saved into the export."
        ),
    )
    template_date: str | None = option(None, options.TEMPLATE_DATE)
    reasoning_in_content: bool = option(
        False,
        "Put the assistant's reasoning (reasoning_content, reasoning, thinking) at "
        "the beginning of its content, as <think>…</think>, for a chat template that "
        "doesn't show such a field.",
    )
    drop_reasoning: bool = option(
        False,
        "Train without the assistant's reasoning, whether it stands in a field or "
        "between <think> and </think>. Otherwise a row with reasoning that the chat "
        "template doesn't show is refused.",
    )
    custom_cls: CustomClsConfig = field(default_factory=CustomClsConfig)
    cache_dir: str | None = option(None, "Where rendered data is cached; null = ~/.cache/retool.")


@dataclass(frozen=True)
class ModelConfig(options.DecoderConfig):
    """The model."""

    partial_pretrain: str = option(REQUIRED, "Hugging Face model folder or hub id.")
    strategy: Literal["fsdp"] = option("fsdp", "fsdp2 means the same.", spellings={"fsdp2": "fsdp"})
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)


@dataclass(frozen=True)
class OptimConfig(options.AdamWConfig):
    """AdamW and its schedule."""

    clip_grad: float = option(1.0, "Largest global gradient norm.", above=0)


@dataclass(frozen=True)
class TrainerConfig(options.TrainerConfig):
    """The run."""

    project_name: str = option("retool-sft", "Project, for the loggers and the folder.")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a model on multi-turn conversations with tools."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ulysses_sequence_parallel_size: int = option(
        1,
        "GPUs that share one sequence: from 1 to the number of query heads; must "
        "divide the number of processes.",
        minimum=1,
    )
    use_remove_padding: bool = option(True, "false = pad each sample to data.max_length first.")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


SYNONYMS = {
    "model.path": "model.partial_pretrain",
    "model.use_remove_padding": "use_remove_padding",
    "model.enable_activation_offload": "model.activation_offload",
    "model.custom_chat_template": "data.chat_template",
    "engine.strategy": "model.strategy",
    "engine.ulysses_sequence_parallel_size": "ulysses_sequence_parallel_size",
    "model.ulysses_sequence_parallel_size": "ulysses_sequence_parallel_size",
    "engine.dtype": "model.fsdp_config.param_dtype",
    "engine.use_torch_compile": "model.use_compile",
    "model.fsdp_config.offload_params": "model.fsdp_config.param_offload",
    **{f"engine.{key.name}": f"model.fsdp_config.{key.name}" for key in fields(FSDPConfig)},
    "data.split": "data.train_split",
    "data.messages_key": "data.multiturn.messages_key",
    "data.tools_key": "data.multiturn.tools_key",
    "data.enable_thinking_key": "data.multiturn.enable_thinking_key",
    **{f"optim.{other}": f"optim.{ours}" for other, ours in options.OPTIM_SYNONYMS.items()},
    "optim.total_training_steps": "trainer.total_training_steps",
    "checkpoint.save_contents": "trainer.checkpoint.save_contents",
    "checkpoint.async_save": "trainer.checkpoint.async_save",
}
EXAMPLE = """
torchrun --nproc_per_node=2 -m retool.sft \\
    data.train_files=train.parquet data.val_files=test.parquet \\
    data.max_length=16384 data.train_batch_size=16 \\
    model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \\
    trainer.total_epochs=2 ulysses_sequence_parallel_size=2
"""


def run_options(config: SFTConfig) -> RunOptions:
    """What every command has."""
    model = config.model
    trainer = config.trainer
    return RunOptions(
        trainer,
        model,
        model.fsdp_config,
        config.optim,
        trainer.checkpoint,
        config.ulysses_sequence_parallel_size,
        chat_template=config.data.chat_template,
        max_grad_norm=config.optim.clip_grad,
    )


def contradictions(config: SFTConfig) -> Iterator[Fault]:
    """Faults that only several keys together make, and what no single type can say."""
    yield from options.contradictions(run_options(config))
    yield from options.date_faults(config.data.template_date)
    if config.data.drop_reasoning and config.data.reasoning_in_content:
        yield Fault(
            "data.drop_reasoning",
            "contradicts data.reasoning_in_content=true.",
            "Choose one: leave thoughts out, or write them.",
        )
    if (config.data.custom_cls.path is None) != (config.data.custom_cls.name is None):
        yield Fault(
            "data.custom_cls",
            "needs both path and name.",
            "Give the Python file and the function in it, or neither.",
        )
