"""Multi-turn SFT, from a configuration to a finished run folder.

`train` reads as a table of contents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from retool import checkpoint
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.config import to_dict
from retool.data.loader import (
    Dataset,
    StepBatch,
    StepOrder,
    iterate_steps,
    iterate_validation,
)
from retool.data.packing import Budget, Packing
from retool.files.own_folder import OwnFolder
from retool.metrics import Loggers, RunInfo, open_loggers
from retool.model.build import DTYPES, ModelOptions
from retool.model.decoder import Decoder
from retool.optim import AdamW, AdamWOptions, learning_rate
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh, make_mesh
from retool.perf import (
    StepTimer,
    StepTimes,
    device_peak,
    mfu,
    model_flops,
    peak_memory,
    quadratic_length,
)
from retool.preflight.memory import Choice
from retool.preflight.plan import agree
from retool.preflight.resume import load_checkpoint, to_resume
from retool.run.folder import make_run_folder, say, say_ended, seed_everything
from retool.run.preemption import StopRequest, die_with_parent
from retool.run.saving import (
    look_at_weights,
    model_state,
    orderly_end,
    require_saved,
    require_trained,
    restore_optimizer,
    save_options,
    save_step,
    say_saved,
    watched,
)
from retool.run.watchdog import Watchdog
from retool.sft.config import SFTConfig, run_options
from retool.sft.identity import fingerprints
from retool.sft.plan import Report, fills
from retool.sft.step import Measured, train_step
from retool.sft.validate import validate


@dataclass
class TrainState:
    """What survives a step."""

    step: int = 0  # optimizer steps done, skipped ones too
    saved_step: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0
    pending: list[PendingStep] = field(default_factory=list)  # measured, not yet read
    # Seconds of what came after the step: testing, save
    between: dict[str, float] = field(default_factory=dict)
    save: checkpoint.PendingSave | None = None  # the last one, until its result was said


@dataclass(frozen=True)
class PendingStep:
    """A step whose numbers are still on the device."""

    batch: StepBatch
    lr: float
    measured: Measured
    times: StepTimes
    before: dict[str, float]  # seconds of what came before it


@dataclass(frozen=True)
class Run:
    """What a run is made of; nothing in it is replaced while it lasts."""

    config: SFTConfig
    report: Report
    mesh: Mesh
    folder: Path
    model: Sharded
    optimizer: AdamW
    train_data: Dataset
    val_data: Dataset | None
    packing: Packing
    hold: bool
    loggers: Loggers
    save_options: checkpoint.SaveOptions
    staging: checkpoint.Staging

    def problem(self) -> str | None:
        """What ends the run at once, as this rank sees it: its folder or its data aren't what they
        were.
        """
        splits = [data for data in (self.train_data, self.val_data) if data is not None]
        return next(
            (
                said
                for ask in (self.staging.problem, *(data.problem for data in splits))
                if (said := ask()) is not None
            ),
            None,
        )


def train(report: Report) -> None:
    """Run SFT as preflight found it possible.

    Collective: every process of the launcher calls it with the same configuration.
    """
    config = report.config
    die_with_parent()
    mesh = make_mesh(
        config.ulysses_sequence_parallel_size,
        config.model.fsdp_config.fsdp_size,
        config.trainer.device,
    )
    seed_everything(config.trainer.seed, mesh.rank, config.trainer.deterministic)
    report = to_resume(agree(report, mesh, fingerprints(report)), mesh)
    run, state = build_run(report, mesh)
    batches = iterate_steps(
        run.train_data,
        StepOrder(config.data.train_batch_size, config.data.seed, config.data.shuffle),
        run.packing,
        start_step=state.step,
        stop_step=report.steps,
    )
    timer = StepTimer(mesh.device)
    with StopRequest(run.problem) as stop, orderly_end(run, state):
        with Watchdog(
            run.folder, mesh.rank, mesh.world, config.trainer.watchdog_s, timer
        ) as watchdog:
            while state.step < report.steps:
                watchdog.beat()
                with timer.phase("data"):
                    batch = next(batches)
                one_step(run, state, batch, timer, watchdog)
                stopping = stop.agreed(mesh)
                last = state.step == report.steps
                if last or due(config.trainer.test_freq, state.step, report.steps_per_epoch):
                    with timer.phase("testing"):
                        run_validation(run, state, watchdog)
                if (
                    last
                    or stopping
                    or due(config.trainer.save_freq, state.step, report.steps_per_epoch)
                ):
                    with timer.phase("save"), watched(run, watchdog):
                        save(run, state)
                # Validation or a save came between two steps: its time isn't the next step's
                if not state.pending:
                    state.between = timer.take().seconds()
                if stopping and not last:
                    break
            with watched(run, watchdog):
                finish(run, state)
        run.staging.close()


def build_run(report: Report, mesh: Mesh) -> tuple[Run, TrainState]:
    """Load the model, make the optimizer, resume if there is something to resume from, open the
    loggers.
    """
    config = report.config
    trainer = report.config.trainer
    optim = report.config.optim
    sharding = report.config.model.fsdp_config
    assert report.train is not None and report.choice is not None and report.folder is not None, (
        "train needs a report without faults"
    )
    model = load_pretrained(report.folder, mesh, model_options(config, report.choice))
    adamw = AdamWOptions(optim.betas, optim.weight_decay, optim.clip_grad)
    optimizer = AdamW(model, adamw, sharding.optimizer_offload, sharding.param_offload)
    assert isinstance(model.module, Decoder)
    say(
        mesh,
        f"attention: {model.module.execution.backend}; recomputation: {report.choice.recompute}",
    )
    train_data = report.train.dataset
    val_data = report.val.dataset if report.val else None
    state = resume(report, mesh, model, optimizer)
    # From here on nothing is refused: a run that is leaves its folder as it was.
    folder = make_run_folder(
        trainer.default_local_dir, config, mesh, anew=trainer.resume_mode == "disable"
    )
    info = RunInfo(
        folder,
        trainer.project_name,
        trainer.experiment_name,
        to_dict(config),
        state.step,
        report.steps,
    )
    saved = save_options(report.options, mesh, report.folder, config.data.chat_template)
    loggers = open_loggers(trainer.logger, info) if mesh.rank == 0 else Loggers()
    assert report.model is not None
    packing = make_packing(mesh, config, report.choice.tokens, quadratic_length(report.model))
    staging = checkpoint.Staging(mesh, folder=OwnFolder(folder) if mesh.rank == 0 else None)
    staging.prepare(model_state(model, optimizer), mesh, saved)
    hold = report.choice.hold
    return Run(
        config,
        report,
        mesh,
        folder,
        model,
        optimizer,
        train_data,
        val_data,
        packing,
        hold,
        loggers,
        saved,
        staging,
    ), state


def model_options(config: SFTConfig, choice: Choice) -> ModelOptions:
    sharding = config.model.fsdp_config
    attn = config.model.attn
    return ModelOptions(
        param_dtype=None if sharding.param_dtype == "auto" else DTYPES[sharding.param_dtype],
        master_dtype=DTYPES[sharding.model_dtype],
        reduce_dtype=DTYPES["fp64" if sharding.model_dtype == "fp64" else sharding.reduce_dtype],
        attn=attn,
        recompute=choice.recompute,
        parked=choice.parked,
        use_compile=config.model.use_compile,
        fp32_residual=run_options(config).fp32_residual,
        keep_copy=choice.keep_copy,
        reshard_after_forward=sharding.reshard_after_forward,
        forward_prefetch=sharding.forward_prefetch,
    )


def make_packing(
    mesh: Mesh, config: SFTConfig, tokens_per_gpu: int, quadratic_length: int
) -> Packing:
    """This rank's packs: samples per micro-batch where the user says so, else tokens."""
    samples = None if fills(config) else config.data.micro_batch_size_per_gpu
    budget = Budget(
        max_tokens_per_gpu=tokens_per_gpu if samples is None else None,
        micro_batch_size=samples,
        quadratic_length=quadratic_length,
    )
    return Packing(
        budget,
        dp_rank=mesh.dp_rank,
        dp=mesh.dp,
        sp=mesh.sp,
        pad_to=None if config.use_remove_padding else config.data.max_length,
    )


