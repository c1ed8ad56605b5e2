"""A step's groups: weights to the engine, prompts to trajectories, dynamic sampling until there are
enough. All of it is collective.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from retool.parallel.collectives import gather_objects
from retool.parallel.shared_work import GroupTorn
from retool.rl.agent.rollout import RolloutTimes, Sampling, roll_out
from retool.rl.build import Run, stream, training_sampling
from retool.rl.failures import count_lost, require_scores, warn_of_failures
from retool.rl.metrics import failure_metrics, judge_metrics
from retool.rl.objective import filter as dynamic
from retool.rl.objective.experience import timed
from retool.rl.preflight.memory import ROOM
from retool.rl.samplers import REST_STEPS, EngineFailed, Request, Share, by_engine, deal, deal_again
from retool.rl.state import TrainState, regroup
from retool.rl.types import LOST, Group, Prompt, Scored
from retool.run.folder import say

SECONDS_TO_GIVE_UP = 5.0  # in which a rollout that Ctrl-C ended may close what it keeps
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
    config = session.report.config
    wanted = config.data.train_batch_size
    run.samplers.moved = 0
    sync(run, times)
    sampled = _sample_rounds(run, state, times)
    release(run)
    if sampled is None:
        return None
    _require_usable(run, state, sampled)
    keeps = config.algorithm.filter_groups.enable
    groups, kept = dynamic.take(sampled.collection, wanted, keeps)
    if len(groups) < wanted:
        rounds = f"{sampled.collection.rounds} rounds of sampling"
        what = "training on them" if groups else "nothing is trained"
        if not groups and not state.lost_to:
            metric = config.algorithm.filter_groups.metric
            state.skips.without = f"no group of a step had answers whose {metric} differs"
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
    # Dynamic sampling may ask for more questions a round than a step needs, as some of them give no
    # signal.
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
    stops = [member.trajectory.stop for member in sampled.samples]
    metrics = failure_metrics(sampled.samples) | judge_metrics(sampled.samples)
    metrics |= {f"stop/{stop.value}": float(stops.count(stop)) for stop in LOST}
    if sampled.samples:  # the groups may all be left over from the step before
        tokens = sum(member.trajectory.sampled for member in sampled.samples)
        metrics["perf/rollout_tokens_per_second"] = tokens / max(times.get("gen", 0.0), 1e-9)
    if run.engines > 1:
        metrics["rollout/engines_back"] = float(len(run.samplers.back))
        metrics["rollout/moved_samples"] = float(run.samplers.moved)
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
    # What torch holds and nobody uses is there for the update, too
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused < needed


def sample(
    run: Run, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, times: Metrics
) -> list[Group] | None:
    """`n` scored trajectories for each prompt, on every rank. Collective.

    None when asked to stop.
    """
    spent = RolloutTimes()
    with timed(times, "gen"):
        members = _sample_everywhere(run, prompts, n, sampling, step, spent)
    times["tools"] = times.get("tools", 0.0) + spent.tools
    times["reward"] = times.get("reward", 0.0) + spent.reward
    times["loop"] = times.get("loop", 0.0) + spent.loop
    if members is None:
        return None
    if run.session.mesh.rank == 0:
        warn_of_failures(members)
    return regroup(prompts, members)


def _sample_everywhere(
    run: Run,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    step: int,
    spent: RolloutTimes,
) -> list[Scored] | None:
    """All engines' samples; those of engines that fail are made by others. Collective."""
    limit = run.session.report.config.actor_rollout_ref.rollout.max_lost_share
    samplers = run.samplers
    shares = deal(prompts, n, samplers.ready(step))
    members = list[Scored]()
    fell_back = list[Share]()
    while True:
        found, raised = _round(run, shares, sampling, step, spent)
        # Who is asked to stop has no samples; all ranks see it in the same round
        if any(share.scored is None for share in found):
            return None
        failed = [share for share in found if share.fails(limit)]
        if not failed:
            return members + [one for share in found for one in share.scored or []]
        fell_back += failed
        ready = samplers.left(shares, fell_back)
        if not ready:
            break
        samplers.rest(failed, ready, step)
        for share in found:
            members += share.sound if share in failed else share.scored or []
        shares = deal_again(shares, failed, ready)
        samplers.moved += sum(map(len, shares.values()))
        _tell(run, failed, len(ready))
        _release_failed(run, failed, raised)
    # Nobody does better: what is lost isn't the fault of one machine
    samplers.recall(fell_back)
    if any(share.error for share in found):
        raise raised or EngineFailed(next(share.error for share in found if share.error))
    return members + [one for share in found for one in share.scored or []]


