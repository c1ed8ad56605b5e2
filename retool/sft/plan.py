"""What a run will do, decided before anything is loaded: data, steps, micro-batches, recomputation,
and the memory they take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from retool.config.options import RunOptions
from retool.data.cache import Dataset, DatasetReport
from retool.data.packing import LEAST_ROOM, Budget, Packing
from retool.model.borrowed.config import BorrowedConfig
from retool.model.costs import few_tokens, quadratic_length
from retool.preflight.plan import (
    RECOMPUTE,
    Choice,
    Fingerprint,
    RunReport,
    choose,
    gpu_memory,
    setting_of,
)
from retool.preflight.world import legal_expert_sizes
from retool.sft.config import SFTConfig, run_options

# Tokens per GPU whose forward and backward take the device longer than the host needs to enqueue
# them, at 0.5B parameters
TOKENS_TO_FILL_A_GPU = 8_192


@dataclass(frozen=True)
class Split:
    """Training or validation data: its files, its tokenised samples and what became of its rows.

    `forms`: which files were taken for what, in words.
    """

    files: tuple[str, ...]
    dataset: Dataset
    said: DatasetReport
    forms: tuple[str, ...] = ()


@dataclass(frozen=True)
class SFTReport(RunReport):
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
    def fingerprints(self) -> dict[str, Fingerprint]:
        splits = {"data.train_files": self.train, "data.val_files": self.val}
        return {
            key: (0, "") if split is None else (split.said.samples, split.said.content)
            for key, split in splits.items()
        }

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


def choose_for(report: SFTReport) -> Choice:
    """Token budget per GPU and recomputation: as configured, and where left to us, what fits.

    A number of samples is as many tokens as that many of the longest have. Where those are few,
    short samples may fill a micro-batch up to `TOKENS_TO_FILL_A_GPU` tokens, if that changes nothing else.
    """
    config = report.config
    model = report.model
    assert model is not None
    data = config.data
    # Each rank of a group has its part of a document
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
    if (
        data.micro_batch_size_per_gpu is None
        or not fills(config)
        or choice.tokens >= TOKENS_TO_FILL_A_GPU
    ):
        return choice
    fuller = decide(TOKENS_TO_FILL_A_GPU)
    # More tokens at once may not cost a recomputation that fewer do without
    return fuller if fuller.fits and _price(fuller) == _price(choice) else choice


def _price(choice: Choice) -> tuple[object, ...]:
    """What a token budget makes slower."""
    return choice.fits, choice.recompute, choice.parked, choice.keep_copy, choice.reshard


def packing_of(report: SFTReport, dp_rank: int, dp: int, sp: int) -> Packing:
    """How a step's samples become a rank's micro-batches: so many samples in each where the user
    says so, else so many tokens.
    """
    config = report.config
    assert report.model is not None and report.choice is not None
    samples = None if fills(config) else config.data.micro_batch_size_per_gpu
    budget = Budget(
        micro_batch_size=samples,
        max_tokens_per_gpu=report.choice.tokens if samples is None else None,
        quadratic_length=quadratic_length(report.model),
        few_tokens=few_tokens(report.model),
    )
    pad_to = None if config.use_remove_padding else config.data.max_length
    return Packing(
        budget,
        dp_rank,
        dp,
        sp,
        pad_to,
        keep_whole=config.data.keep_documents_whole,
        room=report.choice.tokens,
        recorded=records(report) and report.choice.recorded > 0,
    )


def records(report: SFTReport) -> bool:
    """Whether small micro-batches are recorded, as far as their memory and the model allow it."""
    asked = report.config.data.record_micro_batches
    if asked != "auto":
        return asked
    # A recording doesn't give the very bits of the runs before it
    return report.world.nodes == 1 and not report.config.trainer.deterministic


def why_unrecorded(report: SFTReport) -> str:
    """Why nothing can be recorded, whatever comes, as far as it is known before the run; else empty."""
    model = report.model
    choice = report.choice
    assert model is not None and choice is not None
    if gpu_memory(report.options) is None:
        return "that needs a GPU"
    if isinstance(model, BorrowedConfig):
        return "the model runs as transformers' module"
    if model.experts is not None:
        return "how many tokens an expert gets is known to the GPU alone"
    if model.steady_length:
        return "the model's rope changes with the longest document"
    if report.options.model.attn == "reference":
        return "attention's plain formula takes one document at a time"
    if setting_of(report.options, report.world).shards < report.world.processes:
        return "replicas add up their gradients between the others' launches"
    if choice.recompute == "offload":
        return "activations wait in host memory"
    if 0 < choice.recorded < LEAST_ROOM:
        return "the model is so large that a GPU waits for its host with no document"
    return "" if choice.recorded else "there is no memory left for it"


def remedies(report: SFTReport) -> str:
    """Changes of the configuration that make it fit, each alone; where none does, all of them."""
    changed = _memory_savers(report)
    fitting = [
        words
        for words, config in changed.items()
        if choose_for(replace(report, config=config)).fits
    ]
    if fitting:
        return f"Any of these is predicted to fit: {'; '.join(fitting)}."
    return (
        f"No single change is predicted to fit: combine {'; '.join(changed)}, lower data.max_length, or "
        "use more GPUs."
    )


def _memory_savers(report: SFTReport) -> dict[str, SFTConfig]:
    """Changes that take less memory, as one types them → the configuration that each makes."""
    config = report.config
    processes = report.world.processes
    model = report.model
    assert model is not None
    data = replace(config.data, micro_batch_size_per_gpu=1, max_token_len_per_gpu=None)
    recomputed = replace(config.model, enable_gradient_checkpointing=True)
    sharding = replace(config.model.fsdp_config, param_offload=True, optimizer_offload=True)
    changed = {
        "model.enable_gradient_checkpointing=true": replace(config, model=recomputed),
        "data.micro_batch_size_per_gpu=1": replace(config, data=data),
        "model.enable_gradient_checkpointing=true model.activation_offload=true": replace(
            config, model=replace(recomputed, activation_offload=True)
        ),
        "model.fsdp_config.param_offload=true model.fsdp_config.optimizer_offload=true": replace(
            config, model=replace(config.model, fsdp_config=sharding)
        ),
    }
    most = min(processes, model.heads)
    # The largest is tried: it leaves each rank the least
    sizes = [size for size in range(2, most + 1) if processes % size == 0]
    if sizes and sizes[-1] > config.ulysses_sequence_parallel_size:
        words = f"ulysses_sequence_parallel_size={sizes[-1]}"
        changed[words] = replace(config, ulysses_sequence_parallel_size=sizes[-1])
    if model.experts is None:
        return changed
    shards = setting_of(report.options, report.world).shards
    most = legal_expert_sizes(model.experts.count, shards)[-1]
    if most > config.model.fsdp_config.expert_parallel_size:
        divided = replace(config.model.fsdp_config, expert_parallel_size=most)
        words = f"model.fsdp_config.expert_parallel_size={most}"
        changed[words] = replace(config, model=replace(config.model, fsdp_config=divided))
    return changed
