"""The same promises on GPUs: staging through pinned memory, redistribution over NCCL, the export
over gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retool import checkpoint
from retool.checkpoint import ModelState, SaveOptions, latest
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.ranks import need_gpus, run_ranks

pytestmark = pytest.mark.gpu


def _on_device(state: ModelState, device: torch.device) -> ModelState:
    return ModelState(
        state.layout,
        state.params.to(device),
        None if state.exp_avg is None else state.exp_avg.to(device),
        None if state.exp_avg_sq is None else state.exp_avg_sq.to(device),
        updates=state.updates,
    )


def _round_trip(root: str) -> list[float]:
    mesh = make_mesh(device="cuda")
    torch.cuda.manual_seed(77 + mesh.rank)
    staging = checkpoint.Staging(mesh)
    tensors = _on_device(states.state(mesh), mesh.device)
    pending = checkpoint.save(
        root,
        tensors,
        mesh,
        checkpoint.TrainingState(step=5),
        model_folder=Path(root).parent / "source",
        staging=staging,
        options=SaveOptions(async_save=True),
    )
    assert all(buffer.is_pinned() for buffer in staging._buffers.values())
    expected = torch.rand(3, device=mesh.device).tolist()
    tensors.params.fill_(float("nan"))
    assert pending.wait().error is None
    fresh = _on_device(states.blank(mesh), mesh.device)
    checkpoint.load(Path(root) / "global_step_5", fresh, mesh, seed=0)
    whole = states.state(mesh)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(fresh, name).cpu(), getattr(whole, name)), name
    assert torch.rand(3, device=mesh.device).tolist() == expected, "the GPU's random state"
    return expected


@pytest.mark.parametrize("world", [1, 2])
def test_round_trip(tmp_path: Path, world: int) -> None:
    need_gpus(world)
    states.source_model(tmp_path / "source")
    run_ranks(_round_trip, world, str(tmp_path / "run"))
    folder = tmp_path / "run/global_step_5"
    assert latest(tmp_path / "run") == folder
    for name, value in states.truth(torch.float32, 0).items():
        assert torch.equal(states.exported(folder / "huggingface")[name], value.bfloat16())
    state = states.blank(make_mesh(device="cpu"))
    checkpoint.load(folder, state, make_mesh(device="cpu"), seed=0)
    assert torch.equal(state.params, states.state(make_mesh(device="cpu")).params), (
        "one CPU process reads what GPUs wrote"
    )