def resume(report: Report, mesh: Mesh, model: Sharded, optimizer: AdamW) -> TrainState:
    """The state to start from: step 0, or that of the checkpoint which preflight found to be this
    run's.
    """
    if report.resume is None:
        return TrainState()
    found, loaded = load_checkpoint(report, mesh, model_state(model, optimizer))
    restore_optimizer(optimizer, loaded)
    model.refresh()
    say(mesh, f"resumed from {found} (step {loaded.step}).")
    return TrainState(
        step=loaded.step, saved_step=loaded.step, skipped=int(loaded.extra.get("skipped_steps", 0))
    )


def one_step(
    run: Run, state: TrainState, batch: StepBatch, timer: StepTimer, watchdog: Watchdog
) -> None:
    """Train on one global batch; read and log the step before it."""
    optim = run.config.optim
    lr = learning_rate(
        state.step,
        run.report.steps,
        optim.lr,
        optim.lr_scheduler,
        optim.warmup_steps_ratio,
        optim.min_lr_ratio,
    )
    measured = train_step(
        run.model,
        run.optimizer,
        batch.micro_batches,
        batch.trained_tokens,
        lr,
        timer,
        run.hold,
        watchdog.beat,
    )
    state.step += 1
    log_pending(run, state)
    state.pending.append(PendingStep(batch, lr, measured, timer.take(), state.between))
    state.between = {}
    say_saved(run, state, wait=False)


