"""Multi-turn SFT, from a preflight report to a finished run folder.

`train` reads as a table of contents; `one_step` and `retool.sft.step.train_step` lead to the
backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

from retool import checkpoint
from retool.data.loader import (
    Ahead,
    StepBatch,
    StepOrder,
    iterate_steps,
    iterate_validation,
    lengths_ahead,
)
from retool.data.packing import Packing
from retool.model.borrowed.module import BorrowedModel
from retool.model.costs import model_flops
from retool.model.decoder import Decoder, plan_attention
from retool.optim import learning_rate
from retool.parallel.mesh import Mesh
from retool.perf import StepTimes, device_peak, mfu, peak_memory
from retool.run.caller import COMMAND, Caller
from retool.run.ending import finish, orderly_end
from retool.run.folder import say
from retool.run.resume import resume
from retool.run.saving import save_step, say_saved
from retool.run.session import Session, Skips, begin, load_model, open_session, same_plan
from retool.run.skips import count_update
from retool.sft.plan import SFTReport, packing_of, records
from retool.sft.recorded import SmallPacks
from retool.sft.step import Measured, train_step
from retool.sft.validate import validate


@dataclass
class TrainState:
    """What survives a step; the first four as `retool.run.session.Progress` says.

    `pending` are steps whose numbers are still on the device. `between` are seconds of what came
    after the last step: testing, a save. `small` runs micro-batches of few tokens.
    """

    step: int = 0
    saved_step: int = -1
    save: checkpoint.PendingSave | None = None
    skips: Skips = field(default_factory=Skips)
    pending: list[PendingStep] = field(default_factory=list)
    between: dict[str, float] = field(default_factory=dict)
    small: SmallPacks | None = None


@dataclass(frozen=True)
class PendingStep:
    """A step that was enqueued; `before` are seconds of what came before it."""

    batch: StepBatch
    lr: float
    measured: Measured
    times: StepTimes
    before: dict[str, float]


def train(report: SFTReport, caller: Caller = COMMAND) -> int | None:
    """Run SFT as preflight found it possible. Returns the signal that stopped it, if one did.

    Collective: every process of the launcher calls it with the same configuration.
    """
    mesh = begin(report.options, caller)
    report = same_plan(report, mesh)
    session, state = start(report, mesh, caller)
    plan_ahead(session, state)
    with session.stop, orderly_end(session, state):
        with closing(training_batches(session, state.step)) as batches, session.watchdog:
            # Recorded collectives keep NCCL from ending, also after an error
            with closing(state.small) if state.small is not None else nullcontext():
                train_steps(session, state, batches)
            finish(session, state)
        session.staging.close()
    return session.stop.received


def train_steps(
    session: Session[SFTReport], state: TrainState, batches: Iterator[StepBatch]
) -> None:
    """All steps that are left, or those until the run is asked to stop; validated and saved as due."""
    report = session.report
    trainer = report.config.trainer
    while state.step < report.steps:
        session.watchdog.beat()
        with session.timer.phase("data"):
            batch = next(batches)
        one_step(session, state, batch)
        # Every step: the ranks must leave the loop after the same one, or the next collective never
        # ends.
        stopping = session.stop.agreed(session.mesh)
        last = state.step == report.steps
        # Whoever asked the run to stop may not wait for more than a save.
        if not stopping and (last or due(trainer.test_freq, state.step, report.steps_per_epoch)):
            with session.timer.phase("testing"):
                run_validation(session, state)
        if last or stopping or due(trainer.save_freq, state.step, report.steps_per_epoch):
            with session.timer.phase("save"):
                save(session, state)
        # Validation or a save came between two steps: its time isn't the next step's.
        if not state.pending:
            state.between = session.timer.take().seconds()
        if stopping and not last:
            break
    log_pending(session, state)


def start(
    report: SFTReport, mesh: Mesh, caller: Caller = COMMAND
) -> tuple[Session[SFTReport], TrainState]:
    """Load the model, resume if there is something to resume from, open the session. Collective."""
    model, optimizer = load_model(report, mesh)
    assert isinstance(model.module, (Decoder, BorrowedModel)) and report.choice is not None
    if not caller.quiet:
        backend = model.module.execution.backend
        say(mesh, f"attention: {backend}; recomputation: {report.choice.recompute}")
    state = TrainState()
    if records(report):
        state.small = SmallPacks(model, report.choice.recorded)
    loaded = resume(report, mesh, model, optimizer)
    if loaded is not None:
        state.step = loaded.step
        state.saved_step = loaded.step
        state.skips.total = int(loaded.extra.get("skipped_steps", 0))
    splits = [split for split in (report.train, report.val) if split is not None]
    problems = [split.dataset.problem for split in splits]
    session = open_session(
        report, mesh, model, optimizer, step=state.step, caller=caller, problems=problems
    )
    return session, state


def plan_ahead(session: Session[SFTReport], state: TrainState) -> None:
    """Let attention prepare for the lengths that the run will meet."""
    report = session.report
    data = report.config.data
    assert report.train is not None and report.choice is not None
    begun = time.monotonic()
    found = lengths_ahead(report.train.dataset, step_order(report), state.step, report.steps)
    padded = not report.config.use_remove_padding
    lengths = [data.max_length] if padded else found.tolist()
    whole = report.choice.tokens if data.keep_documents_whole and not padded else 0
    planned = plan_attention(session.model, lengths, whole)
    if planned:
        seconds = time.monotonic() - begun
        say(session.mesh, f"attention: cuDNN's plans for {planned} lengths, {seconds:.1f} s")


# --- a step ---


def step_order(report: SFTReport) -> StepOrder:
    data = report.config.data
    return StepOrder(data.train_batch_size, data.seed, data.shuffle)


def training_batches(session: Session[SFTReport], start_step: int) -> Ahead[StepBatch]:
    """The global batches from `start_step` on, as this rank's micro-batches."""
    report = session.report
    assert report.train is not None
    return iterate_steps(
        report.train.dataset,
        step_order(report),
        make_packing(report, session.mesh),
        start_step=start_step,
        stop_step=report.steps,
    )


