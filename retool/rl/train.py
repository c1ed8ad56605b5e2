"""GRPO/DAPO with tools, from a preflight report to a finished run folder.

`train` reads as a table of contents; `one_step`, `update` and `objective.policy.update_step` lead
to the backward pass.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

import numpy as np

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
from retool.rl.failures import cause_of_loss, require_infrastructure, require_scores
from retool.rl.metrics import (
    failure_metrics,
    length_metrics,
    score_metrics,
    timing_metrics,
    tool_metrics,
)
from retool.rl.objective.batching import mini_batches, rank_batches
from retool.rl.objective.experience import Experience, make_experience, timed
from retool.rl.objective.filter import UnusableSamples
from retool.rl.objective.policy import update_step
from retool.rl.preflight.identity import fingerprints
from retool.rl.preflight.plan import Report
from retool.rl.report import write_training, write_validation
from retool.rl.state import TrainState, adapted_kl_coef
from retool.rl.types import Group, Scored, trainable
from retool.rl.validate import validation_metrics
from retool.run.ending import finish, orderly_end
from retool.run.saving import save_step, say_saved
from retool.run.session import Session, begin, same_plan
from retool.run.skips import count_update

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


def train(report: Report) -> None:
    """Run RL as preflight found it possible.

    Collective: every process of the launcher calls it with the same configuration.
    """
    mesh = begin(report.options)
    report = same_plan(report, mesh, fingerprints(report))
    run, state = build_run(report, mesh)
    session = run.session
    trainer = report.config.trainer
    rollout = report.config.actor_rollout_ref.rollout
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
                session.loggers.log(state.step, {**metrics, **timing_metrics(times)})
                require_infrastructure(state, rollout.max_lost_share, rollout.max_lost_steps)
            if state.step:
                save(session, state)
            finish(session, state)
        session.staging.close()


DISAGREEMENT = 0.2  # nats per token between sampler and trainer; bf16 has 0.001 to 0.02
DISAGREE = (
    "sampler and trainer disagree on the log-probabilities of sampled tokens "
    "(training/rollout_logp_diff_mean): one of their kernels computes wrongly here, and the policy "
    "gradient means little. Try actor_rollout_ref.model.attn=reference, or do without flash-attn."
)


def one_update(config: RLConfig, groups: int) -> bool:
    """Whether a step of that many groups is a single optimizer step."""
    actor = config.actor_rollout_ref.actor
    return groups <= actor.ppo_mini_batch_size and actor.ppo_epochs == 1


def due(every: int, step: int) -> bool:
    """Whether something with frequency `every` (-1: never) happens after `step`."""
    return every > 0 and step % every == 0


def one_step(run: Run, state: TrainState, times: Metrics) -> Metrics | None:
    """Sample, judge, train.

    None, and nothing changed, when the run was asked to stop in between.
    """
    session = run.session
    report = session.report
    config = report.config
    collected = collect(run, state, times)
    if collected is None:
        return None
    groups, kept, position, metrics = collected
    members = [member for group in groups for member in group.members]
    usable = trainable(groups)
    made = (
        make_experience(
            usable,
            session.model,
            run.reference,
            experience_options(report, state, one_update(config, len(usable))),
            times,
        )
        if usable
        else Experience([], [], {})
    )
    if usable:
        with timed(times, "update_actor"):
            metrics |= update(run, state, made)
    if made.kl is not None and config.algorithm.kl_ctrl.type == "adaptive":
        control = config.algorithm.kl_ctrl
        state.kl_coef = adapted_kl_coef(
            state.kl_coef, made.kl, control.target_kl, control.horizon, len(made.rows)
        )
    state.step = state.step + 1
    state.position = position
    state.kept = kept
    if session.mesh.rank == 0 and groups:
        assert report.renderer is not None
        write_training(
            session.folder,
            state.step,
            groups,
            advantages_of(members, usable, made),
            report.renderer,
        )
    say_saved(session, state, wait=False)
    data = config.data
    metrics = {**tool_metrics(members), **metrics, **made.metrics, **score_metrics(members)}
    metrics |= length_metrics(members, data.max_response_length, data.max_prompt_length)
    if (
        session.mesh.rank == 0
        and metrics.get("training/rollout_logp_diff_mean", 0.0) > DISAGREEMENT
    ):
        warnings.warn(DISAGREE, stacklevel=1)  # once a run: the text is always the same
    return {**metrics, **performance(session, made, times)}


def advantages_of(
    members: list[Scored], trained: list[Group], made: Experience
) -> list[np.ndarray]:
    """The advantages of all members, in order: 0 for those that were left out."""
    known = {
        id(member): row.advantage
        for member, row in zip(
            (m for group in trained for m in group.members), made.rows, strict=True
        )
    }
    return [known.get(id(member), np.zeros(len(member.trajectory))) for member in members]


# --- training ---


def update(run: Run, state: TrainState, made: Experience) -> Metrics:
    """The step's optimizer steps; means of what they measured."""
    session = run.session
    report = session.report
    config = report.config
    mesh = session.mesh
    actor = config.actor_rollout_ref.actor
    total = report.steps * report.updates_per_step
    spec = replace(loss_spec(report), on_policy=made.on_policy)
    found: list[Metrics] = []
    for _ in range(actor.ppo_epochs):
        for chosen in mini_batches(made.groups, actor.ppo_mini_batch_size):
            rows = [made.rows[i] for i in chosen]
            batches = rank_batches(
                rows,
                report.aggregation,
                config.data.max_response_length,
                mesh.dp_rank,
                mesh.dp,
                mesh.sp,
                update_budget(report),
            )
            optim = actor.optim
            lr = learning_rate(
                state.updates,
                total,
                optim.lr,
                optim.lr_scheduler,
                optim.warmup_steps_ratio,
                optim.min_lr_ratio,
            )
            # Later updates are of other weights
            measured = replace(spec, compared=made.compared and not found)
            done = update_step(
                session.model, session.optimizer, session.watchdog.each(batches), measured, lr
            )
            state.updates += 1
            count_update(
                session,
                state,
                skipped=done.skipped,
                norm=done.grad_norm,
                what=f"optimizer step {state.updates}",
            )
            found.append({**done.metrics, "actor/grad_norm": done.grad_norm, "actor/lr": lr})
    told = {name: [entry[name] for entry in found if name in entry] for name in found[0]}
    means = {name: sum(values) / len(values) for name, values in told.items()}
    return {**means, "actor/lr": found[-1]["actor/lr"], "actor/skipped_updates": state.skips.total}