def log_pending(run: Run, state: TrainState) -> None:
    """Log the steps that were waiting. Too many skipped in a row end the run."""
    for pending in state.pending:
        loss, norm, skipped = pending.measured.read()
        state.skipped += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        run.loggers.log(
            pending.batch.step + 1,
            step_metrics(run, pending, loss, norm) | {"train/skipped_steps": state.skipped},
        )
        if skipped:
            say(
                run.mesh, f"step {pending.batch.step + 1} was skipped: its gradient norm is {norm}."
            )
        if (
            state.skipped_in_a_row
            >= run.config.trainer.max_grad_skips + run.optimizer.loss_scale.halvings
        ):
            raise ValueError(
                f"{state.skipped_in_a_row} steps in a row had a non-finite gradient norm (the last "
                f"is {pending.batch.step + 1}): the run stops. {look_at_weights(run)}"
            )
    state.pending.clear()


def step_metrics(run: Run, pending: PendingStep, loss: float, norm: float) -> dict[str, float]:
    """Every metric of an optimizer step."""
    seconds = pending.times.seconds()
    batch = pending.batch
    world = run.mesh.world
    assert run.report.model is not None
    flops = model_flops(run.report.model, run.train_data.lengths[list(batch.samples)].tolist())
    used = mfu(flops, seconds["step"], world, device_peak(run.mesh.device))
    allocated, reserved = peak_memory(run.mesh.device)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": norm,
        "train/lr": pending.lr,
        "train/global_tokens": batch.real_tokens,
        "train/trained_tokens": batch.trained_tokens,
        "train/epoch": batch.epoch,
        "perf/tokens_per_second_per_gpu": batch.real_tokens / seconds["step"] / world,
        "perf/max_memory_allocated_gb": allocated,
        "perf/max_memory_reserved_gb": reserved,
        **{f"timing_s/{name}": value for name, value in {**pending.before, **seconds}.items()},
    }
    return metrics if used is None else {**metrics, "train/mfu": used}


def due(every: int | str, step: int, per_epoch: int) -> bool:
    """Whether something with frequency `every` (steps, -1, or after_each_epoch) happens after
    `step`.
    """
    period = per_epoch if every == "after_each_epoch" else int(every)
    return period > 0 and step % period == 0


def run_validation(run: Run, state: TrainState, watchdog: Watchdog) -> None:
    """Validate on every row and log it."""
    log_pending(run, state)
    if run.val_data is None:
        return
    batches = watchdog.each(iterate_validation(run.val_data, run.packing))
    run.loggers.log(state.step, validate(run.model, batches, int(run.val_data.trained.sum())))


def save(run: Run, state: TrainState) -> None:
    """Write a checkpoint of this step, unless it has one.

    ValueError where the run ends and no step trained anything.
    """
    log_pending(run, state)
    if state.step == run.report.steps:
        require_trained(run, state, state.step, state.skipped)
    save_step(run, state, {"step": state.step}, {"skipped_steps": state.skipped})


def finish(run: Run, state: TrainState) -> None:
    """Log what is left, wait for the last save. ValueError when the last checkpoint isn't there."""
    log_pending(run, state)
    say_saved(run, state, wait=True)
    require_saved(run, state)
    say_ended(run.mesh, state.step, run.report.steps, run.folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
