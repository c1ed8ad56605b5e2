"""What every run has while it lasts, put together once for SFT and RL.

`train` of either command calls, in this order: `begin` (processes and seeds), `same_plan`,
`load_model`, `resume` (in `retool.run.resume`), `open_session`. Up to `open_session` a run may
still be refused, and leaves its folder as it was.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from retool import checkpoint
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.config import to_dict
from retool.config.options import RunOptions
from retool.data.template.choose import exported_template
from retool.files.own_folder import OwnFolder
from retool.metrics import Loggers, RunInfo, open_loggers
from retool.model.build import DTYPES, ModelOptions
from retool.optim import AdamW, AdamWOptions
from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh, make_mesh
from retool.parallel.network import own_place
from retool.perf import StepTimer
from retool.preflight.plan import RunReport, agree
from retool.run.caller import COMMAND, Caller, OnStep
from retool.run.folder import make_run_folder
from retool.run.preemption import StopRequest, die_with_parent
from retool.run.resume import model_state, to_resume
from retool.run.watchdog import Watchdog

R = TypeVar("R", bound=RunReport)
R_co = TypeVar("R_co", bound=RunReport, covariant=True)
Problem = Callable[[], str | None]


@dataclass(frozen=True)
class Session(Generic[R_co]):
    """What a run has; nothing of it is replaced while the run lasts.

    `report` is preflight's, the same on every rank. `loggers` are empty on other ranks than 0.
    `timer` times the phases of an SFT step: RL's overlap, so it keeps times of its own.
    """

    report: R_co
    mesh: Mesh
    folder: Path
    model: Sharded
    optimizer: AdamW
    save_options: checkpoint.SaveOptions
    staging: checkpoint.Staging
    loggers: Loggers
    stop: StopRequest
    watchdog: Watchdog
    timer: StepTimer
    caller: Caller = COMMAND


@dataclass
class Skips:
    """Updates that changed nothing, as their gradient norm wasn't finite.

    `without` says why a step had nothing for an update, where that is known.
    """

    total: int = 0
    in_a_row: int = 0
    without: str = ""


class Progress(Protocol):
    """What survives a step of either command.

    `step` counts steps done, skipped ones too. `saved_step` is the last one saved or being saved
    (-1: none), `save` its save until the result was said.
    """

    step: int
    saved_step: int
    save: checkpoint.PendingSave | None
    skips: Skips


# --- before anything is written ---


def begin(options: RunOptions, caller: Caller = COMMAND) -> Mesh:
    """Meet the other processes and seed this one. Collective."""
    trainer = options.trainer
    if caller.owns_process:
        die_with_parent()
    fsdp = options.fsdp
    mesh = make_mesh(options.sp, fsdp.fsdp_size, trainer.device, ep=fsdp.expert_parallel_size)
    seed_everything(trainer.seed, mesh.rank, trainer.deterministic)
    return mesh


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch with (seed, rank).

    With `deterministic`, allow only kernels that give the same bits again.
    """
    # A prime factor: with seed + rank, seed 1's second rank would draw what seed 2's first one
    # does.
    mixed = seed * 1_000_003 + rank
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed % 2**64)  # it takes no larger one
    if deterministic:
        # cuBLAS repeats its bits only with workspaces of a fixed size, and reads this when it is
        # first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def same_plan(report: R, mesh: Mesh) -> R:
    """The same plan and the same checkpoint to go on from on every rank. Collective."""
    return to_resume(agree(report, mesh), mesh)


def load_model(report: RunReport, mesh: Mesh) -> tuple[Sharded, AdamW]:
    """The model that the run begins with, and its optimizer. Collective."""
    assert report.folder is not None, "a run needs a report without faults"
    options = report.options
    model = load_pretrained(report.folder, mesh, model_options(report, mesh.device))
    adamw = AdamWOptions(options.optim.betas, options.optim.weight_decay, options.max_grad_norm)
    sharding = options.fsdp
    return model, AdamW(model, adamw, sharding.optimizer_offload, sharding.param_offload)


