"""What the plans of all commands share: processes, their memory and how it is made to fit, and room
for checkpoints.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from retool.checkpoint.format.tracker import STEP
from retool.config import Fault
from retool.config.options import RunOptions
from retool.data.packing import LARGEST_RECORDED, recorded_size
from retool.model.config import ModelConfig
from retool.model.costs import few_tokens, layer_costs, parameter_count
from retool.model.recompute import Recompute
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh
from retool.perf import GIB
from retool.preflight.identity import Identity, record_of
from retool.preflight.training_memory import DTYPE_BYTES, Prediction, Setting, layers_away, predict

R = TypeVar("R", bound="RunReport")
T = TypeVar("T")
Fingerprint = tuple[int, str]  # rows of use, and a hash of what became of them
LADDER: tuple[Recompute, ...] = ("none", "selective", "full", "offload")
# Tokens per GPU whose backward takes longer than reducing the gradients, whatever the model's size.
MIN_TOKENS_TO_HIDE_REDUCE = 2_048
# Tokens that a GPU needs in a micro-batch to be busy; more buys nothing.
TOKENS_TO_FILL_A_GPU = 32_768
# None: what fits
RECOMPUTE: dict[bool | str, Recompute | None] = {
    True: "full",
    False: "none",
    "selective": "selective",
    "auto": None,
}


@dataclass(frozen=True)
class World:
    """How many processes there are, or would be on the box that is planned for."""

    processes: int
    nodes: int
    per_node: int


@dataclass(frozen=True)
class Choice:
    """A token budget per GPU, and how a run must be set for it.

    `fits` is None where the device's memory is unknown. `hold`: gradients are held until the step's
    last micro-batch. `parked`: layers whose activations go to host memory. Without `keep_copy` a
    rank's shard is cast to the compute dtype at every gather. Without `reshard` weights stay
    gathered from the forward to the backward. `recorded`: tokens of a GPU up to which there is memory to
    record a micro-batch that is small for it.
    """

    tokens: int
    recompute: Recompute
    prediction: Prediction
    fits: bool | None
    hold: bool = False
    parked: int = 0
    keep_copy: bool = True
    reshard: bool = True
    recorded: int = 0


@dataclass(frozen=True)
class RunReport(ABC):
    """What preflight found of a run; each command's own adds its data.

    Without faults `folder`, `model` and `choice` are there.

    `folder` is the model's local folder; `choice` holds the token budget per GPU, the recomputation
    and the memory predicted; `turn_ends` are the token ids with which a turn of the model's may
    end; `notes` tell what is allowed but probably not meant. `identity` is what makes the run this
    run; `resume` the checkpoint that it goes on from, if it does, and `then` what that knows of the
    run that wrote it.
    """

    config: Any
    world: World
    folder: Path | None = None
    model: ModelConfig | None = None
    choice: Choice | None = None
    faults: tuple[Fault, ...] = ()
    turn_ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    identity: Identity = field(default_factory=dict)
    resume: Path | None = None
    then: Mapping[str, Any] = field(default_factory=dict)

    def blame(self: R, *faults: Fault) -> R:
        """The report with more faults, each once."""
        return replace(self, faults=tuple(dict.fromkeys((*self.faults, *faults))))

    @property
    @abstractmethod
    def options(self) -> RunOptions:
        """The part of the configuration that every command has."""

    @property
    @abstractmethod
    def steps_of_data(self) -> int:
        """Steps that `trainer.total_epochs` passes over the training data make (0 where it couldn't
        be read).
        """

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """What this rank's data files hold, by key."""

    @property
    def step_then(self) -> int:
        """The step that the run goes on from; 0 where it begins."""
        found = None if self.resume is None else STEP.match(self.resume.name)
        return 0 if found is None else int(found[1])

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run, for one that goes on from it to compare."""
        return record_of(self.options.command, self.identity, self.config)

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        given = self.options.trainer.total_training_steps
        return self.steps_of_data if given is None else given


def attempt(where: str, action: Callable[[], T], faults: list[Fault], remedy: str = "") -> T | None:
    """`action()`, or None with its ValueError or OSError among the faults."""
    try:
        return action()
    except PermissionError as error:
        faults.append(not_allowed(where, error.filename or "it"))
        return None
    except (ValueError, OSError) as error:
        faults.append(Fault(where, str(error), remedy))
        return None


def not_allowed(where: str, what: str | Path) -> Fault:
    """The fault of a file or folder that this user may not read."""
    way_out = "Give yourself the right to (chmod, or chown as root), or name a copy of your own."
    return Fault(where, f"{what} can't be read by this user (permission denied).", way_out)


def setting_of(options: RunOptions, world: World) -> Setting:
    """What decides the memory of training; on GPUs where there are any, or some are planned for."""
    fsdp = options.fsdp
    trainer = options.trainer
    shards = world.processes if fsdp.fsdp_size < 1 else fsdp.fsdp_size
    cuda = trainer.device != "cpu" and (
        torch.cuda.is_available() or trainer.device_memory_gb is not None
    )
    compute = fsdp.param_dtype
    if compute == "auto":
        compute = "bf16" if cuda else fsdp.model_dtype
    return Setting(
        shards=shards,
        ep=fsdp.expert_parallel_size,
        sp=options.sp,
        master=fsdp.model_dtype,
        compute=compute,
        reduce=fsdp.reduced_in,
        param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload,
        reshard=fsdp.reshard_after_forward is not False,
        # One process gathers nothing
        may_stay=fsdp.reshard_after_forward == "auto" and not fsdp.param_offload and shards > 1,
        fp32_residual=options.fp32_residual,
        summed=options.command == "retool.sft",
        compiled=cuda if options.model.use_compile == "auto" else options.model.use_compile,
    )


def gpu_memory(options: RunOptions) -> float | None:
    """GiB of a GPU: trainer.device_memory_gb, else this machine's; None on the CPU."""
    trainer = options.trainer
    if (
        trainer.device_memory_gb is not None
        or trainer.device == "cpu"
        or not torch.cuda.is_available()
    ):
        return trainer.device_memory_gb
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory / GIB


