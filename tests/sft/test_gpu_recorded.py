"""Recorded micro-batches train as others do, with NCCL's collectives in the graph."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retool.data.loader import StepOrder, step_batch
from retool.data.packing import Budget, Packing
from retool.model.build import ModelOptions, build_decoder
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import recording
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.recorded import SmallPacks
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import need_gpus, run_ranks
from tests.sft.rows import Rows
from tests.sft.test_command import steps, words

pytestmark = [pytest.mark.gpu, pytest.mark.first, pytest.mark.timeout(200)]
STEPS = 6
ROOM = {1: 220, 2: 140}  # tokens, by GPUs: some of the packs are larger


@dataclass(frozen=True)
class Case:
    """How a small model is trained."""

    sp: int = 1
    hold: bool = False
    reshard: bool = True
    recompute: Recompute = "none"


CASES = {
    1: [Case(), Case(recompute="selective")],
    2: [Case(), Case(2, hold=True), Case(2, recompute="full"), Case(hold=True, reshard=False)],
}


def train(case: Case, recorded: bool) -> tuple[list[float], np.ndarray, int]:
    """Losses and gradient norms, this rank's weights, and how many recordings were made."""
    mesh = make_mesh(sp=case.sp, device="cuda")
    config = decoder_config(8, 2, vocab=512, hidden=256, ffn=512, layers=4, head_dim=64, tied=True)
    options = ModelOptions(
        recompute=case.recompute, use_compile="auto", reshard_after_forward=case.reshard
    )
    model = build_decoder(config, mesh, options)
    generator = torch.Generator(mesh.device).manual_seed(mesh.shard_rank)
    model.master.normal_(0, 0.05, generator=generator)
    model.refresh()
    optimizer = AdamW(model, AdamWOptions())
    small = SmallPacks(model, ROOM[mesh.world] if recorded else 0)
    budget = Budget(micro_batch_size=4 // mesh.dp)
    packing = Packing(budget, mesh.dp_rank, mesh.dp, case.sp, recorded=True)
    rows = Rows(longest=100, count=40)
    numbers = list[float]()
    for step in range(STEPS):
        batch = step_batch(step, rows, StepOrder(8, 0), packing)
        measured = train_step(
            model,
            optimizer,
            batch.micro_batches,
            batch.trained_tokens,
            1e-3,
            StepTimer(mesh.device),
            case.hold,
            small=small,
        )
        numbers.extend(measured.read()[:2])
    return numbers, model.master.cpu().numpy(), len(small.recordings.made)


def train_all(cases: list[Case]) -> list[Any]:
    return [[train(case, recorded) for recorded in (False, True)] for case in cases]


def train_deterministically() -> list[Any]:
    """Without recordings, and with them."""
    # As a run with trainer.deterministic; the process is this test's alone
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    found = []
    for ordinary_runs in (1000, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recording, "ORDINARY_RUNS", ordinary_runs)
            found.append(train(Case(), recorded=True))
    return found


def test_a_recording_rounds_as_the_runs_before_it() -> None:
    """Not to the bit: on an H200 a gradient norm was 4e-11 off after four steps that were equal."""
    need_gpus(1)
    ordinary, recorded = run_ranks(train_deterministically, 1, timeout=120)[0]
    want, weights, never = ordinary
    got, others, recordings = recorded
    assert recordings and not never
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.linalg.norm(others - weights) < 1e-4 * np.linalg.norm(weights)


@pytest.mark.parametrize("gpus", CASES)
def test_recorded_micro_batches_train_as_others_do(gpus: int) -> None:
    need_gpus(gpus)
    for rank in run_ranks(train_all, gpus, CASES[gpus], timeout=180):
        for case, ((want, weights, _), (got, others, recordings)) in zip(
            CASES[gpus], rank, strict=True
        ):
            assert recordings, case
            torch.testing.assert_close(got, want, rtol=2e-2, atol=0, msg=f"{case}")
            distance = np.linalg.norm(others - weights) / np.linalg.norm(weights)
            assert distance < 5e-3, (case, distance)


# `python -m retool.sft` that counts its recordings, with an accident on the last rank where asked for
COUNTED = """
import os, sys
from retool.parallel.fsdp.recording import Recordings
from retool.sft import __main__ as command, train

make, whole, calls = Recordings._make, train.train_step, 0

def made(self, *arguments):
    done = make(self, *arguments)
    print(f"recorded {len(self.made)}", flush=True)
    return done

def train_step(*arguments, **named):
    global calls
    calls += 1
    if f"{calls}" == os.environ["ACCIDENT"] and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        raise RuntimeError("out of luck")
    return whole(*arguments, **named)

Recordings._make, train.train_step = made, train_step
sys.exit(command.main(sys.argv[1:]))
"""


def run(
    folder: Path, gpus: int, given: list[str], accident: int = 0
) -> subprocess.CompletedProcess[str]:
    script = folder / "counted.py"
    script.write_text(COUNTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return subprocess.run(
        [*launcher, f"--nproc_per_node={gpus}", str(script), *given, "trainer.device=cuda"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "ACCIDENT": str(accident)},
    )


def test_the_command_records_validates_saves_and_goes_on(work: Path, tmp_path: Path) -> None:
    records_and_goes_on(1, work, tmp_path)


def test_so_it_does_on_two_gpus(work: Path, tmp_path: Path) -> None:
    need_gpus(2)
    records_and_goes_on(2, work, tmp_path)


def records_and_goes_on(gpus: int, work: Path, tmp_path: Path) -> None:
    more = {"data.val_files": work / "val.parquet", "trainer.test_freq": 4, "trainer.save_freq": 5}
    losses = list[list[float]]()
    for recorded, stops in (("auto", (10, 13)), ("false", (13,))):
        out = tmp_path / recorded
        given = [f"{k}={v}" for k, v in more.items()]
        given = [*words(work, out, *given), f"data.record_micro_batches={recorded}"]
        for until in stops:
            done = run(tmp_path, gpus, [*given, f"trainer.total_training_steps={until}"])
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert ("recorded 1" in done.stdout) == (recorded == "auto"), done.stdout[-3000:]
        losses.append([entry["train/loss"] for entry in steps(out)])
    assert len(losses[0]) == 13
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


def test_an_error_ends_a_run_that_recorded(work: Path, tmp_path: Path) -> None:
    gpus = min(2, torch.cuda.device_count())
    given = words(work, tmp_path / "out", "trainer.total_training_steps=12")
    begun = time.perf_counter()
    done = run(tmp_path, gpus, given, accident=11)
    assert done.returncode == 1 and "out of luck" in done.stdout + done.stderr
    assert "recorded 1" in done.stdout
    assert time.perf_counter() - begun < 100
