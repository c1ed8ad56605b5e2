"""The engine's own attention kernels without a GPU: run by Triton's interpreter (pip install
triton), against torch's attention in fp64.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch

from retool.engine.kernels.attention import paged_attention
from retool.engine.kernels.kv_cache import KVCache
from retool.engine.kernels.pages import Keys, Pages, Seen
from tests.interpreter import interpreted

CPU = torch.device("cpu")
LENGTHS = [1, 300, 256, 1000, 700, 64]
COUNTS = [1, 300, 70, 2, 129, 0]  # of chunks, and one that is none


def layer_of(
    kv_heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[KVCache, torch.Tensor]:
    """A cache whose sequences lie on pages in random order, no number where nothing was written;
    and the page table, wider than need be.
    """
    cache = KVCache((1, 256, kv_heads, dim), 14, dtype, CPU)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    order = (torch.randperm(13, generator=generator) + 1).tolist()
    tables = torch.zeros(len(LENGTHS), 9, dtype=torch.int32)
    for row, length in enumerate(LENGTHS):
        last = (length - 1) // 256
        for place in range(last + 1):
            tables[row, place] = order.pop()
        cache.data[0, int(tables[row, last]), (length - 1) % 256 + 1 :] = float("nan")
    return cache, tables


def compare() -> None:
    """Few and many parts, as many for all or more for the longer ones; groups of one to seven query
    heads, one to four kv heads in a program, queries that lie apart.
    """
    from retool.engine.kernels import attention_triton as kernels
    from retool.engine.kernels.chunks_triton import Chunks, chunk_rows

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    shapes = (
        (14, 2, 64, torch.float32, 2048),
        (9, 3, 64, torch.float32, 18),
        (4, 4, 128, torch.float32, 100),
        (16, 8, 32, torch.float16, 16),
        # Again, with windows and caps
        (14, 2, 64, torch.float32, 2048),
        (9, 3, 64, torch.float32, 18),
        (4, 4, 128, torch.float32, 100),
        (16, 8, 32, torch.float16, 16),
    )
    specials = iter([(0, 0.0)] * 4 + [(50, 0.0), (0, 1.5), (1, 0.0), (300, 2.0)])
    for number, (heads, kv_heads, dim, dtype, programs) in enumerate(shapes):
        kernels.TARGET_PROGRAMS = programs
        kernels.LONG = 200 if (number + number // 4) % 2 else 1 << 20
        # Windows within a block, over several, and longer than most sequences
        seen = Seen(*next(specials))
        cache, tables = layer_of(kv_heads, dim, dtype, generator)
        query = torch.randn(len(LENGTHS), heads + 3, dim, generator=generator).to(dtype)[:, :heads]
        keys = Keys(tables, lengths)
        found = kernels.decode_rows(query, cache.data[0], keys, seen)
        exact = KVCache((1, 256, kv_heads, dim), 14, torch.float64, CPU)
        exact.data.copy_(cache.data.nan_to_num())
        pages = Pages(torch.zeros(1), tables, lengths, len(LENGTHS))
        want = paged_attention(query.double(), exact, 0, pages, "torch", seen)
        error = (found - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < (1e-6 if dtype == torch.float32 else 1e-3), (
            heads,
            kv_heads,
            dim,
            programs,
        )
        alone = kernels.decode_rows(
            query, cache.data[0], Keys(tables[[3] * 6], lengths[[3] * 6]), seen
        )
        assert torch.equal(alone[3], found[3]), (
            "a sequence's numbers don't depend on the others' lengths"
        )
        offsets = torch.tensor([0, *accumulate(COUNTS)], dtype=torch.int32)
        query = torch.randn(sum(COUNTS), heads + 3, dim, generator=generator).to(dtype)[:, :heads]
        found = chunk_rows(query, cache.data[0], Chunks(keys, offsets, 384), seen)
        pages = Pages(
            torch.zeros(1),
            tables[:5],
            lengths[:5],
            0,
            offsets[:6],
            None,
            tuple(COUNTS[:5]),
            tuple(LENGTHS[:5]),
        )
        want = paged_attention(query.double(), exact, 0, pages, "torch", seen)
        error = (found - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < (5e-6 if dtype == torch.float32 else 2e-3), (
            heads,
            kv_heads,
            dim,
            "chunks",
        )
    assert [
        kernels.heads_together(*shape)
        for shape in ((2, 7, 64), (3, 3, 64), (4, 1, 128), (8, 2, 32))
    ] == [2, 1, 1, 4]
    found = [kernels.reading(n, deep=True) for n in (1, 6, 16, 200)]
    assert found == [(parts, kernels.SHALLOW) for parts in (16, 2, 1, 1)]
    kernels.TARGET_PROGRAMS = 512
    assert kernels.reading(256, deep=True) == (1, kernels.DEEP)
    assert kernels.reading(256, deep=False) == (2, kernels.SHALLOW)
    assert kernels.reading(512, deep=True) == (1, kernels.SHALLOW)
    kernels.LONG = 200
    assert [kernels.most_parts(*x) for x in ((1, 200), (1, 201), (1, 999), (2, 999), (8, 9))] == [
        1,
        2,
        4,
        8,
        8,
    ]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_kernels_attend_as_torch_does() -> None:
    interpreted(__name__)