def agree(report: R, mesh: Mesh) -> R:
    """The same plan on every rank, the most careful of theirs: GPUs may differ. Collective."""
    if mesh.world_group is None:
        return report
    everyone: list[Any] = gather_objects(report.choice, mesh.world_group)
    return replace(report, choice=most_careful(everyone))


def most_careful(choices: Sequence[Choice]) -> Choice:
    """What fits on every rank, from each rank's own."""
    return replace(
        max(choices, key=lambda choice: choice.prediction.peak),
        # The plan of a small GPU fits a large one. Ranks that recompute differently, or pack
        # otherwise, would meet in other collectives.
        tokens=min(choice.tokens for choice in choices),
        recompute=max((choice.recompute for choice in choices), key=LADDER.index),
        hold=all(choice.hold for choice in choices),
        parked=max(choice.parked for choice in choices),
        keep_copy=all(choice.keep_copy for choice in choices),
        reshard=any(choice.reshard for choice in choices),
        recorded=min(choice.recorded for choice in choices),
    )


def checkpoint_bytes(report: RunReport) -> float:
    """Bytes of one checkpoint, all ranks together; 0 where there is no model."""
    master = DTYPE_BYTES[report.options.fsdp.model_dtype]
    per_parameter = {"model": master, "optimizer": 2 * master, "hf_model": 2}
    each = sum(per_parameter.get(part, 0) for part in report.options.checkpoint.save_contents)
    return 0.0 if report.model is None else parameter_count(report.model) * each


