"""What a run will do, decided before anything is loaded: data, steps, micro-batches, recomputation, and the memory they take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retool.config import Fault
from retool.data.cache import Dataset, DatasetReport
from retool.memory import DTYPE_BYTES, Choice, Recompute, Setting, choose
from retool.model.config import ModelConfig
from retool.preflight import World, device_memory_gib
from retool.sft.config import SFTConfig


@dataclass(frozen=True)
class Split:
    """Training or validation data: its files, its tokenised samples and what became of its rows."""

    files: tuple[str, ...]
    dataset: Dataset
    said: DatasetReport


@dataclass(frozen=True)
class Report:
    """What preflight found. Without faults `folder`, `model`, `train` and `choice` are there.

    `folder` is the model's local folder; `choice` holds the token budget per GPU, the recomputation and the memory
    predicted; `notes` tell what is allowed but probably not meant.
    """

    config: SFTConfig
    world: World
    folder: Path | None = None
    model: ModelConfig | None = None
    train: Split | None = None
    val: Split | None = None
    choice: Choice | None = None
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def blame(self, *faults: Fault) -> Report:
        """With more faults."""
        return replace(self, faults=(*self.faults, *faults))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run (0 where the data couldn't be read)."""
        if self.config.trainer.total_training_steps is not None:
            return self.config.trainer.total_training_steps
        return self.steps_per_epoch * self.config.trainer.total_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training data."""
        return len(self.train.dataset) // self.config.data.train_batch_size if self.train else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest document of a pack: measured, or what data.max_length allows or pads to."""
        splits = [split.dataset for split in (self.train, self.val) if split is not None]
        if self.train is None or not self.config.use_remove_padding:
            return self.config.data.max_length
        return max(int(data.lengths.max()) for data in splits)


def setting_of(config: SFTConfig, world: World) -> Setting:
    """What of the configuration decides the memory; on GPUs where there are any, or some are planned for."""
    fsdp = config.model.fsdp_config
    cuda = config.trainer.device != "cpu" and (torch.cuda.is_available() or config.trainer.device_memory_gb is not None)
    compute = ("bf16" if cuda else fsdp.model_dtype) if fsdp.param_dtype == "auto" else fsdp.param_dtype
    return Setting(
        shards=world.processes if fsdp.fsdp_size < 1 else fsdp.fsdp_size, sp=config.ulysses_sequence_parallel_size,
        master=fsdp.model_dtype, compute=compute, reduce=fsdp.reduce_dtype, param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload, reshard=fsdp.reshard_after_forward,
    )  # fmt: skip


def gpu_memory(config: SFTConfig) -> float | None:
    """GiB of a GPU: trainer.device_memory_gb, else this machine's; None on the CPU."""
    return device_memory_gib(config.trainer.device_memory_gb, config.trainer.device)


def asked_recompute(asked: bool | str) -> Recompute | None:
    """`model.enable_gradient_checkpointing` as a policy; None leaves it to the memory plan."""
    policies: dict[bool | str, Recompute | None] = {True: "full", False: "none", "selective": "selective", "auto": None}
    return policies[asked]


def fills(config: SFTConfig) -> bool:
    """Whether micro-batches are made by tokens: `choose_for`'s, which are those of the longest samples where their number is given."""
    return config.data.micro_batch_size_per_gpu is None or (config.data.fill_micro_batches and config.use_remove_padding)


def choose_for(report: Report) -> Choice:
    """Token budget per GPU and recomputation: as configured, and where left to us, what fits."""
    config, model = report.config, report.model
    assert model is not None
    data, longest = config.data, -(-report.longest // config.ulysses_sequence_parallel_size)
    tokens = data.max_token_len_per_gpu
    if data.micro_batch_size_per_gpu is not None:
        tokens = data.micro_batch_size_per_gpu * longest
    asked = asked_recompute(config.model.enable_gradient_checkpointing)
    return choose(model, setting_of(config, report.world), longest, tokens, asked, gpu_memory(config))


def remedies(report: Report) -> str:
    """Changes of the configuration that would make it fit, each alone; where none does, all of them."""
    config, world, model = report.config, report.world, report.model
    assert model is not None
    ranks = [n for n in range(2, min(world.processes, model.heads) + 1) if world.processes % n == 0]
    offload = replace(config.model.fsdp_config, param_offload=True, optimizer_offload=True)
    full, offloaded = replace(config.model, enable_gradient_checkpointing=True), replace(config.model, fsdp_config=offload)
    changes: dict[str, dict[str, Any]] = {
        "model.enable_gradient_checkpointing=true": {"model": full},
        "data.micro_batch_size_per_gpu=1": {"data": replace(config.data, micro_batch_size_per_gpu=1, max_token_len_per_gpu=None)},
        "model.fsdp_config.param_offload=true model.fsdp_config.optimizer_offload=true": {"model": offloaded},
    }
    if ranks and ranks[-1] > config.ulysses_sequence_parallel_size:
        changes[f"ulysses_sequence_parallel_size={ranks[-1]}"] = {"ulysses_sequence_parallel_size": ranks[-1]}
    fitting = [name for name, change in changes.items() if choose_for(replace(report, config=replace(config, **change))).fits]
    if fitting:
        return f"Any of these is predicted to fit: {'; '.join(fitting)}."
    return f"No single change is predicted to fit: combine {'; '.join(changes)}, lower data.max_length, or use more GPUs."


def parameter_count(model: ModelConfig) -> int:
    """Parameters, but for norms and biases (less than one in a thousand)."""
    return model.matmul_parameters + (0 if model.tied else model.vocab * model.hidden)


def checkpoint_bytes(model: ModelConfig, config: SFTConfig) -> float:
    """Bytes of one checkpoint, all ranks together."""
    master = DTYPE_BYTES[config.model.fsdp_config.model_dtype]
    per_parameter = {"model": master, "optimizer": 2 * master, "extra": 0, "hf_model": 2}
    return parameter_count(model) * sum(per_parameter.get(part, 0) for part in config.trainer.checkpoint.save_contents)


def kept_checkpoints(report: Report) -> int:
    """Checkpoints on the disk at once, at most: an older one is deleted only when a newer one is complete."""
    trainer, steps = report.config.trainer, report.steps
    every = report.steps_per_epoch if trainer.save_freq == "after_each_epoch" else int(trainer.save_freq)
    saves = 1 if every < 1 else -(-steps // every)
    return saves if trainer.max_ckpt_to_keep is None else min(saves, trainer.max_ckpt_to_keep + 1)


def host_bytes(report: Report) -> float:
    """Pinned host memory that offloading takes on one machine, all its processes together."""
    config, model = report.config, report.model
    assert model is not None
    setting = setting_of(config, report.world)
    if setting.compute == setting.master and config.trainer.device != "cuda" and not torch.cuda.is_available():
        return 0.0  # on the CPU nothing is offloaded
    each = DTYPE_BYTES[setting.master] * (setting.param_offload + 2 * setting.optimizer_offload)
    return each * parameter_count(model) * report.world.per_node / setting.shards
