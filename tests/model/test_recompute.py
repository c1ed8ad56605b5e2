"""Blocks that run again in the backward: in host memory or not, by chunk or at once, the gradients
are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retool.batch import PackedBatch, Sample, pack
from retool.model import block, offload, recompute
from retool.model.attention import dispatch as attention
from retool.model.build import ModelOptions, build_decoder
from retool.model.decoder import Decoder
from retool.model.families import gemma2
from retool.model.fused.gated import gated_down
from retool.model.offload import Offload
from retool.model.recompute import Recompute
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from tests.model.decoders import decoder_config

CONFIG = decoder_config(6, 2, "qwen3", layers=4, qkv_bias=True, o_bias=True)
DTYPES = {
    "fp64": (torch.float64,) * 3,
    "fp32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16, torch.float32, torch.float32),
}


def decoder(
    how: Recompute, dtype: str = "fp32", compiled: bool = False, parked: int | None = None
) -> Sharded:
    options = ModelOptions(*DTYPES[dtype], recompute=how, use_compile=compiled, parked=parked)
    model = build_decoder(CONFIG, make_mesh(), options)
    model.master.copy_(
        torch.randn(model.master.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    )
    model.refresh()
    return model


def batch(tokens: int, seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)
    sizes = [tokens // 2, 1, tokens - tokens // 2 - 1]
    return pack([Sample(rng.integers(0, 61, n).astype(np.int32), np.ones(n, bool)) for n in sizes])


def loss(model: Sharded, documents: PackedBatch) -> torch.Tensor:
    return model(documents, lambda hidden, weight: (hidden @ weight.t()).double().tanh().sum())


def gradients(
    how: Recompute, dtype: str = "fp32", tokens: int = 60, chunk: int = 0, compiled: bool = False
) -> np.ndarray:
    if chunk:
        recompute.CHUNKED_FROM = recompute.CHUNK = recompute.ROUND = chunk
    model = decoder(how, dtype, compiled)
    loss(model, batch(tokens)).backward()
    return model.grad.double().numpy()


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pages a tensor; chunks restored after a test that changes them."""
    monkeypatch.setattr(offload, "PAGE", 1000)
    for name in ("CHUNKED_FROM", "CHUNK", "ROUND"):
        monkeypatch.setattr(recompute, name, getattr(recompute, name))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def store(model: Sharded) -> Offload:
    assert isinstance(model.module, Decoder) and model.module.execution.offload is not None
    return model.module.execution.offload


