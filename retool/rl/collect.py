"""A step's groups: weights to the engine, prompts to trajectories, dynamic sampling until there are
enough. All of it is collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from retool.parallel.collectives import gather_objects
from retool.rl.agent.rollout import RolloutTimes, Sampling, roll_out
from retool.rl.build import Run, stream, training_sampling
from retool.rl.failures import count_lost, require_scores, warn_of_failures
from retool.rl.metrics import failure_metrics, judge_metrics
from retool.rl.objective import filter as dynamic
from retool.rl.objective.experience import timed
from retool.rl.preflight.memory import ROOM
from retool.rl.state import TrainState, regroup
from retool.rl.types import LOST, Group, Prompt, Scored
from retool.run.folder import say

MAX_EMPTY_ROUNDS = 20  # of dynamic sampling in a row without a single group worth training on
Metrics = dict[str, float]


class Collected(NamedTuple):
    """A step's `groups`, what is `kept` for the next one, and the stream's `position` after it."""

    groups: list[Group]
    kept: list[Group]
    position: int
    metrics: Metrics


@dataclass
class _Sampled:
    """A step while it is being sampled: `samples` of all its rounds, `empty_rounds` in a row that
    added no group.
    """

    collection: dynamic.Collection
    position: int
    samples: list[Scored]
    empty_rounds: int = 0


def collect(run: Run, state: TrainState, times: Metrics) -> Collected | None:
    """Sample a step's groups; None when asked to stop."""
    session = run.session
    wanted = session.report.config.data.train_batch_size
    sync(run, times)
    sampled = _sample_rounds(run, state, times)
    release(run)
    if sampled is None:
        return None
    _require_usable(run, state, sampled)
    groups, kept = dynamic.take(sampled.collection, wanted)
    if len(groups) < wanted:
        rounds = f"{sampled.collection.rounds} rounds of sampling"
        what = "training on them" if groups else "nothing is trained"
        step = state.step + 1
        say(session.mesh, f"step {step}: {len(groups)} of {wanted} groups after {rounds}; {what}.")
    return Collected(groups, kept, sampled.position, _metrics(run, sampled, len(kept), times))


def _sample_rounds(run: Run, state: TrainState, times: Metrics) -> _Sampled | None:
    """Rounds of sampling until the step has its groups, or more of them would be in vain. One round
    without dynamic sampling. None when asked to stop.
    """
    report = run.session.report
    config = report.config
    wanted = config.data.train_batch_size
    n = config.actor_rollout_ref.rollout.n
    wish = config.algorithm.filter_groups
    count = (config.data.gen_batch_size or wanted) if wish.enable else wanted
    sampled = _Sampled(dynamic.begin(state.kept, state.step), state.position, [])

    while sampled.empty_rounds < MAX_EMPTY_ROUNDS:
        if dynamic.complete(sampled.collection, wanted, wish.max_num_gen_batches):
            break
        prompts = stream(report, sampled.position, count)
        groups = sample(run, prompts, n, training_sampling(config), state.step, times)
        if groups is None:
            return None
        sampled.samples += [member for group in groups for member in group.members]
        # As many as a step has: enough to tell
        enough = len(sampled.samples) >= wanted * n
        if enough:
            _require_scores(run, state, sampled)

        before = len(sampled.collection.groups)
        metric = wish.metric if wish.enable else None
        sampled.collection = dynamic.add(sampled.collection, groups, metric)
        added = len(sampled.collection.groups) > before
        sampled.empty_rounds = 0 if added else sampled.empty_rounds + 1
        sampled.position += count

        if enough and not sampled.collection.groups and all(s.lost for s in sampled.samples):
            break  # more of them would be lost as well
    return sampled


def _require_scores(run: Run, state: TrainState, sampled: _Sampled) -> None:
    most = run.session.report.config.reward_model.max_failed_share
    require_scores(sampled.samples, most, f"step {state.step + 1}")