def _release_failed(run: Run, failed: Sequence[Share], raised: Exception | None) -> None:
    """Have engines that raised let go of everything, whatever state they are in: the next sync makes
    them anew. Collective. `raised`: what this rank's engine did.

    EngineFailed, with what an engine raised first, where one can't even do that: after most errors
    of CUDA the process can't use its GPU any more.
    """
    errors = {share.engine: share for share in failed if share.error}
    if not errors:
        return
    stuck = ""
    if run.engine_rank in errors:
        try:
            run.engine.release()
        except Exception as error:
            share = errors[run.engine_rank]
            stuck = (
                f"engine {share.engine} on {share.host} failed ({share.error}), and can't even be "
                f"released ({type(error).__name__}: {error}): this run can't use its GPU any more. "
                "The same command goes on from the last checkpoint."
            )
    found = [said for said in gather_objects(stuck, run.session.mesh.world_group) if said]
    if found:
        raise EngineFailed(found[0]) from raised


def _round(
    run: Run,
    shares: Mapping[int, Sequence[Request]],
    sampling: Sampling,
    step: int,
    spent: RolloutTimes,
) -> tuple[list[Share], Exception | None]:
    """Every engine's share, sampled; and what this rank's engine raised. Collective."""
    requests = shares.get(run.engine_rank)
    raised: Exception | None = None
    scored: list[Scored] | None = []
    try:
        if requests is not None:
            scored = _sample_share(run, requests, sampling, step, spent)
    except GroupTorn:  # the others of its engine wait for a rank that failed: it has to go
        raise
    except Exception as error:
        raised = error
    said = "" if raised is None else f"{type(raised).__name__}: {raised}"
    mine = Share(run.engine_rank, run.host, with_one_trace(scored), said)
    # Whoever has no share waits as long as the others sample
    waiting = run.session.watchdog.following() if requests is None else nullcontext()
    with waiting:
        everyone = gather_objects(mine, run.session.mesh.world_group)
    return [share for share in by_engine(everyone) if share.engine in shares], raised


def _sample_share(
    run: Run,
    requests: Sequence[Request],
    sampling: Sampling,
    step: int,
    spent: RolloutTimes,
) -> list[Scored] | None:
    """This rank's part of its engine's work; only the rank that leads has samples."""
    if run.rollout is None:
        run.engine.follow()
        return []
    torn = False
    rollout = run.loop.create_task(roll_out(run.rollout, requests, sampling, step, spent))
    try:
        return run.loop.run_until_complete(rollout)
    except GroupTorn:
        torn = True
        raise
    finally:
        _give_up(rollout, run.loop)
        # Whatever else happened: the ranks that follow would wait for ever
        if not torn:
            run.engine.end()


def _give_up(rollout: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Let a rollout that Ctrl-C left in the middle close what it keeps, if it isn't done.

    It would go on where the loop runs next, to close the tools: with an engine whose other ranks
    are gone by then.
    """
    if rollout.done():
        return
    rollout.cancel()
    loop.run_until_complete(asyncio.wait({rollout}, timeout=SECONDS_TO_GIVE_UP))


def _tell(run: Run, failed: Sequence[Share], left: int) -> None:
    """Who stands back, and why; rank 0 says it."""
    for share in failed:
        say(
            run.session.mesh,
            f"engine {share.engine} on {share.host} stands back for {REST_STEPS} steps "
            f"({share.cause}); {left} of {run.engines} go on, with its prompts.",
        )


def with_one_trace(members: list[Scored] | None) -> list[Scored] | None:
    """The same, but of the tracebacks only the first: thousands of them would travel between the
    ranks.
    """
    if members is None:
        return None
    first = next((i for i, member in enumerate(members) if member.trace), None)
    return [
        replace(member, trace="") if member.trace and i != first else member
        for i, member in enumerate(members)
    ]