def make_packing(report: SFTReport, mesh: Mesh) -> Packing:
    """How a step's samples become this rank's micro-batches."""
    return packing_of(report, mesh.dp_rank, mesh.dp, mesh.sp)


def one_step(session: Session[SFTReport], state: TrainState, batch: StepBatch) -> None:
    """Train on one global batch; read and log the step before it.

    Reading one step late keeps the host ahead of the device: the numbers have long arrived.
    """
    report = session.report
    optim = report.config.optim
    assert report.choice is not None
    lr = learning_rate(
        state.step,
        report.steps,
        optim.lr,
        optim.lr_scheduler,
        optim.warmup_steps_ratio,
        optim.min_lr_ratio,
    )
    measured = train_step(
        session.model,
        session.optimizer,
        batch.micro_batches,
        batch.trained_tokens,
        lr,
        session.timer,
        hold_gradients=report.choice.hold,
        beat=session.watchdog.beat,
        small=state.small,
    )
    state.step += 1
    log_pending(session, state)
    state.pending.append(PendingStep(batch, lr, measured, session.timer.take(), state.between))
    state.between = {}
    say_saved(session, state, wait=False)


def log_pending(session: Session[SFTReport], state: TrainState) -> None:
    """Log the steps that were waiting. Too many skipped in a row end the run."""
    for pending in state.pending:
        loss, norm, skipped = pending.measured.read()
        number = pending.batch.step + 1
        metrics = step_metrics(session, pending, loss, norm) | pending.measured.read_balance()
        metrics["train/skipped_steps"] = state.skips.total + skipped
        session.loggers.log(number, metrics)
        count_update(session, state, skipped=skipped, norm=norm, what=f"step {number}")
    state.pending.clear()


def step_metrics(
    session: Session[SFTReport], pending: PendingStep, loss: float, norm: float
) -> dict[str, float]:
    """Every metric of an optimizer step."""
    report = session.report
    batch = pending.batch
    device = session.mesh.device
    world = session.mesh.world
    assert report.model is not None and report.train is not None
    seconds = pending.times.seconds()
    lengths = report.train.dataset.lengths[list(batch.samples)]
    # Of the samples alone: work on padding, or done again in the backward pass, isn't the model's
    flops = model_flops(report.model, lengths.tolist())
    used = mfu(flops, seconds["step"], world, device_peak(device))
    allocated, reserved = peak_memory(device)
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
    }
    for name, value in {**pending.before, **seconds}.items():
        metrics[f"timing_s/{name}"] = value
    return metrics if used is None else {**metrics, "train/mfu": used}


# --- between two steps ---


def due(every: int | str, step: int, per_epoch: int) -> bool:
    """Whether what happens every so many steps (-1: never), or after_each_epoch, does now."""
    period = per_epoch if every == "after_each_epoch" else int(every)
    return period > 0 and step % period == 0


def run_validation(session: Session[SFTReport], state: TrainState) -> None:
    """Validate on every row and log it."""
    # First the steps that wait: entries come in the order of the steps
    log_pending(session, state)
    if session.report.val is None:
        return
    data = session.report.val.dataset
    batches = session.watchdog.each(
        iterate_validation(data, make_packing(session.report, session.mesh))
    )
    metrics = validate(session.model, batches, int(data.trained.sum()))
    session.loggers.log(state.step, metrics)


def save(session: Session[SFTReport], state: TrainState) -> None:
    """Write a checkpoint of this step, unless it has one."""
    # It tells how many steps were skipped: those that wait must have been counted
    log_pending(session, state)
    save_step(
        session,
        state,
        updates=state.step,
        data_state={"step": state.step},
        extra={"skipped_steps": state.skips.total},
    )
