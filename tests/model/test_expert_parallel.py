"""Expert parallelism: ranks that divide a layer's experts compute what transformers does with all,
train as one process does, and read each other's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retool import checkpoint
from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import SamplingParams
from retool.model import recompute
from retool.model.block import Execution
from retool.model.build import ModelOptions
from retool.model.config import Experts
from retool.model.families import qwen3_moe
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import local_pieces, shard
from retool.parallel.mesh import Mesh, make_mesh
from retool.parallel.ulysses import HeadPlan
from retool.perf import StepTimer
from retool.rl.server.weights import write_weights
from retool.sft.step import train_step
from tests.engine.models import engine_of, prompts, run
from tests.model.decoders import decoder_config
from tests.model.test_experts import (
    COEFFICIENT,
    by_transformers,
    compare,
    one_step,
    samples,
)
from tests.model.tiny import make
from tests.ranks import run_ranks

F64 = torch.float64
STEPS = 2
LAYERS = 2


@dataclass(frozen=True)
class Layout:
    ep: int = 1
    sp: int = 1
    recompute: Recompute = "none"
    fsdp_size: int = -1
    options: dict[str, Any] = field(default_factory=dict)


ONE_BY_ONE = {"forward_prefetch": False, "backward_overlap": False}
GATHERED = {"reshard_after_forward": False}
OF_TWO = [
    Layout(2),
    Layout(2, recompute="selective"),
    Layout(2, recompute="offload"),
    Layout(2, options=GATHERED),
]
OF_FOUR = [
    Layout(2),
    Layout(2, recompute="full", options=ONE_BY_ONE),
    Layout(4, recompute="selective"),
    Layout(2, sp=2, recompute="full"),
    Layout(4, sp=2),
    Layout(2, sp=4, recompute="selective"),
    Layout(2, fsdp_size=2, recompute="full"),
    Layout(2, recompute="full", options=GATHERED),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    make(path, "qwen3_moe", router_aux_loss_coef=COEFFICIENT, num_hidden_layers=LAYERS)
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Any:
    return by_transformers(folder)


def gradients(folder: str, layouts: list[Layout]) -> list[Any]:
    return [
        one_step(folder, each.sp, each.recompute, 1, None, each.ep, each.fsdp_size, **each.options)
        for each in layouts
    ]


@pytest.mark.slow  # the quick one is with the tests of experts
@pytest.mark.parametrize(("world", "layouts"), [(2, OF_TWO), (4, OF_FOUR)])
def test_loss_and_gradients_equal_transformers(
    folder: Path, wanted: Any, world: int, layouts: list[Layout]
) -> None:
    found = run_ranks(gradients, world, str(folder), layouts)
    for layout, of_ranks in zip(layouts, zip(*found, strict=True), strict=True):
        whole = world if layout.fsdp_size < 0 else layout.fsdp_size
        for first in range(0, world, whole):
            compare(list(of_ranks[first : first + whole]), wanted)


def test_what_is_divided_has_no_values_before() -> None:
    module = nn.Linear(4, 4)
    mesh = Mesh(0, 1, 1, 1, torch.device("cpu"), ep=2)
    with pytest.raises(ValueError, match=r"parameter weight .* make the module on the meta device"):
        shard(module, [("all", [module])], mesh, divided=["weight"])


def test_a_layer_whose_tokens_travel_runs_them_in_one_piece() -> None:
    """Ranks may have other numbers of tokens, and each piece is an exchange that all take part in."""
    experts = Experts(count=4, per_token=2, width=8, normalised=True)
    config = decoder_config(6, 2, "qwen3_moe", experts=experts, qk_norm=True)
    found = []
    for ep in (1, 2):
        mesh = Mesh(0, 2, 1, 2, torch.device("cpu"), ep=ep)
        with torch.device("meta"):
            block = qwen3_moe.Block(config, 0, Execution(HeadPlan(1, 0, 6, 2, 8), mesh))
        found.append(len(recompute._chunks(block, 40_000)))
    assert found == [len(recompute.token_chunks(40_000)), 1] and found[0] > 1


# Which experts every token has: those of one rank, or one of each rank's
GIVEN = {"by the router": None, "the first": (0, 1, 2), "the last": (7, 6, 5), "few": (0, 3, 6)}


@dataclass(frozen=True)
class Run:
    """Training from step `first` on, from a checkpoint in `start` unless that is "".

    With a `root` it stops after step 1 and is saved there.
    """

    layout: Layout = field(default_factory=Layout)
    given: str = "by the router"
    root: str = ""
    start: str = ""


def rows_of(given: str) -> list[Sample]:
    experts = GIVEN[given]
    if experts is None:
        return samples()
    return [
        Sample(row.tokens, row.mask, np.tile(np.array(experts, np.int8), (len(row), LAYERS, 1)))
        for row in samples()
    ]


def train(folder: str, plan: Run) -> dict[str, Any]:
    """Losses, norms, and this rank's weights and moments after the last step."""
    layout = plan.layout
    mesh = make_mesh(sp=layout.sp, ep=layout.ep, fsdp_size=layout.fsdp_size)
    options = ModelOptions(F64, F64, F64, recompute=layout.recompute, **layout.options)
    model = load_pretrained(folder, mesh, options)
    # So low that every step is clipped: the norm is part of what is compared
    optimizer = AdamW(model, AdamWOptions(clip_grad=0.1))
    flats = (model.master, optimizer.exp_avg, optimizer.exp_avg_sq)
    done = 0
    if plan.start:
        loaded = checkpoint.load(plan.start, checkpoint.ModelState(model.layout, *flats), mesh, 1)
        optimizer.steps.fill_(loaded.optimizer_step)
        done = loaded.step
        model.refresh()
    rows = rows_of(plan.given)
    told = []
    for _ in range(done, 1 if plan.root else STEPS):
        mine = rows[mesh.dp_rank :: mesh.dp]
        packs = [pack(mine, layout.sp), pack([], layout.sp)]
        trained = sum(row.trained for row in rows)
        measured = train_step(model, optimizer, packs, trained, 1e-2, StepTimer(mesh.device))
        told += [*measured.read()[:2], *measured.read_balance().values()]
    if plan.root:
        state = checkpoint.ModelState(model.layout, *flats, int(optimizer.steps))
        training = checkpoint.TrainingState(step=1)
        result = checkpoint.save(plan.root, state, mesh, training, model_folder=folder).wait()
        assert result.error is None, result.error
    pieces = {
        (piece.member.name, piece.start): torch.stack(
            [flat[piece.local : piece.local + piece.stop - piece.start] for flat in flats]
        ).numpy()
        for piece in local_pieces(model.layout, mesh.shard_rank)
    }
    return {"told": told, "pieces": pieces}


