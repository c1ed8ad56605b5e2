"""Real training processes, killed at random instants, most of them inside a save: nothing complete
is ever lost, nothing torn is ever used, and the final weights are those of a run that was never
killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from retool.checkpoint import latest
from retool.checkpoint.__main__ import main as command
from retool.metrics import read_jsonl
from retool.sft.__main__ import main as train
from tests.checkpoint.states import under_way
from tests.ranks import _context, free_port
from tests.sft.conftest import work  # noqa: F401  (a fixture)

WORLD = 2


def _words(folder: Path, out: Path, steps: int) -> list[str]:
    keys = {
        "data.train_files": folder / "train.parquet",
        "model.partial_pretrain": folder / "model",
        "trainer.default_local_dir": out,
        "data.train_batch_size": 2,
        "data.micro_batch_size_per_gpu": 1,
        "data.train_max_samples": 20,
        "optim.lr": 1e-3,
        "data.num_workers": 0,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": 1,
        "trainer.checkpoint.async_save": "true",
        "trainer.max_ckpt_to_keep": 2,
        "trainer.device": "cpu",
    }
    return [f"{k}={v}" for k, v in keys.items()]


def _rank(words: list[str], rank: int, port: int, log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(train(words))


def _start(words: list[str], log: Path) -> list[BaseProcess]:
    port = free_port()
    ranks = [
        _context.Process(target=_rank, args=(words, r, port, log), daemon=True)
        for r in range(WORLD)
    ]
    for process in ranks:
        process.start()
    return ranks


def _join(ranks: list[BaseProcess], log: Path, limit: float = 60) -> list[int | None]:
    """Exit codes; none may outlive a dead peer by more than `limit` seconds."""
    for process in ranks:
        process.join(timeout=limit)
        assert process.exitcode is not None, (
            f"a rank outlives its dead peer:\n{log.read_text()[-3000:]}"
        )
    return [process.exitcode for process in ranks]


def _step(out: Path) -> int:
    tracker = out / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _kill_at_random(ranks: list[BaseProcess], out: Path, chance: random.Random) -> bool:
    """SIGKILL one rank or all, inside a save, after one, or anywhere while starting; whether a save
    was under way.
    """
    begin = time.monotonic()
    since = time.time()
    first = _step(out)
    when = chance.random()
    # Who isn't connected yet can't notice a dead peer: there a launcher ends the others
    if when > 0.9:
        time.sleep(chance.random() * 3)
    while when <= 0.9 and all(p.is_alive() for p in ranks):
        assert time.monotonic() - begin < 100, "no save in sight"
        if under_way(out, since) if when < 0.7 else _step(out) > first:
            time.sleep(chance.random() * (0.05 if when < 0.7 else 0.3))
            break
        time.sleep(0.0005)
    inside = under_way(out, since)
    for process in ranks if when > 0.9 or chance.random() < 0.5 else [chance.choice(ranks)]:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
    return inside


def _survive(folder: Path, tmp_path: Path, kills: int, steps: int, seed: int) -> int:
    """Train through `kills` kills, as many runs as that takes, each compared with one that had
    none; the kills inside a save.
    """
    calm = tmp_path / "calm"
    out = tmp_path / "killed"
    log = tmp_path / "log"
    chance = random.Random(seed)
    assert _join(_start(_words(folder, calm, steps), log), log, 600) == [0] * WORLD, (
        log.read_text()[-3000:]
    )
    done = inside = 0
    while done < kills:
        ranks = _start(_words(folder, out, steps), log)
        before = _step(out)
        hit = _kill_at_random(ranks, out, chance)
        codes = _join(ranks, log)
        if codes == [0] * WORLD:
            _compare(calm, out, steps)
            shutil.rmtree(out)
            continue
        assert -signal.SIGKILL in codes, (
            f"a rank ended by itself: {codes}\n{log.read_text()[-3000:]}"
        )
        done = done + 1
        inside = inside + hit
        found = latest(out)
        assert _step(out) >= before, "the tracker went back"
        if _step(out):
            assert found is not None and int(found.name.split("_")[2].partition(".")[0]) == _step(
                out
            ), f"step {_step(out)} is lost; left is {found}"
            assert command(["verify", str(found)]) == 0
    assert _join(_start(_words(folder, out, steps), log), log, 600) == [0] * WORLD, log.read_text()[
        -3000:
    ]
    _compare(calm, out, steps)
    return inside


def _compare(calm: Path, out: Path, steps: int) -> None:
    """Weights, moments, losses and norms, bit for bit."""
    for rank in range(WORLD):
        for kind in ("model", "optim"):
            name = f"global_step_{steps}/{kind}_world_size_{WORLD}_rank_{rank}.pt"
            _same(
                torch.load(calm / name, weights_only=False),
                torch.load(out / name, weights_only=False),
            )
    expected, found = (
        [
            (e["step"], e["train/loss"], e["train/grad_norm"])
            for e in read_jsonl(f / "metrics.jsonl")
            if "train/loss" in e
        ]
        for f in (calm, out)
    )
    assert found == expected, "steps of the metrics are missing, doubled or different"


def _same(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(
            getattr(a, "_local_tensor", a), getattr(b, "_local_tensor", b)
        )
    else:
        assert a == b


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("kills", "steps", "inside"), [(2, 6, 1), pytest.param(10, 14, 4, marks=pytest.mark.slow)]
)
def test_a_few_kills(work: Path, tmp_path: Path, kills: int, steps: int, inside: int) -> None:  # noqa: F811
    assert _survive(work, tmp_path, kills, steps, seed=5) >= inside, "too few kills hit a save"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills(work: Path, tmp_path: Path) -> None:  # noqa: F811
    inside = _survive(work, tmp_path, kills=200, steps=26, seed=6)
    print(f"200 kills, {inside} inside a save")
    assert inside >= 100
