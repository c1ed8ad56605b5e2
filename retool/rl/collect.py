"""A step's groups: weights to the engine, prompts to trajectories, dynamic sampling until there are
enough. All of it is collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from retool.parallel.collectives import gather_objects
from retool.rl.agent.rollout import RolloutTimes, Sampling, roll_out
from retool.rl.build import Run, stream, training_sampling
from retool.rl.failures import count_lost, require_scores, warn_of_failures
from retool.rl.metrics import failure_metrics
from retool.rl.objective import filter as dynamic
from retool.rl.objective.experience import timed
from retool.rl.preflight.memory import ROOM
from retool.rl.state import TrainState, regroup
from retool.rl.types import LOST, Group, Prompt, Scored
from retool.run.folder import say

EMPTY_ROUNDS = 20  # rounds of dynamic sampling in a row without a single group worth training on
Metrics = dict[str, float]


def collect(
    run: Run, state: TrainState, times: Metrics
) -> tuple[list[Group], list[Group], int, Metrics] | None:
    """A step's groups, what is kept for the next one, the stream's position after it, and metrics;
    None when asked to stop.
    """
    config = run.config
    wanted = run.config.data.train_batch_size
    wish = config.algorithm.filter_groups
    sync(run, times)
    collection = dynamic.begin(state.kept, state.step)
    position = state.position
    fresh: list[Scored] = []
    empty = 0
    while (
        not dynamic.complete(collection, wanted, wish.max_num_gen_batches) and empty < EMPTY_ROUNDS
    ):
        count = (config.data.gen_batch_size or wanted) if wish.enable else wanted
        prompts = stream(run.report, position, count)
        groups = sample(
            run,
            prompts,
            config.actor_rollout_ref.rollout.n,
            training_sampling(config),
            state.step,
            times,
        )
        if groups is None:
            release(run)
            return None
        fresh += [member for group in groups for member in group.members]
        # As many as a step has: enough to tell
        enough = len(fresh) >= wanted * config.actor_rollout_ref.rollout.n
        if enough:
            require_scores(fresh, config.reward_model.max_failed_share, f"step {state.step + 1}")
        before = len(collection.groups)
        collection = dynamic.add(collection, groups, wish.metric if wish.enable else None)
        empty = 0 if len(collection.groups) > before else empty + 1
        position += count
        if enough and not len(collection.groups) and all(member.lost for member in fresh):
            break  # more of them would be lost as well
    release(run)
    count_lost(state, fresh, config.actor_rollout_ref.rollout.max_lost_share)
    require_scores(fresh, config.reward_model.max_failed_share, f"step {state.step + 1}")
    if empty >= EMPTY_ROUNDS and not collection.groups:
        raise dynamic.UnusableSamples(
            f"algorithm.filter_groups: {empty} rounds of sampling in a row gave no group whose "
            f"{wish.metric} differs: the questions are all too easy or too hard. Use others, a "
            "larger rollout.n, or filter_groups.max_num_gen_batches to go on regardless."
        )
    groups, kept = dynamic.take(collection, wanted)
    if len(groups) < wanted:
        rounds = f"{collection.rounds} rounds of sampling"
        what = "training on them" if groups else "nothing is trained"
        say(
            run.mesh,
            f"step {state.step + 1}: {len(groups)} of {wanted} groups after {rounds}; {what}.",
        )
    tokens = sum(member.trajectory.sampled for member in fresh)
    stops = [member.trajectory.stop for member in fresh]
    # Of all samples, in groups without a signal too
    lost = {f"stop/{stop.value}": float(stops.count(stop)) for stop in LOST}
    metrics = {
        **failure_metrics(fresh),
        **lost,
        "perf/rollout_tokens_per_second": tokens / max(times.get("gen", 0.0), 1e-9),
    }
    return (
        groups,
        kept,
        position,
        {**metrics, **(collection.metrics(len(kept)) if wish.enable else {})},
    )


def sync(run: Run, times: Metrics) -> None:
    """Give the engine the present weights. Collective."""
    with timed(times, "sync_weights"):
        run.engine.sync(run.model)
        if run.mesh.device.type == "cuda":
            torch.cuda.synchronize()


def release(run: Run) -> None:
    """Free the engine's memory for the update, where asked for or needed: its graphs are recorded
    anew after that. Collective.
    """
    wanted = run.config.actor_rollout_ref.rollout.free_cache_engine
    choice = run.report.choice
    if run.mesh.device.type != "cuda":
        return
    if wanted == "auto":
        assert choice is not None
        needed = ROOM * (choice.prediction.forward_backward - choice.prediction.state)
        device = run.mesh.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        short = torch.cuda.mem_get_info(device)[0] + unused < needed
        # Alike on all ranks, as sync is collective
        wanted = any(gather_objects(short, run.mesh.world_group))
    if wanted:
        run.engine.release()


def sample(
    run: Run, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, times: Metrics
) -> list[Group] | None:
    """`n` scored trajectories for each prompt, on every rank. Collective.

    None when asked to stop.
    """
    mine = [(prompt, k) for prompt in prompts[run.engine_rank :: run.engines] for k in range(n)]
    spent = RolloutTimes()
    found = list[Scored]()
    with timed(times, "gen"):
        if run.rollout is None:
            run.engine.follow()
        else:
            try:
                found = run.loop.run_until_complete(
                    roll_out(run.rollout, mine, sampling, step, spent)
                )
            finally:
                run.engine.end()
        everyone = gather_objects(with_one_trace(found), run.mesh.world_group)
    for name, seconds in (("tools", spent.tools), ("reward", spent.reward)):
        times[name] = times.get(name, 0.0) + seconds
    if any(part is None for part in everyone):
        return None
    members: list[Scored] = [member for part in everyone for member in part or []]
    if run.mesh.rank == 0:
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
