"""What a run will do, decided before the model is loaded: micro-batches, steps, recomputation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retool.data.loader import Dataset, steps_per_epoch
from retool.memory import Recompute, Setting, choose
from retool.model.config import read_model_config
from retool.parallel.mesh import Mesh
from retool.perf import GIB
from retool.sft.config import SFTConfig


@dataclass(frozen=True)
class MicroBatching:
    """One of the two limits of a micro-batch: samples of an sp group, or tokens per GPU."""

    samples: int | None
    tokens_per_gpu: int | None


@dataclass(frozen=True)
class Plan:
    """Steps, micro-batches and recomputation of a run."""

    total_steps: int
    steps_per_epoch: int
    batching: MicroBatching
    recompute: Recompute
    dropped_per_epoch: int

    def sentence(self) -> str:
        """One line for the log."""
        limit = f"{self.batching.samples} samples" if self.batching.samples else f"{self.batching.tokens_per_gpu:,} tokens per GPU"
        dropped = f" ({self.dropped_per_epoch} samples of an incomplete last batch are left out)" if self.dropped_per_epoch else ""
        return f"{self.total_steps} steps, {self.steps_per_epoch} an epoch{dropped}; micro-batches of at most {limit}."


def make_plan(config: SFTConfig, mesh: Mesh, data: Dataset) -> Plan:
    """Decide. A function of the configuration, the data's lengths and the device's memory; the same on every rank of like devices."""
    per_epoch = steps_per_epoch(len(data), config.data.train_batch_size)
    wanted = config.data.micro_batch_size_per_gpu
    longest = int(data.lengths.max()) if config.use_remove_padding else config.data.max_length
    longest_here = -(-longest // mesh.sp)
    tokens = config.data.max_token_len_per_gpu if wanted is None else wanted * longest_here
    choice = choose(
        read_model_config(config.model.partial_pretrain), memory_setting(config, mesh), longest_here, tokens,
        asked_recompute(config.model.enable_gradient_checkpointing), device_gib(config, mesh),
    )  # fmt: skip
    batching = MicroBatching(wanted, None if wanted is not None else choice.tokens)
    total = config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs
    return Plan(total, per_epoch, batching, choice.recompute, len(data) - per_epoch * config.data.train_batch_size)


def asked_recompute(asked: bool | str) -> Recompute | None:
    """`model.enable_gradient_checkpointing` as a recomputation policy; None leaves it to the memory plan."""
    policies: dict[bool | str, Recompute | None] = {True: "full", False: "none", "selective": "selective", "auto": None}
    return policies[asked]


def memory_setting(config: SFTConfig, mesh: Mesh) -> Setting:
    """What of the configuration decides memory."""
    sharding = config.model.fsdp_config
    compute = sharding.param_dtype
    if compute == "auto":
        compute = "bf16" if mesh.device.type == "cuda" else sharding.model_dtype
    return Setting(
        shards=mesh.shards, sp=mesh.sp, master=sharding.model_dtype, compute=compute, reduce=sharding.reduce_dtype,
        param_offload=sharding.param_offload, optimizer_offload=sharding.optimizer_offload, reshard=sharding.reshard_after_forward,
    )  # fmt: skip


def device_gib(config: SFTConfig, mesh: Mesh) -> float | None:
    """Memory of the device: what the configuration says, else the GPU's own; None on the CPU."""
    if config.trainer.device_memory_gb is not None:
        return config.trainer.device_memory_gb
    return torch.cuda.get_device_properties(mesh.device).total_memory / GIB if mesh.device.type == "cuda" else None
