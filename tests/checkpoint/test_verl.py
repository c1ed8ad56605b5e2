"""verl's own merger reads our folders, unmodified, and gets the bits of our export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retool import checkpoint
from retool.checkpoint import ModelState, SafetensorsSource, SaveOptions, load_flat
from retool.checkpoint.flat.fill import TensorSource
from retool.parallel.fsdp.layout import make_layout
from retool.parallel.mesh import make_mesh
from tests.checkpoint.states import exported
from tests.ranks import run_ranks
from tests.real_data import REAL

MODEL = REAL / "stories260k"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is not there"),
]


@pytest.fixture(scope="module")
def verl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with verl in it: RETOOL_VERL_PYTHON, or a fresh environment that borrows this one's
    torch.
    """
    if given := os.environ.get("RETOOL_VERL_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("verl")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    # verl's own pins come before these
    (site / "zz_borrowed.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "verl==0.9.1", "uvicorn", "fastapi"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"verl can't be installed here: {done.stderr.strip().splitlines()[-1]}")
    return str(python)


def _layout(source: TensorSource, shards: int):
    names = sorted(source.names(), key=lambda n: (n != "model.embed_tokens.weight", n))
    units = [
        (n, [(n, source.shape(n), [(n, source.shape(n))], True)])
        for n in names
        if n != "lm_head.weight"
    ]
    return make_layout(units, shards, (("lm_head.weight", "model.embed_tokens.weight"),))


def _save(root: str, fsdp_size: int) -> None:
    mesh = make_mesh(fsdp_size=fsdp_size)
    source = SafetensorsSource(MODEL)
    layout = _layout(source, mesh.shards)
    flats = [torch.zeros(layout.shard_numel) for _ in range(3)]
    load_flat(layout, mesh.shard_rank, source, flats[0])
    generator = torch.Generator().manual_seed(mesh.shard_rank)
    flats[0] += torch.rand(flats[0].shape, generator=generator) * 1e-3  # bits below bf16
    result = checkpoint.save(
        root,
        ModelState(layout, *flats),
        mesh,
        checkpoint.TrainingState(step=3),
        model_folder=MODEL,
        options=SaveOptions(),
    ).wait()
    assert result.error is None, result.error


@pytest.mark.parametrize(("world", "fsdp_size"), [(1, -1), (2, -1), (3, -1), (4, 2)])
def test_the_reference_merger_gets_our_export(
    tmp_path: Path, verl: str, world: int, fsdp_size: int
) -> None:
    run_ranks(_save, world, str(tmp_path / "run"), fsdp_size)
    folder = tmp_path / "run" / "global_step_3"
    out = tmp_path / "out"
    command = [
        verl,
        "-m",
        "verl.model_merger",
        "merge",
        "--backend",
        "fsdp",
        "--local_dir",
        str(folder),
        "--target_dir",
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = exported(out)
    ours = exported(folder / "huggingface")
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert theirs[name].dtype == torch.bfloat16 and torch.equal(theirs[name], ours[name]), name
