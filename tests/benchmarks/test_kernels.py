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
        ("_update_kernel", "vocabulary head"),
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