def kept_checkpoints(report: RunReport) -> int:
    """Checkpoints on the disk at once, at most: an older one is deleted only when a newer one is
    complete.
    """
    trainer = report.options.trainer
    every = (
        report.steps_of_data // trainer.total_epochs
        if trainer.save_freq == "after_each_epoch"
        else int(trainer.save_freq)
    )
    saves = 1 if every < 1 else -(-report.steps // every)
    return saves if trainer.max_ckpt_to_keep is None else min(saves, trainer.max_ckpt_to_keep + 1)


def host_bytes(report: RunReport) -> float:
    """Pinned host memory that offloading takes on one machine, all its processes together;
    activations once they are planned.
    """
    assert report.model is not None
    setting = setting_of(report.options, report.world)
    if (
        setting.compute == setting.master
        and report.options.trainer.device != "cuda"
        and not torch.cuda.is_available()
    ):
        return 0.0  # on the CPU nothing is offloaded
    each = DTYPE_BYTES[setting.master] * (setting.param_offload + 2 * setting.optimizer_offload)
    activations = report.choice.prediction.host if report.choice is not None else 0.0
    return (
        each * parameter_count(report.model) / setting.shards + activations
    ) * report.world.per_node


def ladder(recompute: Recompute | None, offload: bool | Literal["auto"]) -> tuple[Recompute, ...]:
    """Policies to try in turn.

    `recompute` is what was asked for (None: the least that fits), `offload` whether activations go
    to host memory ("auto": as the last resort).
    """
    if offload is True:
        return ("offload",)
    rungs = LADDER[:3] if recompute is None else (recompute,)
    if offload == "auto" and rungs[-1] == "full":
        return (*rungs, "offload")
    return rungs


def choose(
    config: ModelConfig,
    setting: Setting,
    longest: int,
    tokens: int | None,
    recompute: Recompute | None,
    device_gib: float | None,
    offload: bool | Literal["auto"] = False,
) -> Choice:
    """The least recomputation that fits, and with no `tokens` given a budget that fits too.

    `longest`: the longest sample's tokens per GPU, which must fit whatever the budget. Given
    `tokens` or `recompute` are kept; the weights' compute copy goes before more is recomputed;
    activations go to host memory only where `offload` says that all shall, or may as the last
    resort ("auto": of as few layers as will do). Weights stay gathered where they may and nothing
    else has to change. Without a known device nothing is recomputed and a GPU's share is just
    filled. Gradients are held where micro-batches are too short to hide their
    reduction (always, without a device) and there is room.
    """
    kept = layer_costs(config, setting.sp).kept
    # What a model doesn't do was refused by name before
    rungs: list[Recompute] = [rung for rung in ladder(recompute, offload) if rung in kept]
    rungs = rungs or ["full"]
    if device_gib is None:
        return _without_a_device(config, setting, longest, tokens, rungs[0])
    # No sample is cut: whatever the budget, the longest must fit
    floor = max(longest, tokens or 0)
    settings = [setting]
    without_copy = replace(setting, keep_copy=False)
    if setting.copied and not without_copy.copied:
        settings.append(without_copy)
    # What costs least time first: without the copy each gather casts, a rung computes again
    for rung, setting in product(rungs, settings):
        if not predict(config, setting, floor, rung).fits(device_gib):
            continue
        budget = floor
        if tokens is None:
            budget = _largest_budget(config, setting, floor, rung, device_gib)
        # Each of the following takes memory, so each is asked for only where it still fits.
        held = replace(setting, hold=_reduction_shows(setting, budget))
        if predict(config, held, budget, rung).fits(device_gib):
            setting = held
        parked = layers_away(config, rung, None)
        if offload == "auto":
            parked = _fewest_parked(config, setting, budget, rung, parked, device_gib)
        # Last: no more activations leave for it
        gathered_once = replace(setting, reshard=setting.reshard and not setting.may_stay)
        if predict(config, gathered_once, budget, rung, parked).fits(device_gib):
            setting = gathered_once
        plan = predict(config, setting, budget, rung, parked)
        return Choice(
            tokens or budget,
            rung,
            plan,
            True,
            setting.hold,
            parked,
            setting.keep_copy,
            setting.reshard,
            _recorded(config, setting, rung, plan, device_gib),
        )
    last = settings[-1]
    plan = predict(config, last, floor, rungs[-1])
    parked = layers_away(config, rungs[-1], None)
    return Choice(
        tokens or floor, rungs[-1], plan, False, False, parked, last.keep_copy, last.reshard
    )


def _recorded(
    config: ModelConfig, setting: Setting, rung: Recompute, plan: Prediction, device_gib: float
) -> int:
    """`Choice.recorded`: recordings share memory of their own, which nothing else may use."""
    few = min(few_tokens(config), LARGEST_RECORDED)
    if not setting.summed:
        return 0
    largest = predict(config, setting, recorded_size(few), rung)
    own = largest.forward_backward - largest.state
    return few if replace(plan, forward_backward=plan.peak + own).fits(device_gib) else 0


def _without_a_device(
    config: ModelConfig, setting: Setting, longest: int, tokens: int | None, rung: Recompute
) -> Choice:
    """Nobody knows what fits: a GPU's share is just filled."""
    budget = tokens or max(longest, min(TOKENS_TO_FILL_A_GPU, 4 * longest))
    hold = setting.shards > 1
    plan = predict(config, replace(setting, hold=hold), max(budget, longest), rung)
    parked = layers_away(config, rung, None)
    return Choice(budget, rung, plan, None, hold, parked, reshard=setting.reshard)


def _largest_budget(
    config: ModelConfig, setting: Setting, floor: int, rung: Recompute, device_gib: float
) -> int:
    """`floor` doubled while it fits, up to what fills a GPU."""
    budget = floor
    while budget < TOKENS_TO_FILL_A_GPU:
        doubled = min(2 * budget, TOKENS_TO_FILL_A_GPU)
        if not predict(config, setting, doubled, rung).fits(device_gib):
            break
        budget = doubled
    return budget


def _reduction_shows(setting: Setting, budget: int) -> bool:
    """Whether micro-batches are too short to hide that their gradients are reduced."""
    return setting.shards > 1 and budget <= MIN_TOKENS_TO_HIDE_REDUCE


def _fewest_parked(
    config: ModelConfig,
    setting: Setting,
    budget: int,
    rung: Recompute,
    parked: int,
    device_gib: float,
) -> int:
    """As few layers in host memory as fit, at least one of `parked`."""
    while parked > 1 and predict(config, setting, budget, rung, parked - 1).fits(device_gib):
        parked -= 1
    return parked
