"""What a profile's kernels are for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(repository / "benchmarks"), *sys.path])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        (
            "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>",
            "attention",
        ),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("triton_poi_fused_mul_silu_3", "compiled elementwise"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0", "compiled elementwise"),
        ("_update_kernel", "vocabulary head"),
        ("_gated_backward", "gated MLP, its elementwise half"),
        ("_turned_heads", "compiled elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "everything else"),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, kind: str) -> None:
    from kernels import kind_of

    assert kind_of(name) == kind


def test_what_overlaps_is_not_idle() -> None:
    from kernels import breakdown

    found = breakdown([("nccl", 0.0, 4.0), ("nvjet", 1.0, 3.0), ("nvjet", 6.0, 10.0)])
    assert found["window_ms"] == 10
    assert found["idle_ms"] == 2  # from 4 to 6
    assert found["kinds"] == {"matrix products": 6, "communication": 4}
    assert found["kernels"][0] == {"name": "nvjet", "ms": 6, "calls": 2}


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (
            "_place_kernel _attention_kernel _joined_kernel nvjet triton_per gemm _gated_forward nvjet "
            "cublasLt::splitKreduce_kernel triton_per nvjet",
            [
                "rope, cache",
                "attention",
                "attention, parts joined",
                "out of attention",
                "add, norm (to the MLP)",
                "gate and up",
                "SwiGLU",
                "down",
                "down",
                "add, norm (to the next layer)",
                "q k v",
            ],
        ),
    ],
)
def test_the_kernels_of_a_decode_step_are_known_by_their_order(layer: str, what: list[str]) -> None:
    """Two layers, and again: after the last one the vocabulary's product comes before the next
    step's first.
    """
    from decode import named

    names = layer.split()
    last = [*names[:-1], "nvjet", "_mass_kernel", "Memcpy DtoH"]
    step = ["nvjet", *names, *last]
    events = [(name, float(i), i + 0.5) for i, name in enumerate(step * 2)]
    once = ["q k v", *what, *what[:-1], "vocabulary", "draw", "copies and small kernels"]
    assert [found for found, _ in named(events[::-1], layers=2)] == once * 2


def test_a_kernel_that_waits_for_the_one_before_counts_from_its_end() -> None:
    from decode import own_times

    events = [("b", 1.0, 6.0), ("a", 0.0, 4.0), ("c", 7.0, 8.0), ("d", 7.2, 7.8)]
    assert own_times(events) == [("a", 4.0), ("b", 2.0), ("c", 1.0), ("d", 0.0)]


def test_a_products_limit_is_its_bytes_or_its_operations() -> None:
    import decode

    found = decode.work_of(decode.SHAPES["qwen2.5-0.5b"], decode.Setting(256, 960), 2)
    assert found["attention"].moved == 256 * 960 * 2 * 2 * 64 * 2
    assert found["down"].moved == 2 * (4864 * 896 + 256 * (4864 + 896))
    assert found["down"].flops == 2 * 256 * 4864 * 896
    assert found["draw"].moved == 4 * 256 * 151_936


def test_kernels_that_share_a_work_share_its_limit() -> None:
    from decode import in_table

    down = {"what": "down", "calls": 48.0, "ms": 0.24, "limit_us": 2.5, "works": 24}
    assert in_table(down, 2.4) == ["down", "48.0", "5.0", "0.240", "10.0%", "2.5", "25%"]
