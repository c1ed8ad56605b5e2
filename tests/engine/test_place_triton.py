"""The kernel that rotates and stores new tokens without a GPU: run by Triton's interpreter (pip
install triton), against the trainer's pieces.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from retool.engine.kernels.kv_cache import KVCache, located
from retool.model.block import rms_norm
from retool.model.rope import rotate
from tests.interpreter import interpreted

CPU = torch.device("cpu")


def compare(device: torch.device = CPU) -> None:
    """With and without norms of heads, head counts that are no power of two, tokens whose places
    are in any order.
    """
    from retool.engine.kernels.place import place

    generator = torch.Generator().manual_seed(0)
    shapes = [
        (14, 2, 64, torch.float32, False),
        (4, 1, 16, torch.float16, True),
        (5, 5, 32, torch.float32, True),
    ]
    if device.type == "cuda":  # the interpreter rounds to bf16 otherwise
        shapes += [(16, 8, 128, torch.bfloat16, True), (14, 2, 64, torch.bfloat16, False)]
    for heads, kv_heads, dim, dtype, normed in shapes:
        # rounded once
        tokens = 9
        most = {torch.float32: 2e-7, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}[dtype]
        x = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
        angles = 100 * torch.rand(tokens, dim // 2, generator=generator)
        q_norm, k_norm = (1 + torch.randn(2, dim, generator=generator) / 4).to(dtype)
        slots = torch.randperm(3 * 16, generator=generator)[:tokens]
        cache = KVCache((2, 16, kv_heads, dim), 3, dtype, device)
        wanted = KVCache((2, 16, kv_heads, dim), 3, torch.float64, CPU)
        for kept in (cache, wanted):
            kept.data.fill_(7)
        norms = (q_norm.to(device), k_norm.to(device), 1e-5) if normed else None
        cos = angles.cos().to(device)
        sin = angles.sin().to(device)
        found = place(x.to(device), cos, sin, norms, slots.to(device), cache.data[1]).cpu()
        q, k, v = x.double().split([heads, kv_heads, kv_heads], 1)
        if normed:
            q = rms_norm(q, q_norm.double(), 1e-5)
            k = rms_norm(k, k_norm.double(), 1e-5)
        q = rotate(q, angles.double().cos(), angles.double().sin())
        k = rotate(k, angles.double().cos(), angles.double().sin())
        wanted.write(1, slots, torch.cat([k, v], 1))
        for one, other in ((found, q), (cache.data.cpu(), wanted.data)):
            assert (one - other).norm() <= most * other.norm(), (heads, dim, dtype)
        assert torch.equal(
            cache.data[1].flatten(0, 1).cpu()[slots][:, kv_heads:], x[:, heads + kv_heads :]
        ), "values are as they came"
    compare_located(device)


def compare_located(device: torch.device) -> None:
    """First and last tokens of pages, and beyond the table; a table that is part of a wider one."""
    from retool.engine.kernels.place_triton import located_rows

    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 15, 16, 31, 47, 48, 49, 200] * 40)
    tables = torch.randint(0, 900, (320, 5), generator=generator, dtype=torch.int32)[:, :3]
    found = located_rows(positions.to(device), tables.to(device), 16)
    slots, lengths = located(positions, tables, 16)
    assert torch.equal(found[0].cpu(), slots) and torch.equal(found[1].cpu(), lengths)
    assert lengths[:8].tolist() == [1, 16, 17, 32, 48, 48, 48, 48]
    assert slots[1] == tables[1, 0] * 16 + 15 and slots[7] == tables[7, 2] * 16 + 200 % 16


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_kernel_rotates_and_stores_as_the_trainers_pieces_do() -> None:
    interpreted(__name__)
