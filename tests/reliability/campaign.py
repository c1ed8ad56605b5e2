"""Runs with one fault each, and the rule: what was promised is there, what was refused says why,
nothing hangs, no process is left.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path

import torch

from retool.checkpoint import latest
from tests.ranks import _context, server
from tests.reliability.commands import STEPS, Command
from tests.reliability.faults import FAULTS, HOOKS, NOTHING, Fault, Scene
from tests.reliability.processes import children, left, orphans_adopted
from tests.reliability.rl_faults import HOOKS as RL_HOOKS
from tests.reliability.rl_faults import RL_FAULTS

LIMIT_S = 150.0  # that a run of a few seconds may take on a busy machine, whatever happens to it
LAUNCHER_S = 10.0  # after which the first rank that fails takes the others along
LEFT_S = 15.0  # that what a run has started may live on


@dataclass(frozen=True)
class Outcome:
    """How a run with a fault ended: the rule's violation if any, the exit statuses, the first run's
    seconds, its last words.
    """

    fault: str
    broken: str
    statuses: tuple[int, ...]
    then: int
    seconds: float
    words: str


@dataclass(frozen=True)
class Stage:
    """What all runs share: the tiny model and data, where they go, and what a run that nothing
    happens to makes of them.
    """

    command: Command
    work: Path
    root: Path
    lasts_s: Mapping[int, float]
    weights: Mapping[int, bytes]


def _rank(
    command: Command, words: list[str], rank: int, world: int, port: int, log: str, hook: str
) -> None:
    os.setsid()  # whatever it leaves can be found
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            **{name: str(value) for name, value in place.items()},
        }
    torch.set_num_threads(1)
    command.began()
    ALL_HOOKS[hook]()
    try:
        status = command.main(words)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    raise SystemExit(status)


def launch(
    stage: Stage, scene: Scene, world: int, hook: str, log: Path, fault: Fault | None = None
) -> tuple[list[int], str]:
    """Run the command with its ranks, and `fault.during` beside it.

    Exit statuses, and what outlived `LIMIT_S`, or was left.
    """
    server.ensure_running()
    resource_tracker.ensure_running()
    with orphans_adopted():
        before = children()
        statuses, hung = _run_ranks(stage, scene, world, hook, log, fault)
        lasting = [f"{p.pid} {p.command[:200]}" for p in left(before, LEFT_S)]
    return statuses, "; ".join([*hung, *lasting])


def _run_ranks(
    stage: Stage, scene: Scene, world: int, hook: str, log: Path, fault: Fault | None
) -> tuple[list[int], list[str]]:
    """(exit statuses of the ranks that the launcher didn't end, which ranks outlived the limit)."""
    words = stage.command.words(scene, stage.work, scene.chance)
    ranks = [
        _context.Process(
            target=_rank,
            args=(stage.command, words, r, world, scene.port, str(log), hook),
        )
        for r in range(world)
    ]
    scene.processes = list(ranks)
    for process in ranks:
        process.start()
    if fault is not None:
        fault.during(scene)
    end = time.monotonic() + LIMIT_S
    first_down = None
    ended = set[int | None]()
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if first_down is None and any(process.exitcode not in (None, 0) for process in ranks):
            first_down = time.monotonic()
        if first_down is not None and time.monotonic() > first_down + LAUNCHER_S and not ended:
            ended = {process.pid for process in ranks if process.is_alive()}  # as torchrun does
            for process in ranks:
                process.terminate()
            end = min(end, time.monotonic() + 30)
        time.sleep(0.01)
    hung = [f"rank {rank} hung" for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    return [process.exitcode or 0 for process in ranks if process.pid not in ended], hung


def make_scene(stage: Stage, number: int, seed: int, world: int) -> Scene:
    """A fresh place for one run; the cache is made anew in every third."""
    folder = stage.root / f"run_{number}"
    folder.mkdir()
    data = folder / stage.command.data
    shutil.copy(stage.work / data.name, data)
    return Scene(
        folder / "out",
        folder / "cache",
        data,
        random.Random(seed),
        stage.lasts_s.get(world, 5.0),
    )


def prepare(command: Command, root: Path) -> Stage:
    """Calm runs of one and two ranks, which all others are compared with."""
    root.mkdir(exist_ok=True)
    stage = Stage(command, command.make(root / "work"), root, {}, {})
    for world in (1, 2):
        scene = make_scene(stage, -world, 0, world)
        for again in range(2):  # the first one starts the fork server
            shutil.rmtree(scene.out, ignore_errors=True)
            begin = time.monotonic()
            log = scene.out.with_name(f"log_{again}")
            statuses, hung = launch(stage, scene, world, NOTHING, log)
            assert statuses == [0] * world and not hung, hung + log.read_text()[-3000:]
        lasts = {**stage.lasts_s, world: time.monotonic() - begin}
        stage = replace(
            stage, lasts_s=lasts, weights={**stage.weights, world: _weights(stage, scene, world)}
        )
    return stage


def _weights(stage: Stage, scene: Scene, world: int) -> bytes:
    folder = scene.out / f"global_step_{STEPS}" / stage.command.shards
    return b"".join(
        (folder / f"model_world_size_{world}_rank_{rank}.pt").read_bytes() for rank in range(world)
    )


def play(stage: Stage, number: int, fault: Fault, seed: int) -> Outcome:
    """One fault: the run that it happens to, then the same command again."""
    scene = make_scene(stage, number, seed, fault.world)
    log = scene.out.with_name("log")
    fault.before(scene)
    begin = time.monotonic()
    statuses, hung = launch(stage, scene, fault.world, fault.inside, log, fault)
    seconds = time.monotonic() - begin
    said = log.read_text(errors="replace")
    broken = f"hung or left: {hung}" if hung else _broken(fault, statuses, said)
    saved = latest(scene.out)
    then = 0
    again = ""
    if not broken:
        fault.after(scene)
        second = scene.out.with_name("log_again")
        codes, hung = launch(stage, scene, fault.world, fault.inside_then, second)
        again = second.read_text(errors="replace")
        then = max(codes)
        broken = (
            f"the second run hung or left: {hung}"
            if hung
            else _broken_then(stage, fault, scene, codes, again)
        )
    if broken:
        broken = f"{broken} (statuses {statuses}, then {then}; saved {saved})\n{said[-1500:]}\n--- again\n{again[-1500:]}"
    else:
        shutil.rmtree(scene.out.parent)
    return Outcome(fault.name, broken, tuple(statuses), then, seconds, last_words(said))


def _broken(fault: Fault, statuses: list[int], said: str) -> str:
    """What of the rule the first run breaks."""
    if odd := [status for status in statuses if status not in fault.first]:
        return f"the first run ended with {odd[0]}"
    if fault.told and any(statuses) and fault.told not in said:
        return f"it doesn't say {fault.told!r}"
    if fault.said and fault.said not in said:
        return f"it doesn't say {fault.said!r}"
    refused = 1 in statuses and not any(status < 0 for status in statuses)
    raw = refused and "Traceback" in said and not fault.traceback
    return "a refusal with a traceback" if raw else ""


def _broken_then(stage: Stage, fault: Fault, scene: Scene, codes: list[int], said: str) -> str:
    """What of the rule the second run breaks: it goes on to the end, exactly, or it is refused with
    the reason.
    """
    if any(code != fault.second for code in codes):
        return "the second run ended otherwise than promised"
    if fault.told_then and fault.told_then not in said:
        return f"it doesn't say {fault.told_then!r}"
    if fault.second == 0 and latest(scene.out) != scene.out / f"global_step_{STEPS}":
        return "the last checkpoint isn't there"
    if fault.exact and _weights(stage, scene, fault.world) != stage.weights[fault.world]:
        return "the weights are other than those of a calm run"
    return ""


def last_words(said: str) -> str:
    """What a user reads last, in short."""
    lines = [
        line.strip()
        for line in said.splitlines()
        if line.strip() and not line.startswith(("[W", "[rank"))
    ]
    telling = [
        line
        for line in lines
        if line.startswith(
            ("error:", "trainer.", "MASTER", "optim.", "A save hung", "asked to stop", "finished")
        )
    ]
    return (telling or lines or [""])[-1]


def draw(command: Command, runs: int, seed: int) -> list[Fault]:
    """Every fault of a command in turn, in a random order."""
    chance = random.Random(seed)
    faults = FAULTS_OF[command.name]
    out = list[Fault]()
    while len(out) < runs:
        out += chance.sample(faults, len(faults))
    return out[:runs]


FAULTS_OF = {"sft": FAULTS, "rl": RL_FAULTS}
ALL_HOOKS = {**HOOKS, **RL_HOOKS}
