"""The memory plan of an RL step: the engine's part against a real engine, the rest against what it
must obey.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from retool.engine import Engine, EngineOptions
from retool.model.build import ModelOptions, build_decoder
from retool.model.catalogue.families import parse_model_config
from retool.model.config import ModelConfig
from retool.parallel.mesh import make_mesh
from retool.perf import GIB
from retool.preflight.plan import choose
from retool.preflight.training_memory import OUTSIDE, Setting
from retool.rl.preflight.memory import StepMemory, step_memory
from tests.preflight.test_memory import QWEN

BOX = 80.0


def qwen(**more: object) -> ModelConfig:
    return parse_model_config({**QWEN, "model_type": "qwen2", **more})


def plan(
    engine: EngineOptions,
    free: bool | Literal["auto"] = "auto",
    tp: int = 1,
    reference: bool = False,
    box: float | None = BOX,
    **more: object,
) -> StepMemory:
    setting = Setting(shards=2, sp=2)
    choice = choose(qwen(), setting, 9_000, 18_000, None, box)
    return step_memory(qwen(), replace(setting, **more), choice, engine, tp, free, reference, box)


def test_weights_and_cache_are_those_of_a_real_engine() -> None:
    config = qwen(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        vocab_size=131,
    )
    options = EngineOptions(
        max_num_seqs=4, max_batch_tokens=64, page_size=16, max_length=160, kv_bytes=1 << 20
    )
    engine = Engine(config, make_mesh().device, options)
    engine.sync(build_decoder(config, make_mesh(), ModelOptions(param_dtype=torch.float32)))
    setting = Setting(compute="fp32")
    found = step_memory(
        config, setting, choose(config, setting, 64, 64, None, None), options, 1, False, False, None
    )
    assert found.weights == sum(buffer.nbytes for buffer in engine.weights.buffers)
    assert engine.scheduler is not None
    assert int(found.sequences * 160) // 16 - 1 == engine.scheduler.pool.capacity


def test_rollout_fills_the_share_that_it_may() -> None:
    narrow, wide = (plan(EngineOptions(max_length=18_000, kv_share=share)) for share in (0.45, 0.9))
    assert wide.cache == 2 * narrow.cache and wide.sequences == 2 * narrow.sequences > 100
    assert wide.rollout < BOX * GIB - OUTSIDE and wide.fits
    assert list(wide.phases) == [
        "load",
        "sync",
        "rollout",
        "log-probs",
        "update",
        "optimizer",
        "save",
    ]


def test_the_engine_is_freed_where_the_update_does_not_fit_beside_it() -> None:
    roomy, full = (plan(EngineOptions(max_length=18_000, kv_share=share)) for share in (0.2, 0.95))
    assert (roomy.freed, full.freed) == (False, True)
    assert roomy.update - full.update == roomy.rollout - roomy.sync + roomy.weights, (
        "weights, cache and what recorded steps work in"
    )
    eager = plan(EngineOptions(max_length=18_000, kv_share=0.2, use_cuda_graphs=False))
    assert eager.update == full.update + (roomy.weights + roomy.cache)
    assert not plan(EngineOptions(max_length=18_000, kv_share=0.95), free=False).fits


def test_tensor_parallel_engines_share_the_cache_and_a_reference_takes_room() -> None:
    one, two = (plan(EngineOptions(max_length=18_000), tp=tp) for tp in (1, 2))
    assert two.weights == one.weights and two.sequences == 2 * one.sequences
    beside = plan(EngineOptions(max_length=18_000), reference=True)
    assert 0 < beside.load - one.load == beside.sync - one.sync and beside.cache < one.cache


def test_without_a_known_device_every_sequence_has_room_and_nothing_is_promised() -> None:
    found = plan(EngineOptions(max_length=18_000, max_num_seqs=8), box=None)
    assert found.sequences == 8 and found.fits is None and not found.freed


def test_a_cache_too_small_for_one_sequence_does_not_fit() -> None:
    assert plan(EngineOptions(max_length=18_000), box=18.0).fits
    found = plan(EngineOptions(max_length=32_000_000), box=18.0)
    assert found.sequences < 1 and found.fits is False
