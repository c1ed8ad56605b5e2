"""What a run will do, decided before anything is loaded: data, steps, micro-batches, recomputation,
and the memory they take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from retool.config.options import RunOptions
from retool.data.cache import Dataset, DatasetReport
from retool.preflight.memory import Choice, choose
from retool.preflight.plan import RECOMPUTE, RunReport, gpu_memory, setting_of
from retool.sft.config import SFTConfig, run_options

# tokens per GPU whose forward and backward take the device longer than the host needs to enqueue
# them, at 0.5B parameters
BUSY = 8_192


@dataclass(frozen=True)
class Split:
    """Training or validation data: its files, its tokenised samples and what became of its rows."""

    files: tuple[str, ...]
    dataset: Dataset
    said: DatasetReport


@dataclass(frozen=True)
class Report(RunReport):
    """What preflight found. Without faults `train` is there too."""

    config: SFTConfig
    train: Split | None = None
    val: Split | None = None

    @property
    def options(self) -> RunOptions:
        return run_options(self.config)

    @property
    def steps_of_data(self) -> int:
        return self.steps_per_epoch * self.config.trainer.total_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training data."""
        return len(self.train.dataset) // self.config.data.train_batch_size if self.train else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest document of a pack: measured, or what data.max_length allows or
        pads to.
        """
        splits = [split.dataset for split in (self.train, self.val) if split is not None]
        if self.train is None or not self.config.use_remove_padding:
            return self.config.data.max_length
        return max(int(data.lengths.max()) for data in splits)


def fills(config: SFTConfig) -> bool:
    """Whether micro-batches are made by tokens, of which there are `choose_for`'s."""
    return config.data.micro_batch_size_per_gpu is None or (
        config.data.fill_micro_batches and config.use_remove_padding
    )


def choose_for(report: Report) -> Choice:
    """Token budget per GPU and recomputation: as configured, and where left to us, what fits.

    A number of samples is as many tokens as that many of the longest have; and `BUSY`, where that
    fits just as well.
    """
    config = report.config
    model = report.model
    assert model is not None
    data = config.data
    longest = -(-report.longest // config.ulysses_sequence_parallel_size)
    tokens = data.max_token_len_per_gpu
    if data.micro_batch_size_per_gpu is not None:
        tokens = data.micro_batch_size_per_gpu * longest
    asked = RECOMPUTE[config.model.enable_gradient_checkpointing]
    decide = partial(
        choose,
        model,
        setting_of(report.options, report.world),
        longest,
        recompute=asked,
        device_gib=gpu_memory(report.options),
        offload=config.model.activation_offload,
    )
    choice = decide(tokens)
    if data.micro_batch_size_per_gpu is not None and fills(config) and choice.tokens < BUSY:
        fuller = decide(BUSY)
        if (
            fuller.fits
            and replace(
                fuller, tokens=choice.tokens, prediction=choice.prediction, hold=choice.hold
            )
            == choice
        ):
            return fuller
    return choice


def remedies(report: Report) -> str:
    """Changes of the configuration that would make it fit, each alone; where none does, all of
    them.
    """
    config = report.config
    world = report.world
    model = report.model
    assert model is not None
    ranks = [n for n in range(2, min(world.processes, model.heads) + 1) if world.processes % n == 0]
    offload = replace(config.model.fsdp_config, param_offload=True, optimizer_offload=True)
    full = replace(config.model, enable_gradient_checkpointing=True)
    offloaded = replace(config.model, fsdp_config=offload)
    changes: dict[str, dict[str, Any]] = {
        "model.enable_gradient_checkpointing=true": {"model": full},
        "data.micro_batch_size_per_gpu=1": {
            "data": replace(config.data, micro_batch_size_per_gpu=1, max_token_len_per_gpu=None)
        },
        "model.enable_gradient_checkpointing=true model.activation_offload=true": {
            "model": replace(full, activation_offload=True)
        },
        "model.fsdp_config.param_offload=true model.fsdp_config.optimizer_offload=true": {
            "model": offloaded
        },
    }
    if ranks and ranks[-1] > config.ulysses_sequence_parallel_size:
        changes[f"ulysses_sequence_parallel_size={ranks[-1]}"] = {
            "ulysses_sequence_parallel_size": ranks[-1]
        }
    fitting = [
        name
        for name, change in changes.items()
        if choose_for(replace(report, config=replace(config, **change))).fits
    ]
    if fitting:
        return f"Any of these is predicted to fit: {'; '.join(fitting)}."
    return (
        f"No single change is predicted to fit: combine {'; '.join(changes)}, lower data.max_length, or "
        "use more GPUs."
    )
