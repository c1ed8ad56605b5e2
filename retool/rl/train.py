"""GRPO/DAPO with tools, from a preflight report to a finished run folder.

`train` reads as a table of contents; `one_step`, `update` and `objective.policy.update_step` lead
to the backward pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from retool.metrics.collapse import Signs, signs_before
from retool.model.costs import model_flops
from retool.optim import learning_rate
from retool.perf import device_peak, mfu, peak_memory
from retool.rl.agent.tools.load import close_tools
from retool.rl.build import (
    Run,
    build_run,
    experience_options,
    loss_spec,
    update_budget,
    validation_sampling,
)
from retool.rl.collect import collect, release, sample, sync
from retool.rl.config import RLConfig
from retool.rl.config.algorithm import KLControlConfig
from retool.rl.failures import cause_of_loss, require_infrastructure, require_scores
from retool.rl.metrics import (
    failure_metrics,
    length_metrics,
    score_metrics,
    timing_metrics,
    tool_metrics,
)
from retool.rl.objective.batching import RLBatch, Row, mini_batches, rank_batches
from retool.rl.objective.experience import Experience, make_experience, timed
from retool.rl.objective.filter import UnusableSamples
from retool.rl.objective.policy import update_step
from retool.rl.preflight.plan import RLReport
from retool.rl.report import write_training, write_validation
from retool.rl.state import TrainState, adapted_kl_coef
from retool.rl.types import Group, Scored, trainable
from retool.rl.validate import validation_metrics
from retool.run.caller import COMMAND, Caller
from retool.run.ending import finish, orderly_end
from retool.run.folder import say
from retool.run.saving import save_step, say_saved
from retool.run.session import Session, begin, same_plan
from retool.run.skips import count_update

TRUNCATED = (
    "algorithm.mask_truncated leaves such answers out (data.max_response_length is their limit)"
)
# Of every step, whatever it does without
PARTS = (
    "sync_weights",
    "gen",
    "tools",
    "reward",
    "old_log_prob",
    "adv",
    "update_actor",
)
Metrics = dict[str, float]


def train(report: RLReport, caller: Caller = COMMAND) -> int | None:
    """Run RL as preflight found it possible. Returns the signal that stopped it, if one did.

    Collective: every process of the launcher calls it with the same configuration.
    """
    mesh = begin(report.options, caller)
    report = same_plan(report, mesh)
    run, state = build_run(report, mesh, caller)
    session = run.session
    trainer = report.config.trainer
    rollout = report.config.actor_rollout_ref.rollout
    signs = signs_before(session.folder, state.step) if mesh.rank == 0 else Signs()
    gc.collect()
    gc.freeze()  # questions and tokenizer stay: no collection while sampling walks through them
    with session.stop, orderly_end(session, state), let_go(run):
        with session.watchdog, saved_at_least(session, state):
            if trainer.val_before_train or trainer.val_only:
                run_validation(run, state)
            stopping = session.stop.agreed(mesh)
            while state.step < report.steps and not trainer.val_only and not stopping:
                times: Metrics = dict.fromkeys(PARTS, 0.0)
                with timed(times, "step"):
                    metrics = one_step(run, state, times)
                stopping = session.stop.agreed(mesh)
                if metrics is None:  # asked to stop while sampling: the step before is the last
                    break
                last = state.step == report.steps
                if last or due(trainer.test_freq, state.step):
                    with timed(times, "testing"):
                        run_validation(run, state)
                if last or stopping or due(trainer.save_freq, state.step):
                    with timed(times, "save_checkpoint"):
                        save(session, state)
                # Logged before the run may end here: the numbers of the step that went wrong are
                # the ones to look at.
                session.loggers.log(state.step, {**metrics, **timing_metrics(times)})
                for sign in signs.see(state.step, metrics):
                    say(mesh, sign)
                require_infrastructure(state, rollout.max_lost_share, rollout.max_lost_steps)
            # Does nothing when the last step was saved: `save_step` knows the step that it saved.
            if state.step:
                save(session, state)
            finish(session, state)
        session.staging.close()
    return session.stop.received


def due(every: int, step: int) -> bool:
    """Whether what happens every so many steps (-1: never) does now."""
    return every > 0 and step % every == 0


# --- a step ---


def one_step(run: Run, state: TrainState, times: Metrics) -> Metrics | None:
    """Sample, judge, train.

    None, and nothing changed, when the run was asked to stop in between.
    """
    session = run.session
    # Up to here nothing has changed: a request to stop while sampling loses this step's samples
    # only.
    collected = collect(run, state, times)
    if collected is None:
        return None
    groups, kept, position, metrics = collected
    members = [member for group in groups for member in group.members]
    usable = trainable(groups)

    made = Experience([], [], [], {})
    if usable:
        alone = one_update(session.report.config, len(usable))
        options = experience_options(session.report, state, alone)
        made = make_experience(usable, session.model, run.reference, options, times)
    if made.trained:
        with timed(times, "update_actor"):
            metrics |= update(session, state, made)
    elif usable:
        state.skips.without = f"all answers of a step ran out of tokens, and {TRUNCATED}"
        say(session.mesh, f"step {state.step + 1}: {state.skips.without}; nothing is trained.")
    adapt_kl(state, made, session.report.config.algorithm.kl_ctrl)
    # From here on the weights are those of the next step. The stream's position and the kept groups
    # move with them, or a resumed run would ask questions twice.
    state.step += 1
    state.position = position
    state.kept = kept

    if session.mesh.rank == 0 and groups:
        assert session.report.renderer is not None
        advantages = advantages_of(members, usable, made)
        write_training(session.folder, state.step, groups, advantages, session.report.renderer)
    say_saved(session, state, wait=False)
    data = session.report.config.data
    metrics = {**tool_metrics(members), **metrics, **score_metrics(members), **made.metrics}
    metrics |= length_metrics(members, data.max_response_length, data.max_prompt_length)
    return {**metrics, **performance(session, made, times)}


def one_update(config: RLConfig, groups: int) -> bool:
    """Whether a step of that many groups is a single optimizer step."""
    actor = config.actor_rollout_ref.actor
    return groups <= actor.ppo_mini_batch_size and actor.ppo_epochs == 1


def adapt_kl(state: TrainState, made: Experience, control: KLControlConfig) -> None:
    """The KL controller's next coefficient, where it is asked for and there is a KL in the reward."""
    if made.kl is not None and control.type == "adaptive":
        state.kl_coef = adapted_kl_coef(
            state.kl_coef, made.kl, control.target_kl, control.horizon, len(made.rows)
        )


