"""An engine whose machine fails stands back: its prompts go to the others, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from retool.parallel.collectives import sum_over
from retool.parallel.lost_peer import lost_peer
from retool.parallel.mesh import Mesh, make_mesh
from retool.parallel.shared_work import GroupTorn, SharedWork
from retool.rl import collect
from retool.rl.agent.rollout import Sampling
from retool.rl.build import Run
from retool.rl.samplers import REST_STEPS, EngineFailed, Samplers, Share
from retool.rl.types import TOOL_FAILURE, Scored, Stop
from tests.ranks import run_ranks
from tests.rl.conftest import make_prompt, make_trajectory

N = 2  # samples of a prompt
PROMPTS = [make_prompt(index) for index in range(4)]


class Engine:
    """What a rank's engine is asked to do beside sampling. `broken`: its GPU is gone."""

    def __init__(self) -> None:
        self.releases = 0
        self.broken = False

    def end(self) -> None: ...

    def release(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.releases += 1


def test_those_that_failed_lately_take_over_last() -> None:
    samplers = Samplers(3, back={2: 10})
    (failed,) = [Share(1, "host", None, error="raised")]
    assert samplers.left([0, 1], [failed]) == [0]
    assert samplers.left([1], [failed]) == [2], "nobody else is left"


def sampled_by(rank: int, requests: Sequence[Any], fault: str, again: bool) -> list[Scored]:
    """A rollout; the response tells who made it. `fault` befalls it."""
    if fault.startswith("raises"):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    if again and fault == "loses what it takes over":
        fault = "loses all"
    made = []
    for number, (prompt, sample) in enumerate(requests):
        one = Scored(make_trajectory(prompt, sample, response=(rank,)), 1.0, 1.0)
        if fault == "loses all" or (fault == "loses half" and number % 2):
            gone = replace(one.trajectory, stop=Stop.INFRASTRUCTURE)
            one = Scored(gone, 0.0, 0.0, {TOOL_FAILURE: "the sandbox is gone"})
        made.append(one)
    return made


def makers(groups: Any) -> list[list[int]]:
    """Who made each sample of each prompt; -1 where it was lost."""
    return [
        [-1 if one.lost else int(one.trajectory.tokens[-1]) for one in group.members]
        for group in groups
    ]


def steps(cases: list[list[tuple[int, str, str]]]) -> tuple[list[list[Any]], str]:
    """Of each case its steps (number, fault on rank 0, on rank 1): who made what, who stands back,
    how many samples moved; or what ended it. And what this rank said of them all.
    """
    with redirect_stdout(StringIO()) as out:
        told = told_of(cases)
    return told, out.getvalue()


def run_of(mesh: Mesh, engine: Any, engines: int, leads: bool) -> Run:
    """A run of which nothing but `engine` is there."""
    rollout = SimpleNamespace(max_lost_share=0.3)
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
    session: Any = SimpleNamespace(
        mesh=mesh,
        report=SimpleNamespace(config=config),
        watchdog=SimpleNamespace(following=nullcontext),
    )
    parts: Any = SimpleNamespace() if leads else None
    loop = asyncio.new_event_loop()
    samplers = Samplers(engines)
    return Run(session, None, engine, engines, parts, None, loop, samplers, "host")  # type: ignore[arg-type]


def told_of(cases: list[list[tuple[int, str, str]]]) -> list[list[Any]]:
    mesh = make_mesh(device="cpu")
    told = []
    for case in cases:
        engine = Engine()
        run = run_of(mesh, engine, 2, leads=True)
        said: list[Any] = []
        for step, *faults in case:
            asked = iter([False, True])
            engine.broken = "its GPU is gone" in faults[mesh.rank]

            async def roll_out(
                _: Any,
                requests: Any,
                *rest: Any,
                fault: str = faults[mesh.rank],
                asked: Any = asked,
            ) -> list[Scored]:
                return sampled_by(mesh.rank, requests, fault, next(asked))

            run.samplers.moved = 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(collect, "roll_out", roll_out)
                try:
                    groups = collect.sample(run, PROMPTS, N, Sampling(), step, {})
                except RuntimeError as error:
                    said.append(f"{type(error).__name__}: {error}")
                    break
            back = sorted(run.samplers.back)
            said.append((makers(groups), back, run.samplers.moved, engine.releases))
        run.loop.close()
        told.append(said)
    dist.destroy_process_group()
    return told


BOTH = [[0, 0], [1, 1], [0, 0], [1, 1]]
FIRST = [[0, 0]] * 4
SECOND = [[1, 1]] * 4
CASES = {
    "its sandbox": [(1, "", "loses all"), (2, "", ""), (1 + REST_STEPS, "", "")],
    "half of its samples": [(1, "", "loses half")],
    "its engine": [(1, "raises", ""), (2, "", "")],
    "everybody's tools": [(1, "loses all", "loses all"), (2, "", "")],
    "a shared server": [(1, "loses half", "loses what it takes over"), (2, "", "")],
    "one engine, then the other": [(1, "raises", ""), (2, "", "raises")],
    "all engines": [(1, "raises", "raises")],
    "its GPU": [(1, "", "raises: its GPU is gone")],
}


def test_an_engine_that_fails_stands_back_and_others_do_its_work() -> None:
    (first, said), (second, _) = run_ranks(steps, 2, [*CASES.values()])
    found = dict(zip(CASES, first, strict=True))
    other = dict(zip(CASES, second, strict=True))
    assert found["its sandbox"] == [(FIRST, [1], 4, 0), (FIRST, [1], 0, 0), (BOTH, [], 0, 0)]
    # What wasn't lost is kept
    assert found["half of its samples"] == [([[0, 0], [1, 0], [0, 0], [1, 0]], [1], 2, 0)]
    assert found["its engine"] == [(SECOND, [0], 4, 1), (SECOND, [0], 0, 1)]
    assert other["its engine"] == [(SECOND, [0], 4, 0), (SECOND, [0], 0, 0)]
    # Nobody does better: it is counted as lost, and nobody stands back
    lost = [[-1, -1]] * 4
    assert found["everybody's tools"] == [(lost, [], 0, 0), (BOTH, [], 0, 0)]
    kept = [[0, -1], [1, 1], [0, -1], [1, 1]]
    assert found["a shared server"] == [(kept, [], 2, 0), (BOTH, [], 0, 0)]
    # The first was made anew by the sync between, and is asked before the run ends
    assert found["one engine, then the other"] == [(SECOND, [0], 4, 1), (FIRST, [1], 8, 1)]
    ecc = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert found["all engines"] == other["all engines"] == [ecc]
    (gone,) = found["its GPU"]
    assert found["its GPU"] == other["its GPU"]
    assert gone.startswith(
        f"EngineFailed: engine 1 on host failed ({ecc}), and can't even be released"
    )
    assert "an illegal memory access" in gone
    assert "engine 1 on host stands back for 10 steps (4 of its 4 samples were lost)" in said
    assert issubclass(EngineFailed, RuntimeError)


class SharedEngine:
    """One over all ranks. `failing` breaks at the second forward, of which the others are in the
    middle then.
    """

    def __init__(self, mesh: Mesh, failing: int) -> None:
        self.shared = SharedWork(mesh.world_group)
        self.fails = mesh.rank == failing
        self.forwards = 0

    def forward(self, message: str) -> None:
        self.forwards += 1
        if self.fails and self.forwards == 2:
            raise KeyError(message)
        sum_over(torch.ones(1), self.shared.group)

    def follow(self) -> None:
        self.shared.follow(self.forward)

    def end(self) -> None:
        self.shared.end()


def torn(failing: int) -> tuple[str, bool]:
    """What ends each rank of an engine, of which one fails; and whether that is another's end."""
    mesh = make_mesh(device="cpu")
    engine = SharedEngine(mesh, failing)
    run = run_of(mesh, engine, 1, leads=mesh.rank == 0)

    async def roll_out(*_: Any) -> None:
        for number in range(3):
            engine.shared.do(engine.forward, f"forward {number}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "roll_out", roll_out)
        try:
            collect.sample(run, PROMPTS, N, Sampling(), 1, {})
        except RuntimeError as error:
            assert isinstance(error, GroupTorn) == isinstance(error.__cause__, KeyError)
            return str(error), lost_peer(error)
    return "", False


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_of_an_engine_that_fails_amid_shared_work_ends_the_others(failing: int) -> None:
    """Not when the watchdog or a collective has waited long enough: when its process has ended."""
    told = run_ranks(torn, 2, failing, timeout=30)
    cause = f"rank {failing} failed at work that 2 ranks share, so none of them can go on: KeyError"
    assert told[failing][0].startswith(cause) and "forward 1" in told[failing][0]
    assert [is_lost for _, is_lost in told] == [rank != failing for rank in range(2)]