def _require_usable(run: Run, state: TrainState, sampled: _Sampled) -> None:
    """UnusableSamples where the reward failed, or no group has a signal; lost samples are counted."""
    config = run.session.report.config
    count_lost(state, sampled.samples, config.actor_rollout_ref.rollout.max_lost_share)
    _require_scores(run, state, sampled)
    empty = sampled.empty_rounds
    if empty >= MAX_EMPTY_ROUNDS and not sampled.collection.groups:
        raise dynamic.UnusableSamples(
            f"algorithm.filter_groups: {empty} rounds of sampling in a row gave no group whose "
            f"{config.algorithm.filter_groups.metric} differs: the questions are all too easy or too "
            "hard. Use others, a larger rollout.n, or filter_groups.max_num_gen_batches to go on "
            "regardless."
        )


def _metrics(run: Run, sampled: _Sampled, kept: int, times: Metrics) -> Metrics:
    """Of all samples, in groups without a signal too."""
    tokens = sum(member.trajectory.sampled for member in sampled.samples)
    stops = [member.trajectory.stop for member in sampled.samples]
    metrics = failure_metrics(sampled.samples) | judge_metrics(sampled.samples)
    metrics |= {f"stop/{stop.value}": float(stops.count(stop)) for stop in LOST}
    metrics["perf/rollout_tokens_per_second"] = tokens / max(times.get("gen", 0.0), 1e-9)
    if run.session.report.config.algorithm.filter_groups.enable:
        metrics |= sampled.collection.metrics(kept)
    return metrics


def sync(run: Run, times: Metrics) -> None:
    """Give the engine the present weights. Collective."""
    with timed(times, "sync_weights"):
        run.engine.sync(run.session.model)
        if run.session.mesh.device.type == "cuda":
            torch.cuda.synchronize()


def release(run: Run) -> None:
    """Free the engine's memory for the update, where asked for or needed: its graphs are recorded
    anew after that. Collective.
    """
    session = run.session
    wanted = session.report.config.actor_rollout_ref.rollout.free_cache_engine
    if session.mesh.device.type != "cuda":
        return
    if wanted == "auto":
        # Alike on all ranks, as sync is collective
        wanted = any(gather_objects(_update_is_short_of_memory(run), session.mesh.world_group))
    if wanted:
        run.engine.release()


def _update_is_short_of_memory(run: Run) -> bool:
    """Whether the update would not fit beside what the engine holds on this GPU."""
    choice = run.session.report.choice
    assert choice is not None
    needed = ROOM * (choice.prediction.forward_backward - choice.prediction.state)
    device = run.session.mesh.device
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused < needed


def sample(
    run: Run, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, times: Metrics
) -> list[Group] | None:
    """`n` scored trajectories for each prompt, on every rank. Collective.

    None when asked to stop.
    """
    mesh = run.session.mesh
    mine = [(prompt, k) for prompt in prompts[run.engine_rank :: run.engines] for k in range(n)]
    spent = RolloutTimes()
    scored: list[Scored] | None = []
    with timed(times, "gen"):
        if run.rollout is None:
            run.engine.follow()
        else:
            try:
                rollout = roll_out(run.rollout, mine, sampling, step, spent)
                scored = run.loop.run_until_complete(rollout)
            finally:
                run.engine.end()
        everyone = gather_objects(with_one_trace(scored), mesh.world_group)
    times["tools"] = times.get("tools", 0.0) + spent.tools
    times["reward"] = times.get("reward", 0.0) + spent.reward
    if any(part is None for part in everyone):
        return None
    members: list[Scored] = [member for part in everyone for member in part or []]
    if mesh.rank == 0:
        warn_of_failures(members)
    return regroup(prompts, members)


def with_one_trace(members: list[Scored] | None) -> list[Scored] | None:
    """The same, but of the tracebacks only the first: thousands of them would travel between the
    ranks.
    """
    first = next((i for i, member in enumerate(members or []) if member.trace), None)
    return members and [
        replace(member, trace="") if member.trace and i != first else member
        for i, member in enumerate(members)
    ]