def train_each(folder: str, plans: list[Run]) -> list[dict[str, Any]]:
    return [train(folder, plan) for plan in plans]


def same(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """As one process: what is told, and every parameter and moment once."""
    whole = {name: values for (name, _), values in alone["pieces"].items()}
    seen = dict.fromkeys(whole, 0)
    for rank in found:
        assert rank["told"] == pytest.approx(alone["told"][-len(rank["told"]) :], rel=1e-9)
        for (name, start), values in rank["pieces"].items():
            stop = start + values.shape[1]
            np.testing.assert_allclose(
                values, whole[name][:, start:stop], rtol=1e-8, atol=1e-10, err_msg=name
            )
            seen[name] += values.shape[1]
    assert seen == {name: values.shape[1] for name, values in whole.items()}


def trained_and_handed_over(folder: str, plans: list[Run], target: str) -> Any:
    return train_each(folder, plans), handed_over(folder, target, 2)


def test_ranks_that_divide_experts_train_as_one_process(folder: Path, tmp_path: Path) -> None:
    """Two ranks of which one gets no token; a checkpoint of both, with which one goes on; and what
    engines and servers get.
    """
    plans = [
        Run(Layout(2, recompute="selective"), "the first"),
        Run(Layout(2), root=str(tmp_path)),
    ]
    target = str(tmp_path / "written")
    found = run_ranks(trained_and_handed_over, 2, str(folder), plans, target)
    same([steps[0] for steps, _ in found], train(str(folder), Run(given="the first")))
    first = tmp_path / "global_step_1"
    same([train(str(folder), Run(start=str(first)))], train(str(folder), Run()))
    exported = load_file(first / "huggingface" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in original.items()}
    alone = handed_over(str(folder), str(tmp_path / "alone"), 1)
    assert [tokens for _, tokens in found] == [alone, alone]
    same_weights(folder, tmp_path / "written")


@pytest.mark.slow
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("world", [2, 4])
def test_no_spread_of_tokens_hangs_or_changes_numbers(folder: Path, given: str, world: int) -> None:
    layouts = [Layout(world, recompute=how) for how in ("none", "selective", "full")]
    layouts += [Layout(2, sp=2, recompute="full"), Layout(2, fsdp_size=2)]
    alone = train(str(folder), Run(given=given))
    plans = [Run(layout, given) for layout in layouts]
    found = run_ranks(train_each, world, str(folder), plans)
    for layout, of_ranks in zip(layouts, zip(*found, strict=True), strict=True):
        whole = world if layout.fsdp_size < 0 else layout.fsdp_size
        for first in range(0, world, whole):
            same(list(of_ranks[first : first + whole]), alone)


@pytest.mark.slow
@pytest.mark.parametrize("writer", [(1, 1, -1), (2, 2, -1), (4, 2, -1), (4, 4, -1), (4, 2, 2)])
def test_any_layout_resumes_what_any_other_wrote(
    folder: Path, tmp_path: Path, writer: tuple[int, int, int]
) -> None:
    def on(world: int, ep: int, fsdp_size: int, **more: str) -> list[dict[str, Any]]:
        return run_ranks(train, world, str(folder), Run(Layout(ep, fsdp_size=fsdp_size), **more))

    alone = train(str(folder), Run())
    on(*writer, root=str(tmp_path))
    start = str(tmp_path / "global_step_1")
    for world, ep, fsdp_size in ((1, 1, -1), (2, 2, -1), (4, 1, -1), (4, 2, -1), (4, 4, -1)):
        same(on(world, ep, fsdp_size, start=start), alone)


def handed_over(folder: str, target: str, ep: int) -> list[Any]:
    """What an engine samples greedily with weights of ranks that divide experts, and a folder of them."""
    model = load_pretrained(folder, make_mesh(ep=ep))
    engine = engine_of(Path(folder), model)
    for i, ids in enumerate(prompts(3, 20, 131)):
        engine.start(i, ids, SamplingParams(max_tokens=8, temperature=0.0))
    assert not write_weights(model, Path(target), Path(folder))
    done = run(engine)
    return [done[i].tokens for i in range(3)]


@pytest.mark.slow
def test_engines_and_servers_of_four_ranks_get_all_experts(folder: Path, tmp_path: Path) -> None:
    alone = handed_over(str(folder), str(tmp_path / "alone"), 1)
    for tokens in run_ranks(handed_over, 4, str(folder), str(tmp_path / "written"), 2):
        assert tokens == alone
    same_weights(folder, tmp_path / "written")


def same_weights(folder: Path, other: Path) -> None:
    original = load_file(folder / "model.safetensors")
    written = load_file(other / "model.safetensors")
    assert written.keys() == original.keys()
    for name, values in original.items():
        assert torch.equal(written[name], values), name
