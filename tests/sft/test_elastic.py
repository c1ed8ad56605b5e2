"""Written by n processes, resumed by m, on any layout: as if the run had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retool import checkpoint
from retool.data.loader import StepOrder, iterate_steps
from retool.data.packing import Budget, Packing
from retool.model.build import ModelOptions, build_decoder
from retool.optim import AdamW, AdamWOptions, learning_rate
from retool.parallel.fsdp import local_pieces
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import run_ranks
from tests.sft.rows import Rows
from tests.sft.test_parity import BATCH, compare

HEADS = (12, 4)
STEPS = 20
STOP = 9
# processes: (sp, fsdp_size); four of them as HSDP
LAYOUTS = {
    1: (1, -1),
    2: (2, -1),
    3: (3, -1),
    4: (2, 2),
}


def run(
    dtype: torch.dtype, sp: int, fsdp_size: int, root: str, start: str, stop: int
) -> dict[str, Any]:
    """Train up to step `stop`, from scratch or from the checkpoint `start`; save there unless it is
    the end.
    """
    mesh = make_mesh(sp=sp, fsdp_size=fsdp_size)
    model = build_decoder(
        decoder_config(*HEADS, tied=True), mesh, ModelOptions(dtype, dtype, dtype)
    )
    optimizer = AdamW(model, AdamWOptions())
    done = 0
    losses = []
    norms = []
    state = checkpoint.ModelState(
        model.layout, model.master, optimizer.exp_avg, optimizer.exp_avg_sq
    )
    if start:
        loaded = checkpoint.load(start, state, mesh, seed=1)
        optimizer.steps.fill_(loaded.optimizer_step)
        done = loaded.step
    else:
        generator = torch.Generator().manual_seed(0)
        weights = {
            m.name: torch.randn(m.shape, generator=generator, dtype=torch.float64) * 0.2
            for _, m in model.layout.members
        }
        for p in local_pieces(model.layout, mesh.shard_rank):
            model.master[p.local : p.local + p.stop - p.start] = (
                weights[p.member.name].flatten()[p.start : p.stop].to(dtype)
            )
    model.refresh()
    for batch in iterate_steps(
        Rows(),
        StepOrder(BATCH, seed=1),
        Packing(Budget(40), mesh.dp_rank, mesh.dp, sp),
        start_step=done,
        stop_step=stop,
    ):
        lr = learning_rate(batch.step, STEPS, 1e-3)
        loss, norm, _ = train_step(
            model, optimizer, batch.micro_batches, batch.trained_tokens, lr, StepTimer(mesh.device)
        ).read()
        losses.append(loss)
        norms.append(norm)
    if stop < STEPS:
        moments = optimizer.exp_avg, optimizer.exp_avg_sq
        result = checkpoint.save(
            root,
            checkpoint.ModelState(model.layout, model.master, *moments, int(optimizer.steps)),
            mesh,
            checkpoint.TrainingState(step=stop),
            model_folder=root,
            options=checkpoint.SaveOptions(contents=("model", "optimizer", "extra")),
        ).wait()
        assert result.error is None, result.error
    owned = {
        (p.member.name, p.start): model.master[p.local : p.local + p.stop - p.start].numpy().copy()
        for p in local_pieces(model.layout, mesh.shard_rank)
    }
    return {"losses": losses, "norms": norms, "weights": owned}


def on(
    processes: int, dtype: torch.dtype, root: Path, start: Path | None, stop: int
) -> list[dict[str, Any]]:
    return run_ranks(run, processes, dtype, *LAYOUTS[processes], str(root), str(start or ""), stop)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, dict[str, Any]]:
    return {
        d: on(1, d, tmp_path_factory.mktemp("whole"), None, STEPS)[0]
        for d in (torch.float64, torch.float32)
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, torch.dtype], Path]:
    """Checkpoints after `STOP` steps, made when first asked for."""

    class Made(dict[tuple[int, torch.dtype], Path]):
        def __missing__(self, key: tuple[int, torch.dtype]) -> Path:
            root = tmp_path_factory.mktemp("written")
            on(*key, root, None, STOP)
            self[key] = root / f"global_step_{STOP}"
            return self[key]

    return Made()


# By default each number of processes writes once and resumes once
ONCE = {(1, 4), (2, 3), (3, 2), (4, 1)}
PAIRS = [
    pytest.param(n, m, marks=() if (n, m) in ONCE else pytest.mark.slow)
    for n in LAYOUTS
    for m in LAYOUTS
]


@pytest.mark.parametrize(("n", "m"), PAIRS)
def test_written_by_n_resumed_by_m(n: int, m: int, written, never_stopped) -> None:
    whole = never_stopped[torch.float64]
    expected = {
        "losses": whole["losses"][STOP:],
        "norms": whole["norms"][STOP:],
        "weights": whole["weights"],
    }
    start = written[n, torch.float64]
    compare(
        on(m, torch.float64, start.parent, start, STEPS),
        expected,
        loss=1e-10,
        weight=1e-10,
        norm=1e-10,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(2, 4, marks=pytest.mark.slow), (4, 2)])
def test_in_float32(n: int, m: int, written, never_stopped) -> None:
    whole = never_stopped[torch.float32]
    expected = {
        "losses": whole["losses"][STOP:],
        "norms": whole["norms"][STOP:],
        "weights": whole["weights"],
    }
    start = written[n, torch.float32]
    results = on(m, torch.float32, start.parent, start, STEPS)
    compare(results, expected, loss=1e-6, weight=1e-5, norm=1e-4)
    assert np.isfinite(results[0]["norms"]).all()