@pytest.mark.parametrize("dtype", DTYPES)
def test_offload_changes_no_bit(dtype: str) -> None:
    np.testing.assert_array_equal(gradients("offload", dtype), gradients("full", dtype))
    assert (
        error(gradients("full", dtype), gradients("none", dtype))
        < {"fp64": 1e-14, "fp32": 1e-6, "bf16": 1e-2}[dtype]
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite", "olmo2", "gemma2"])
def test_nobody_reads_what_the_backward_leaves_uncomputed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MLP that is only added may give any numbers there; one with a norm behind it may not."""
    unread = []

    def spoilt(*args: Any, wanted: bool = True) -> torch.Tensor:
        out = gated_down(*args)
        if wanted:
            return out
        unread.append(out)
        return out + (float("nan") - out).detach()

    def of_a_step() -> torch.Tensor:
        config = decoder_config(6, 2, family)
        model = build_decoder(config, make_mesh(), ModelOptions(*DTYPES["fp32"], recompute="full"))
        generator = torch.Generator().manual_seed(0)
        model.master.copy_(torch.randn(model.master.shape, generator=generator) * 0.2)
        model.refresh()
        # The next forward's results are read again
        for _ in range(2):
            loss(model, batch(20)).backward()
        return model.grad

    wanted = of_a_step()
    monkeypatch.setattr(block, "gated_down", spoilt)
    monkeypatch.setattr(gemma2, "gated_down", spoilt)
    torch.testing.assert_close(of_a_step(), wanted, rtol=0, atol=0)
    backwards = 0 if family in ("olmo2", "gemma2") else 2
    assert len(unread) == 2 * backwards, "one for each layer"


@pytest.mark.parametrize("layers", [1, 2, None])
def test_forwards_may_wait_for_their_backwards(layers: int | None) -> None:
    """Two graphs at once don't share host pages; longer and shorter packs later reuse them."""
    parked = decoder("offload", parked=layers)
    kept = decoder("full")
    for sizes in ((60, 33), (80, 7)):
        for model in (parked, kept):
            model.zero_grad()
            for value in [loss(model, batch(n, seed=n)) for n in sizes]:
                value.backward()
        torch.testing.assert_close(parked.grad, kept.grad, rtol=0, atol=0)
    # x, attention's result, log-sum-exp
    each = [sum(-(-n * size // 1000) for size in (24 * 4, 48 * 4, 6 * 4)) for n in (60, 33, 80, 7)]
    pages = (layers or 3) * max(each[0] + each[1], each[2] + each[3])
    assert len(store(parked).free) == pages
    loss(parked, batch(80)).backward()
    assert len(store(parked).free) == pages, "one forward needs no more pages than two did"
    assert not store(parked).held and store(parked).newest is None, (
        "nothing is held after a backward"
    )


def test_a_forward_that_failed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("offload")
    kept = decoder("full")
    with monkeypatch.context() as patch:
        patch.setattr(model.module.get_submodule("blocks.2"), "before_piece", None)
        with pytest.raises(TypeError):
            loss(model, batch(60))
    for each in (model, kept):
        loss(each, batch(33)).backward()
    torch.testing.assert_close(model.grad, kept.grad, rtol=0, atol=0)
    assert not store(model).held, "nothing of the failed forward was fetched"


@pytest.mark.parametrize("how", ["none", "selective", "full", "offload"])
def test_attention_is_computed_once(monkeypatch: pytest.MonkeyPatch, how: Recompute) -> None:
    runs = [0]
    forward = attention.FORWARD["reference"]

    def counted(*args: Any) -> Any:
        runs[0] += 1
        return forward(*args)

    monkeypatch.setitem(attention.FORWARD, "reference", counted)
    loss(decoder(how), batch(20)).backward()
    assert runs[0] == CONFIG.layers


def test_a_second_backward_is_refused_where_the_first_took_the_activations() -> None:
    for how in ("full", "offload"):
        model = decoder(how)
        value = loss(model, batch(20))
        value.backward(retain_graph=True)
        once = model.grad.clone()
        if how == "full":
            value.backward()
            torch.testing.assert_close(model.grad, 2 * once)
        else:
            with pytest.raises(
                RuntimeError,
                match="there for one backward: with retain_graph=True use recompute='full'",
            ):
                value.backward()


@pytest.mark.parametrize("how", ["full", "offload"])
@pytest.mark.parametrize(("dtype", "most"), [("fp64", 1e-14), ("fp32", 1e-6)])
def test_chunks_equal_the_whole(how: Recompute, dtype: str, most: float) -> None:
    assert error(gradients(how, dtype, chunk=7), gradients("none", dtype)) < most


class MLPRows(TorchDispatchMode):
    """The most rows of any matrix as wide as the MLP is."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.ndim == 2
                and tensor.shape[1] == CONFIG.ffn
            ):
                self.most = max(self.most, len(tensor))
        return out


@pytest.mark.parametrize(
    ("how", "chunk", "rows"),
    [("none", 6, 60), ("full", 0, 60), ("full", 6, 24), ("offload", 30, 30)],
)
def test_the_mlp_exists_for_one_chunk_at_a_time(how: Recompute, chunk: int, rows: int) -> None:
    """24 rows: those of the `down` matrix, the least that this model can have."""
    with MLPRows() as seen:
        gradients(how, chunk=chunk)
    assert seen.most == rows


def test_many_chunks_lose_no_precision_in_bf16() -> None:
    """Weight gradients are added up in fp32: in bf16 the sum of 300 chunks would stand still."""
    exact = gradients("none", "fp64", tokens=600)
    whole = error(gradients("none", "bf16", tokens=600), exact)
    assert error(gradients("full", "bf16", tokens=600, chunk=2), exact) < 1.1 * whole


def test_frozen_weights_are_left_out() -> None:
    """A frozen embedding gives the first block an input without a gradient; a frozen matrix gets
    none.
    """
    found = {}
    for how in ("none", "offload"):
        model = decoder(how)
        for parameter in model.module.get_submodule("embed").parameters():
            parameter.requires_grad_(False)
        frozen = model.module.get_parameter("blocks.1.gate_up").requires_grad_(False)
        loss(model, batch(60)).backward()
        assert frozen.grad is None
        found[how] = model.grad.clone()
    assert error(found["offload"].numpy(), found["none"].numpy()) < 1e-6


@pytest.mark.parametrize("tokens", [1, 32_768, 32_769, 40_000, 262_144, 1_000_003])
def test_chunks_cover_every_token_once(tokens: int) -> None:
    chunks = recompute.token_chunks(tokens)
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[
        -1
    ].stop == tokens
    sizes = [c.stop - c.start for c in chunks]
    assert (
        sizes == [tokens]
        if tokens <= 32_768
        else (max(sizes) <= 16_384 and not any(n % 128 for n in sizes[:-1]))
    )
    assert max(sizes) - min(sizes) <= 128 * len(sizes), "of about one size"


@pytest.mark.slow
def test_compiled_blocks_need_few_graphs() -> None:
    """Whole and chunked, with and without gradients: lengths and places of chunks make no graph of
    their own.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens, chunk in ((60, 60), (75, 20), (131, 30)):
        assert (
            error(
                gradients("offload", "fp32", tokens, chunk, compiled=True),
                gradients("none", "fp32", tokens),
            )
            < 1e-5
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, (
        "before and after, each with gradients and without"
    )
