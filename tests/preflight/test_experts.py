"""What models with experts take: memory by all of them, FLOPs by those that a token runs through."""

from __future__ import annotations

import pytest
import torch

from retool.config.options import (
    AdamWConfig,
    CheckpointConfig,
    DecoderConfig,
    FSDPConfig,
    RunOptions,
    TrainerConfig,
)
from retool.model.build import ModelOptions, build_decoder, plan_layout
from retool.model.catalogue.families import parse_model_config
from retool.model.costs import multiplied_parameters, parameter_count
from retool.parallel.mesh import make_mesh
from retool.perf import GIB
from retool.preflight.plan import choose
from retool.preflight.training_memory import Setting, layer_bytes, predict
from retool.preflight.world import check_experts
from tests.model.test_published import QWEN_3_MOE
from tests.preflight.test_memory import model, saved_bytes
from tests.ranks import run_ranks


def test_what_an_expert_keeps_is_what_autograd_saves() -> None:
    """Of each token once for each of its experts."""
    tokens = 64

    def kept(each: int) -> tuple[int, int]:
        config = model(
            "qwen3_moe", num_experts=8, num_experts_per_tok=each, moe_intermediate_size=32
        )
        saved = saved_bytes(config, ModelOptions(), tokens)
        planned = layer_bytes(config, Setting(compute="fp32"), "none")
        return saved, planned * tokens * config.layers

    less, more = kept(1), kept(4)
    assert more[0] - less[0] == pytest.approx(more[1] - less[1], rel=0.02)


def test_30b_a3b_is_planned_for_eight_gpus() -> None:
    """30.5B parameters of which 3.3B are active, says its model card (embedding included)."""
    config = parse_model_config(QWEN_3_MOE)
    assert parameter_count(config) == pytest.approx(30.5e9, rel=2e-3)
    active = multiplied_parameters(config) + config.vocab * config.hidden
    assert active == pytest.approx(3.35e9, rel=5e-3)
    layout = plan_layout(config, 8)
    exact = sum(member.numel for _, member in layout.members)
    assert exact == pytest.approx(parameter_count(config), rel=1e-3)
    choice = choose(config, Setting(shards=8), 16_384, None, None, 140, "auto")
    assert choice.fits and choice.recompute == "selective"
    # 18 bytes of each parameter, and two units' turns: 80 GiB are too few without a way out
    assert 64 < choice.prediction.state / GIB < 80
    small = choose(config, Setting(shards=8), 16_384, None, None, 80, False)
    assert not small.fits


def test_divided_experts_take_less_of_each_gpu_of_eight() -> None:
    """Of a layer's experts two are gathered at a time, in bf16, and their gradients sent in fp32."""
    config = parse_model_config(QWEN_3_MOE)
    experts = 128 * 3 * 2048 * 768
    whole, divided = (
        predict(config, Setting(shards=8, ep=ep), 16_384, "full").state for ep in (1, 2)
    )
    assert whole - divided == pytest.approx(experts / 2 * 2 * (2 + 4), rel=0.1)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def allocated(ep: int, keep: bool) -> tuple[int, int]:
    """What sharding has made of a model, and the elements that this rank owns."""
    options = ModelOptions(param_dtype=torch.bfloat16, keep_copy=keep)
    sharded = build_decoder(model("qwen3_moe", **EXPERTS), make_mesh(ep=ep), options)
    assert sharded.layout == plan_layout(model("qwen3_moe", **EXPERTS), sharded.mesh.world, ep)
    return sharded.planned_bytes(), sharded.layout.shard_numel


@pytest.mark.parametrize(
    ("world", "ep", "keep"),
    [
        (2, 2, False),
        (4, 2, True),
        (4, 2, False),
        (4, 4, True),
    ],
)
@pytest.mark.slow
def test_memory_of_divided_experts_is_exact(world: int, ep: int, keep: bool) -> None:
    setting = Setting(shards=world, ep=ep, keep_copy=keep)
    predicted = predict(model("qwen3_moe", **EXPERTS), setting, 0, "none")
    for taken, owned in run_ranks(allocated, world, ep, keep):
        assert predicted.state == taken + 2 * 4 * owned


@pytest.mark.parametrize(
    ("family", "processes", "ep", "fsdp_size", "problem", "way_out"),
    [
        ("qwen3_moe", 4, 3, -1, "the 4 processes that share a parameter", "Use 1, 2 or 4."),
        ("qwen3_moe", 4, 4, 2, "the 2 processes that share a parameter", "Use 1 or 2."),
        ("qwen3_moe", 12, 3, -1, "the model's 8 experts", "Use 1, 2 or 4."),
        ("qwen2", 4, 2, -1, "a qwen2 model has no experts", "Leave the key out."),
        ("qwen3_moe", 4, 2, -1, "", ""),
        ("qwen2", 4, 1, -1, "", ""),
    ],
)
def test_sizes_that_do_not_divide_experts_are_refused(
    family: str, processes: int, ep: int, fsdp_size: int, problem: str, way_out: str
) -> None:
    options = RunOptions(
        TrainerConfig(),
        DecoderConfig(),
        FSDPConfig(expert_parallel_size=ep, fsdp_size=fsdp_size),
        AdamWConfig(),
        CheckpointConfig(),
        sp=1,
    )
    config = model(family, **(EXPERTS if family == "qwen3_moe" else {}))
    faults = list(check_experts(options, processes, config))
    assert len(faults) == bool(problem)
    for fault in faults:
        assert fault.where == f"model.fsdp_config.expert_parallel_size={ep}"
        assert problem in fault.problem
        assert fault.remedy == way_out