def advantages_of(
    members: list[Scored], trained: list[Group], made: Experience
) -> list[np.ndarray]:
    """The advantages of all members, in order: 0 for those that were left out."""
    usable = [member for group in trained for member in group.members]
    # By identity: `usable` holds the same objects as `members`, less the ones that were left out.
    known = {id(usable[i]): made.rows[i].advantage for i in made.trained}
    return [known.get(id(member), np.zeros(len(member.trajectory))) for member in members]


def update(session: Session[RLReport], state: TrainState, made: Experience) -> Metrics:
    """The step's optimizer steps; means of what they measured."""
    report = session.report
    actor = report.config.actor_rollout_ref.actor
    # `on_policy` says that there is one update only, so it holds for all of the loop below.
    spec = replace(loss_spec(report), on_policy=made.on_policy)
    measured: list[Metrics] = []
    rows = [made.rows[i] for i in made.trained]
    groups = [made.groups[i] for i in made.trained]
    for _ in range(actor.ppo_epochs):
        for chosen in mini_batches(groups, actor.ppo_mini_batch_size):
            batches = micro_batches(session, [rows[i] for i in chosen])
            lr = next_learning_rate(report, state.updates)
            # Only the first update is of the weights that sampled.
            spec = replace(spec, compared=made.compared and not measured)
            model = session.model
            beat = session.watchdog.beat
            done = update_step(model, session.optimizer, batches, spec, lr, beat)
            state.updates += 1
            what = f"optimizer step {state.updates}"
            count_update(session, state, skipped=done.skipped, norm=done.grad_norm, what=what)
            measured.append({**done.metrics, "actor/grad_norm": done.grad_norm, "actor/lr": lr})
    # Only the first update has the numbers that compare sampler and trainer: each mean is over the
    # updates that have it.
    means: Metrics = {}
    for name in measured[0]:
        values = [entry[name] for entry in measured if name in entry]
        means[name] = sum(values) / len(values)
    return {
        **means,
        "actor/lr": measured[-1]["actor/lr"],
        "actor/skipped_updates": state.skips.total,
    }


def micro_batches(session: Session[RLReport], rows: list[Row]) -> list[RLBatch]:
    """This rank's micro-batches of a global mini-batch."""
    report = session.report
    mesh = session.mesh
    return rank_batches(
        rows,
        report.aggregation,
        report.config.data.max_response_length,
        mesh.dp_rank,
        mesh.dp,
        mesh.sp,
        update_budget(report),
    )


def next_learning_rate(report: RLReport, updates: int) -> float:
    optim = report.config.actor_rollout_ref.actor.optim
    return learning_rate(
        updates,
        report.steps * report.updates_per_step,
        optim.lr,
        optim.lr_scheduler,
        optim.warmup_steps_ratio,
        optim.min_lr_ratio,
    )