def model_options(report: RunReport, device: torch.device) -> ModelOptions:
    """How the trained model is held and run, as configured and as preflight chose."""
    options = report.options
    sharding = options.fsdp
    choice = report.choice
    assert choice is not None, "a run needs a report without faults"
    master = DTYPES[sharding.model_dtype]
    if sharding.param_dtype != "auto":
        compute = DTYPES[sharding.param_dtype]
    else:
        compute = torch.bfloat16 if device.type == "cuda" else master
    return ModelOptions(
        param_dtype=compute,
        master_dtype=master,
        reduce_dtype=DTYPES[sharding.reduced_in],
        attn=options.model.attn,
        recompute=choice.recompute,
        parked=choice.parked,
        use_compile=options.model.use_compile,
        impl=options.model.impl,
        fp32_residual=options.fp32_residual,
        keep_copy=choice.keep_copy,
        reshard_after_forward=choice.reshard,
        forward_prefetch=sharding.forward_prefetch,
    )


# --- from here on nothing is refused ---


def open_session(
    report: R,
    mesh: Mesh,
    model: Sharded,
    optimizer: AdamW,
    *,
    step: int,
    caller: Caller = COMMAND,
    problems: Sequence[Problem] = (),
    leads: bool = True,
) -> Session[R]:
    """Make the run's folder, its loggers, the memory that saves go through, and its watchdog.

    `step` is the one that the run goes on from. `problems` are asked once a step for what ends the
    run at once (a data file that changed). `leads` is false on ranks that wait for another one's
    engine: they can't tell its work from a hang. Collective.
    """
    options = report.options
    trainer = options.trainer
    # A run that only validates writes no checkpoint, so it has no reason to put an older run's
    # aside.
    anew = trainer.resume_mode == "disable" and options.saves
    folder = make_run_folder(trainer.default_local_dir, report.config, mesh, anew)
    saved = save_options(report, mesh)
    staging = checkpoint.Staging(mesh, folder=OwnFolder(folder) if mesh.rank == 0 else None)
    loggers = Loggers()
    if mesh.rank == 0:
        loggers = _open_loggers(report, folder, step, caller.on_step)
    if options.saves:
        # Claimed now, in the background: pinning takes half a second a GB, which the first save
        # would wait for.
        staging.prepare(model_state(model, optimizer), mesh, saved)
    # Signals are caught from here on, as there is something to save. A timer starts its first step.
    stop = StopRequest(staging.problem, *problems)
    timer = StepTimer(mesh.device)
    places = gather_objects(own_place(os.environ), mesh.world_group)
    silence = trainer.watchdog_s
    if silence and not leads:
        silence = math.inf
    return Session(
        report=report,
        mesh=mesh,
        folder=folder,
        model=model,
        optimizer=optimizer,
        save_options=saved,
        staging=staging,
        loggers=loggers,
        stop=stop,
        watchdog=Watchdog(folder, mesh.rank, mesh.world, silence, timer, places=places),
        timer=timer,
        caller=caller,
    )


def save_options(report: RunReport, mesh: Mesh) -> checkpoint.SaveOptions:
    """What a save writes, as configured; in the background on GPUs where that is left to us."""
    options = report.options
    trainer = options.trainer
    asked = options.checkpoint.async_save
    assert report.folder is not None, "a run needs a report without faults"
    template = exported_template(
        report.folder, options.chat_template, options.model.trust_remote_code
    )
    return checkpoint.SaveOptions(
        contents=tuple(options.checkpoint.save_contents),
        keep=trainer.max_ckpt_to_keep,
        async_save=mesh.device.type == "cuda" if asked is None else asked,
        remote_url=trainer.default_hdfs_dir,
        chat_template=template,
        turn_ends=report.turn_ends,
        subfolder=options.subfolder,
    )


def _open_loggers(report: RunReport, folder: Path, step: int, on_step: OnStep | None) -> Loggers:
    trainer = report.options.trainer
    info = RunInfo(
        folder,
        trainer.project_name,
        trainer.experiment_name,
        to_dict(report.config),
        step,
        report.steps,
    )
    return open_loggers(trainer.logger, info, on_step)
