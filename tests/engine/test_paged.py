"""Paged kernels are tried before they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retool.engine.kernels import attention as paged
from retool.model.attention.dispatch import TRUSTED

INPUTS = torch.device("cpu"), torch.float32, 16, 16


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_paged_kernels_that_compute_wrongly_are_found_out(
    wrong: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(number: int) -> paged.Kernel:
        right = paged.KERNELS["torch"][number]
        return lambda *given: right(*given) * (0.5 if number == wrong else 1)

    monkeypatch.setitem(paged.KERNELS, "flash", (kernel(0), kernel(1)))
    error = paged.paged_error.__wrapped__("flash", *INPUTS)
    assert error == 0 if wrong is None else 0.05 < error < 0.6


def test_a_kernel_that_mixes_up_the_heads_of_split_sequences_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As flash-attn's does with accumulators narrower than its tiles; what has one part, here the
    item of one key, is right.
    """

    def mixed_up(
        q: torch.Tensor, data: torch.Tensor, pages: paged.Pages, seen: paged.Seen
    ) -> torch.Tensor:
        right = paged._torch_decode(q, data, pages, seen)
        return torch.where(pages.lengths[: pages.decode, None, None] > 16, right.flip(1), right)

    monkeypatch.setitem(paged.KERNELS, "flash", (paged._torch_chunks, mixed_up))
    assert paged.paged_error.__wrapped__("flash", *INPUTS) > 4 * TRUSTED


def test_a_package_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol")

    monkeypatch.setitem(paged.KERNELS, "flash", (paged._torch_chunks, fails))
    with pytest.warns(
        UserWarning, match="'flash' fail here: flash_attn_2_cuda.so: undefined symbol"
    ):
        assert paged.paged_error.__wrapped__("flash", *INPUTS) == float("inf")


def test_decoding_gathers_a_bounded_part_of_the_cache_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 40, 17, 1, 33], dtype=torch.int32)
    cache = paged.KVCache((1, 16, 2, 8), 16, torch.float32, INPUTS[0])
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    tables = torch.randint(1, 16, (5, 3), generator=generator, dtype=torch.int32)
    pages = paged.Pages(torch.zeros(5), tables, lengths, 5)
    query = torch.randn(5, 4, 8, generator=generator)
    want = paged.paged_attention(query, cache, 0, pages, "torch")
    gathered = paged._gathered
    rows = []
    monkeypatch.setattr(paged, "MAX_GATHERED_BYTES", 2 * 3 * cache.data[0, 0].nbytes + 1)
    monkeypatch.setattr(
        paged, "_gathered", lambda data, tables: rows.append(len(tables)) or gathered(data, tables)
    )
    torch.testing.assert_close(paged.paged_attention(query, cache, 0, pages, "torch"), want)
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("each_alone", [False, True])
@pytest.mark.parametrize("window", [1, 5, 17, 60])
def test_windows_over_pages_equal_attention_over_what_they_show(
    window: int, each_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two single tokens and a chunk of 20, query by query over its own keys; chunks in blocks."""
    monkeypatch.setattr(paged, "MAX_QUERIES_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(2)
    cache = paged.KVCache((1, 16, 2, 8), 9, torch.float64, INPUTS[0])
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    tables = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8]], dtype=torch.int32)
    lengths = [40, 20, 45]
    count = 20
    chosen = slice(0, 2) if each_alone else slice(0, 3)
    pages = paged.Pages(
        slots=torch.zeros(1, dtype=torch.int64),
        tables=tables[chosen],
        lengths=torch.tensor(lengths[chosen], dtype=torch.int32),
        decode=2,
        counts=() if each_alone else (count,),
        host_lengths=tuple(lengths[:2]) if each_alone else (lengths[2],),
        each_alone=each_alone,
    )
    query = torch.randn(2 if each_alone else 2 + count, 4, 8, generator=generator).double()
    found = paged.paged_attention(query, cache, 0, pages, "torch", paged.Seen(window))
    ends = [(0, 40), (1, 20), *((2, 45 - count + i + 1) for i in range(count))]
    for row, (item, end) in zip(range(len(query)), ends, strict=False):
        seen = cache.data[0, tables[item]].flatten(0, 1)[max(0, end - window) : end]
        keys, values = seen.transpose(0, 1).split(2)
        keys, values = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
        scores = (keys @ query[row][..., None])[..., 0] / 8**0.5
        want = (scores.softmax(-1)[:, None] @ values)[:, 0]
        torch.testing.assert_close(found[row], want)


def test_any_number_of_pages_is_copied() -> None:
    cache = paged.KVCache((2, 4, 1, 4), 100, torch.float32, INPUTS[0])
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    before = cache.data.clone()
    pairs = [(1 + i % 9, 10 + i) for i in range(80)]
    cache.copy(pairs)
    for source, target in (*pairs, *((page, page) for page in [*range(10), *range(90, 100)])):
        assert torch.equal(cache.data[:, target], before[:, source])


def test_keys_are_written_without_a_sort_in_deterministic_runs_too() -> None:
    seen: list[bool] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.aten.index_copy_.default:
                seen.append(torch.are_deterministic_algorithms_enabled())
            return function(*args, **(kwargs or {}))

    cache = paged.KVCache((1, 16, 1, 4), 3, torch.float32, INPUTS[0])
    torch.use_deterministic_algorithms(True)
    try:
        with Watched():
            cache.write(0, torch.tensor([40, 17]), torch.ones(2, 2, 4))
        assert seen == [False] and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert cache.data.sum() == 16 and cache.data[0, 2, 8].all() and cache.data[0, 1, 1].all()


def test_they_are_not_used_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next that are there and right are, and what they are is said."""
    gpu = torch.device("cuda", 0), torch.bfloat16, 16, 256

    def chosen(installed: bool, ours: bool, *right: str) -> str:
        monkeypatch.setattr(paged, "find_spec", lambda _: True if installed else None)
        monkeypatch.setattr(paged, "_ours", lambda *_: ours)
        monkeypatch.setattr(
            paged, "paged_error", lambda name, *_: 0.004 if name in right else float("nan")
        )
        return paged.choose_paged(*gpu)

    assert paged.choose_paged(*INPUTS) == "torch"
    monkeypatch.setattr(paged, "_ours", lambda *_: False)
    with pytest.warns(UserWarning, match="sliding windows"):
        assert paged.choose_paged(*gpu, windowed=True) == "torch"
    monkeypatch.setattr(paged, "_ours", lambda *_: True)
    # Tried without, and with both
    monkeypatch.setattr(paged, "paged_error", lambda *inputs: 0.9 if inputs[5:] else 0.004)
    with (
        pytest.warns(UserWarning, match="'triton' compute wrongly"),
        pytest.warns(UserWarning, match="caps attention's scores"),
    ):
        assert paged.choose_paged(*gpu, capped=True) == "torch"
    assert paged.choose_paged(*gpu) == "triton"
    assert chosen(True, True, "flash", "triton") == "triton"
    assert chosen(False, True, "triton") == "triton"
    assert chosen(True, False, "flash") == "flash"
    assert chosen(False, False) == "torch"
    with pytest.warns(
        UserWarning, match=r"'triton' compute wrongly .* heads of 16 \(relative error nan\)"
    ):
        assert chosen(True, True, "flash") == "flash"
    with pytest.warns(UserWarning) as said:
        assert [chosen(True, True), chosen(False, True)] == ["torch", "torch"]
    names = [str(warning.message).split("'")[1] for warning in said]
    assert names == ["triton", "flash", "triton"]