def performance(session: Session[RLReport], made: Experience, times: Metrics) -> Metrics:
    """Tokens per second and GPU of the whole step, the update's MFU, memory."""
    world = session.mesh.world
    lengths = [len(row) for row in made.rows]
    assert session.report.model is not None
    # Tools and rewards run while the engine samples: their seconds are inside "gen" already.
    seconds = sum(
        times.get(name, 0.0)
        for name in ("sync_weights", "gen", "old_log_prob", "ref", "adv", "update_actor")
    )
    flops = (
        model_flops(session.report.model, _sequence_lengths(made))
        * session.report.config.actor_rollout_ref.actor.ppo_epochs
    )
    used = mfu(flops, times.get("update_actor", 0.0), world, device_peak(session.mesh.device))
    out = {
        "perf/throughput": sum(lengths) / max(seconds, 1e-9) / world,
        "perf/total_num_tokens": sum(lengths),
        "perf/max_memory_allocated_gb": peak_memory(session.mesh.device)[0],
    }
    return out if used is None else {**out, "perf/mfu/actor": used}


def _sequence_lengths(made: Experience) -> list[int]:
    """Tokens of each sequence that the update sees."""
    rows = [made.rows[i] for i in made.trained]
    return [span.stop - span.start for row in rows for span in row.spans]


# --- validation and checkpoints ---


def run_validation(run: Run, state: TrainState) -> None:
    """Answer every validation question, write the answers, log the statistics.

    Nothing where there are none, or when asked to stop.
    """
    session = run.session
    questions = session.report.val
    config = session.report.config
    if questions is None:
        return
    times: Metrics = {}
    sync(run, times)
    groups = sample(
        run,
        questions.prompts,
        config.actor_rollout_ref.rollout.val_kwargs.n,
        validation_sampling(config),
        state.step,
        times,
    )
    release(run)
    if groups is None:
        return
    members = [member for group in groups for member in group.members]
    require_scores(
        members, config.reward_model.max_failed_share, f"the validation after step {state.step}"
    )
    lost = sum(member.lost for member in members)
    # During training `require_infrastructure` ends such a run after some steps. A run that only
    # validates has no further step.
    if config.trainer.val_only and lost > config.actor_rollout_ref.rollout.max_lost_share * len(
        members
    ):
        raise UnusableSamples(
            f"{lost} of the {len(members)} answers of the validation were lost: {cause_of_loss(members)}."
        )
    metrics = {**validation_metrics(groups), "val-aux/lost": lost}
    if session.mesh.rank == 0:
        assert session.report.renderer is not None
        write_validation(session.folder, state.step, groups, session.report.renderer)
        session.loggers.log_table(
            state.step, "val/generations", shown(groups, config.trainer.log_val_generations)
        )
    said = {
        name.replace("reward/", "val-aux/reward/"): value
        for name, value in failure_metrics(members).items()
    }
    session.loggers.log(state.step, {**metrics, **said})


def shown(groups: list[Group], most: int) -> list[dict[str, str | float]]:
    """Question, answer and score of `most` trajectories, from as many questions as there are."""
    members = [
        m
        for turn in zip_longest(*(group.members for group in groups))
        for m in turn
        if m is not None
    ][:most]
    return [
        {
            "question": str(m.trajectory.prompt.messages[-1]["content"]),
            "answer": m.trajectory.assistant_text,
            "score": m.score,
        }
        for m in members
    ]


def save(session: Session[RLReport], state: TrainState) -> None:
    """Write a checkpoint of this step, unless it has one."""
    save_step(session, state, updates=state.updates, data_state=state.data_state(), extra={})


@contextmanager
def saved_at_least(session: Session[RLReport], state: TrainState) -> Iterator[None]:
    """Where nothing more can be learnt, what was trained so far isn't lost."""
    try:
        yield
    except UnusableSamples:  # on all ranks alike
        if state.step and session.report.options.saves:
            save(session, state)
            say_saved(session, state, wait=True)
        raise


@contextmanager
def let_go(run: Run) -> Iterator[None]:
    """However the run ends, its engine, judges and tools end too."""
    try:
        yield
    except BaseException:
        _close_all(run)  # what fails now would only hide the cause
        raise
    failed = _close_all(run)
    if failed is not None:
        raise failed


def _close_all(run: Run) -> Exception | None:
    """Close what the run holds, each whatever becomes of the others; what failed first."""
    closers: list[Callable[[], Any]] = [run.engine.close]
    if run.judges is not None:
        closers.append(run.judges.close)
    if run.rollout is not None:
        closers.append(run.rollout.let_go)
    tools = run.session.report.tools
    closers += [lambda: run.loop.run_until_complete(close_tools(tools)), run.loop.close]
    failed: Exception | None = None
    for close in closers:
        try:
            close()
        except Exception as error:
            failed = failed or error
    return failed
