"""A run's checkpoints: what they hold, writing one, saying how it ended."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from retool import checkpoint
from retool.checkpoint.flat.state import require_finite
from retool.config.options import RunOptions
from retool.data.render.templates import exported_template
from retool.metrics import Loggers
from retool.optim import AdamW
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.preflight.plan import RunReport, checkpoint_bytes, parameter_count
from retool.run.folder import say
from retool.run.watchdog import Watchdog


class Run(Protocol):
    """What a save reads of a run; nothing of it is replaced while the run lasts."""

    @property
    def report(self) -> RunReport: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def folder(self) -> Path: ...
    @property
    def model(self) -> Sharded: ...
    @property
    def optimizer(self) -> AdamW: ...
    @property
    def save_options(self) -> checkpoint.SaveOptions: ...
    @property
    def staging(self) -> checkpoint.Staging: ...
    @property
    def loggers(self) -> Loggers: ...


class State(Protocol):
    """Steps done, the last one saved or being saved (-1: none), and its save until the result was
    said.
    """

    step: int
    saved_step: int
    save: checkpoint.PendingSave | None


SLOWEST_MB_S = 5  # of a disk, to a rank, that a run still waits for
SLOWER = 4  # times that a save may take as long as the slowest before it
PATIENCE_S = 120.0  # that an error waits for the save in flight: with a peer lost, it may never end


@contextmanager
def orderly_end(run: Run, state: State) -> Iterator[None]:
    """However the run ends, its loggers are closed; an error first waits for the save in flight, so
    that no checkpoint is lost.
    """
    try:
        yield
    except Exception:
        end = time.monotonic() + PATIENCE_S
        while state.save is not None and time.monotonic() < end:
            say_saved(run, state, wait=False)
            time.sleep(0.02)
        if state.save is None:
            run.staging.close()  # and for its copy to trainer.default_hdfs_dir
        raise
    finally:
        run.loggers.close()


@contextmanager
def watched(run: Run, watchdog: Watchdog) -> Iterator[None]:
    """Around a save: a hang in it ends the run after a time that its size and the disk's speed
    allow.
    """
    limit, why = save_limit(run)
    with watchdog.saving(limit, why):
        yield


def save_limit(run: Run) -> tuple[float, str]:
    """(seconds that a save may take, why): from this run's slowest one, and from its size as long
    as there is none.
    """
    options = run.report.options
    size = checkpoint_bytes(run.report)
    slowest = run.staging.slowest_s
    if slowest is not None:
        return (
            options.trainer.watchdog_s + SLOWER * slowest,
            f"trainer.watchdog_s and {SLOWER} times the {slowest:.1f} s of the slowest",
        )
    # The first rank alone writes the export; everything else is shared out.
    export = (
        2.0 * parameter_count(run.report.model)
        if run.report.model and "hf_model" in options.checkpoint.save_contents
        else 0.0
    )
    share = export + (size - export) / run.mesh.world
    why = f"trainer.watchdog_s and {share / 1e6:,.0f} MB at {SLOWEST_MB_S} MB/s, as none was measured yet"
    return options.trainer.watchdog_s + share / SLOWEST_MB_S / 1e6, why


def save_options(
    options: RunOptions,
    mesh: Mesh,
    model_folder: Path,
    chat_template: str | None,
    subfolder: str = "",
) -> checkpoint.SaveOptions:
    """As configured; where that is left to us, in the background on GPUs."""
    asked = options.checkpoint.async_save
    template = exported_template(model_folder, chat_template, options.model.trust_remote_code)
    return checkpoint.SaveOptions(
        contents=tuple(options.checkpoint.save_contents),
        keep=options.trainer.max_ckpt_to_keep,
        async_save=mesh.device.type == "cuda" if asked is None else asked,
        remote_url=options.trainer.default_hdfs_dir,
        chat_template=template,
        subfolder=subfolder,
    )


def model_state(model: Sharded, optimizer: AdamW) -> checkpoint.ModelState:
    """The flat shards that a checkpoint holds."""
    return checkpoint.ModelState(
        model.layout, model.master, optimizer.exp_avg, optimizer.exp_avg_sq, int(optimizer.steps)
    )


def restore_optimizer(optimizer: AdamW, loaded: checkpoint.Loaded) -> None:
    """What isn't in the shards: the count of updates, the loss scale."""
    optimizer.steps.fill_(loaded.optimizer_step)
    optimizer.loss_scale.restore(loaded.extra)


def require_trained(run: Run, state: State, updates: int, skipped: int) -> None:
    """ValueError at the end of a run where every update was skipped: its checkpoint would pass for
    a trained model.
    """
    if skipped < updates or state.saved_step == state.step:
        return
    problem = (
        "no step had anything to train on"
        if not updates
        else f"all {updates:,} updates had a gradient that isn't finite"
    )
    raise ValueError(
        f"nothing was trained: {problem}, so there is nothing to save in {run.folder}. {look_at_weights(run)}"
    )


def look_at_weights(run: Run) -> str:
    """A sentence that says how to find out whether the model that a run began with is sound."""
    command = f"python -m retool.checkpoint verify {shlex.quote(str(run.report.folder))}"
    return f"Look at the data and the learning rate; whether the model is sound says {command}"


def save_step(
    run: Run, state: State, data_state: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Write a checkpoint of this step, unless it has one; first say how the one before ended.

    Collective.
    """
    if state.saved_step == state.step:
        return
    say_saved(run, state, wait=True)
    mesh = run.mesh
    way_out = f"The run ends, and older checkpoints stay. {look_at_weights(run)}"
    require_finite(
        run.model.layout,
        mesh.shard_rank,
        run.model.master,
        mesh.world_group,
        f"step {state.step} isn't saved",
        way_out,
    )
    optim = run.report.options.optim
    adamw = run.optimizer.options
    extra = {**extra, **run.optimizer.loss_scale.state()}
    state.save = checkpoint.save(
        run.folder,
        model_state(run.model, run.optimizer),
        run.mesh,
        step=state.step,
        extra=extra,
        data_state={**data_state, "run": run.report.record},
        model_folder=run.report.folder or "",
        options=run.save_options,
        staging=run.staging,
        optimizer_group={
            "lr": optim.lr,
            "betas": list(adamw.betas),
            "eps": adamw.eps,
            "weight_decay": adamw.weight_decay,
        },
    )
    state.saved_step = state.step


def say_saved(run: Run, state: State, wait: bool) -> None:
    """Say how the last save ended, once it has (`wait`: when it has).

    A failed one is loud, is no saved step, and the run goes on.
    """
    result = None if state.save is None else state.save.wait() if wait else state.save.poll()
    if result is None:
        return
    state.save = None
    if result.error is not None:  # which `save` has said
        state.saved_step = -1
    else:
        run.staging.slowest_s = max(run.staging.slowest_s or 0.0, result.seconds)
        rate = result.bytes / max(result.seconds, 1e-9) / 1e6
        said = (
            f"saved {result.folder} ({result.stall_s:.2f} s of waiting, {result.seconds:.1f} s in all, "
            f"{rate:.0f} MB/s a rank)"
        )
        say(run.mesh, said)


def require_saved(run: Run, state: State) -> None:
    """ValueError when the last step's checkpoint isn't there."""
    if state.saved_step != state.step:
        raise ValueError(
            f"step {state.step} was trained, but its checkpoint could not be saved (see above): "
            f"{run.folder} has older ones."
        )