def performance(session: Session[Report], made: Experience, times: Metrics) -> Metrics:
    """Tokens per second and GPU of the whole step, the update's MFU, memory."""
    world = session.mesh.world
    lengths = [len(row) for row in made.rows]
    assert session.report.model is not None
    seconds = sum(
        times.get(name, 0.0)
        for name in ("sync_weights", "gen", "old_log_prob", "ref", "adv", "update_actor")
    )
    flops = (
        model_flops(session.report.model, lengths)
        * session.report.config.actor_rollout_ref.actor.ppo_epochs
    )
    used = mfu(flops, times.get("update_actor", 0.0), world, device_peak(session.mesh.device))
    out = {
        "perf/throughput": sum(lengths) / max(seconds, 1e-9) / world,
        "perf/total_num_tokens": sum(lengths),
        "perf/max_memory_allocated_gb": peak_memory(session.mesh.device)[0],
    }
    return out if used is None else {**out, "perf/mfu/actor": used}


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


def save(session: Session[Report], state: TrainState) -> None:
    """Write a checkpoint of this step, unless it has one."""
    save_step(session, state, updates=state.updates, data_state=state.data_state(), extra={})


@contextmanager
def saved_at_least(session: Session[Report], state: TrainState) -> Iterator[None]:
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
    """However the run ends, its judges and tools end too."""
    try:
        yield
    finally:
        if run.judges is not None:
            run.judges.close()
        run.loop.run_until_complete(close_tools(run.session.report.tools))
        run.loop.close()
