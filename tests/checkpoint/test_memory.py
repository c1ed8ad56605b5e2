"""What a load takes of the host's memory besides the shards that it fills: a few chunks, however
large the model is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retool import checkpoint
from retool.checkpoint import ModelState, SaveOptions
from retool.checkpoint.flat.fill import CHUNK, THREADS
from retool.parallel.fsdp.layout import Layout, make_layout
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.ranks import run_ranks

MB = 1_000_000
# 96 MB, 288 with moments
SHAPES = {
    "model.embed_tokens.weight": (12_001, 1000),
    **{f"model.layers.{i}.weight": (3001, 1000) for i in range(4)},
}


def layout(shards: int) -> Layout:
    return make_layout(
        [(name, [(name, shape, [(name, shape)], True)]) for name, shape in SHAPES.items()], shards
    )


def write(root: str) -> None:
    mesh = make_mesh()
    flats = [torch.full((layout(mesh.shards).shard_numel,), 0.5 + i) for i in range(3)]
    options = SaveOptions(contents=("model", "optimizer", "extra"))
    pending = checkpoint.save(
        root,
        ModelState(layout(mesh.shards), *flats),
        mesh,
        checkpoint.TrainingState(step=1),
        model_folder=Path(root).parent / "source",
        options=options,
    )
    assert pending.wait().error is None


def measure(folder: str) -> tuple[float, float]:
    """(anonymous, all) resident MB that a load adds at its peak.

    What isn't anonymous is the mapped files: page cache, which the kernel takes back.
    """
    mesh = make_mesh()
    # touched, so it counts as there before
    state = ModelState(layout(1), *(torch.full((layout(1).shard_numel,), 9.0) for _ in range(3)))
    checkpoint.load(folder, state, mesh, seed=0)  # libraries, threads
    peak = watch(lambda: checkpoint.load(folder, state, mesh, seed=0))
    for i, flat in enumerate((state.params, state.exp_avg, state.exp_avg_sq)):
        assert flat is not None and bool((flat[: 2001 * 1000] == 0.5 + i).all())
    return peak


def watch(action: Callable[[], object]) -> tuple[float, float]:
    """How far RssAnon and VmRSS rise while `action` runs, MB."""
    before = resident()
    peak = [0.0, 0.0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[:] = [max(p, now - b) for p, now, b in zip(peak, resident(), before, strict=True)]

    thread = threading.Thread(target=sample)
    thread.start()
    action()
    done.set()
    thread.join()
    return peak[0], peak[1]


def resident() -> tuple[float, float]:
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    anonymous, everything = (
        int(fields[key].split()[0]) * 1024 / MB for key in ("RssAnon", "VmRSS")
    )
    return anonymous, everything


@pytest.mark.parametrize(
    ("writers", "bound"),
    [pytest.param(1, 24, marks=pytest.mark.slow), (2, THREADS * CHUNK * 4 / MB)],
    ids=["same ranks", "other ranks"],
)
def test_a_load_adds_a_few_chunks_to_the_shards_it_fills(
    tmp_path: Path, writers: int, bound: float
) -> None:
    """On the ranks that wrote it rows are copied out of the mapped file; on others a chunk may be
    put together from two.
    """
    states.source_model(tmp_path / "source")
    run_ranks(write, writers, str(tmp_path / "run"))
    ((anonymous, everything),) = run_ranks(measure, 1, str(tmp_path / "run/global_step_1"))
    print(
        f"{writers} writers: {anonymous:.0f} MB anonymous, {everything:.0f} MB with mapped files, of 288 MB"
    )
    assert anonymous < bound
    assert everything < 288 + bound + 24, "more is mapped than the files hold"
