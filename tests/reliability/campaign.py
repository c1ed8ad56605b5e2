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
from pathlib import Path

import torch

from retool.checkpoint import latest
from tests.ranks import _context
from tests.reliability.faults import FAULTS, HOOKS, NOTHING, Fault, Scene

LIMIT_S = 120.0  # that a run of a few seconds may take on a busy machine, whatever happens to it
LAUNCHER_S = 10.0  # after which the first rank that fails takes the others along
STEPS = 4


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

    work: Path
    root: Path
    lasts_s: Mapping[int, float]
    weights: Mapping[int, bytes]


def command(scene: Scene, work: Path, chance: random.Random) -> list[str]:
    """A run of `STEPS` steps with a checkpoint of each."""
    keys = {
        "data.train_files": scene.data,
        "model.partial_pretrain": work / "model",
        "trainer.default_local_dir": scene.out,
        "data.cache_dir": scene.cache,
        "data.train_batch_size": 4,
        "data.micro_batch_size_per_gpu": 2,
        "data.num_workers": 0,
        "optim.lr": 1e-3,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 1,
        "trainer.device": "cpu",
        "trainer.checkpoint.async_save": str(chance.random() < 0.5).lower(),
        **scene.keys,
    }
    return [f"{key}={value}" for key, value in keys.items()]


def _rank(words: list[str], rank: int, world: int, port: int, log: str, hook: str) -> None:
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
    from retool.sft.__main__ import main

    HOOKS[hook]()
    try:
        status = main(words)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    raise SystemExit(status)


def launch(
    scene: Scene, words: list[str], world: int, hook: str, log: Path, fault: Fault | None = None
) -> tuple[list[int], bool]:
    """Run a command with its ranks, and `fault.during` beside it.

    Exit statuses, and whether anything outlived `LIMIT_S`.
    """
    ranks = [
        _context.Process(
            target=_rank, args=(words, r, world, scene.port, str(log), hook), daemon=True
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
    sessions = {process.pid for process in ranks}
    hung = any(process.is_alive() for process in ranks)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    left = [pid for pid in _of_sessions(sessions) if pid not in sessions]
    return [process.exitcode or 0 for process in ranks if process.pid not in ended], hung or bool(
        left
    )


def _of_sessions(sessions: set[int | None]) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def make_scene(stage: Stage, number: int, seed: int, world: int) -> Scene:
    """A fresh place for one run; the cache is made anew in every third."""
    folder = stage.root / f"run_{number}"
    folder.mkdir()
    shutil.copy(stage.work / "train.parquet", folder / "train.parquet")
    return Scene(
        folder / "out",
        folder / "cache",
        folder / "train.parquet",
        random.Random(seed),
        stage.lasts_s.get(world, 5.0),
    )


def prepare(work: Path, root: Path) -> Stage:
    """Calm runs of one and two ranks, which all others are compared with."""
    stage = Stage(work, root, {}, {})
    for world in (1, 2):
        scene = make_scene(stage, -world, 0, world)
        for again in range(2):  # the first one starts the fork server
            shutil.rmtree(scene.out, ignore_errors=True)
            begin = time.monotonic()
            log = scene.out.with_name(f"log_{again}")
            statuses, hung = launch(scene, command(scene, work, scene.chance), world, NOTHING, log)
            assert statuses == [0] * world and not hung, log.read_text()[-3000:]
        lasts = {**stage.lasts_s, world: time.monotonic() - begin}
        stage = replace(
            stage, lasts_s=lasts, weights={**stage.weights, world: _weights(scene, world)}
        )
    return stage


def _weights(scene: Scene, world: int) -> bytes:
    folder = scene.out / f"global_step_{STEPS}"
    return b"".join(
        (folder / f"model_world_size_{world}_rank_{rank}.pt").read_bytes() for rank in range(world)
    )


def play(stage: Stage, number: int, fault: Fault, seed: int) -> Outcome:
    """One fault: the run that it happens to, then the same command again."""
    scene = make_scene(stage, number, seed, fault.world)
    log = scene.out.with_name("log")
    fault.before(scene)
    begin = time.monotonic()
    statuses, hung = launch(
        scene, command(scene, stage.work, scene.chance), fault.world, fault.inside, log, fault
    )
    seconds = time.monotonic() - begin
    said = log.read_text(errors="replace")
    broken = "something hung, or was left" if hung else _broken(fault, statuses, said)
    saved = latest(scene.out)
    then = 0
    again = ""
    if not broken:
        fault.after(scene)
        second = scene.out.with_name("log_again")
        codes, hung = launch(
            scene, command(scene, stage.work, scene.chance), fault.world, fault.inside_then, second
        )
        again = second.read_text(errors="replace")
        then = max(codes)
        broken = (
            "the second run hung, or left something"
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
    return "a refusal with a traceback" if refused and "Traceback" in said else ""


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
    if fault.exact and _weights(scene, fault.world) != stage.weights[fault.world]:
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


def draw(runs: int, seed: int) -> list[Fault]:
    """Every fault in turn, in a random order."""
    chance = random.Random(seed)
    out = list[Fault]()
    while len(out) < runs:
        out += chance.sample(FAULTS, len(FAULTS))
    return out[:runs]
