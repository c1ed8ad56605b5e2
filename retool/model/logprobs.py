"""Log-probabilities of labels, and their gradients, straight from hidden states: the whole [T, V]
never exists.

Shapes: T tokens · D model · V vocab · C tokens of a chunk · S vocabulary entries of a chunk · a
bytes of the accumulation dtype

Logits and everything done to them are in the accumulation dtype: float32 (float64 for float64
inputs), also where hidden and weight are bfloat16. Products of bfloat16 matrices accumulate and
come out in float32.

[Note: which loop is outside] A weight gradient is V·D numbers, a hidden gradient C·D, and V is the
largest dimension there is. With tokens outside, every chunk reads and writes the whole weight
gradient, but one chunk of logits serves the log-probability and both gradients: right where the
upstream gradient is a scalar (`weighted_logprob_sum`: three products). With the vocabulary outside,
each part of the weight gradient is finished once, but the logits are computed again when their
log-sum-exp is known (`logprobs`: four).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retool.model.compiling.hidden import eager
from retool.model.logits import (
    accumulation_dtype,
    add_product,
    finish,
    gradient,
    new_stats,
    product,
    scaled,
    softmax_gradient,
    update,
    workspace,
)
from retool.model.recompute import Recompute

LOGIT_BYTES = {"cuda": 640 << 20, "cpu": 64 << 20}  # default `logit_bytes`
# Of `weighted_logprob_sum` where no activation is freed to save memory
ROOMY_LOGIT_BYTES = {**LOGIT_BYTES, "cuda": 2 << 30}
# of a chunk in `logprobs`, where the budget leaves at least CHUNK_ENTRIES vocabulary entries
CHUNK_TOKENS = 16384
CHUNK_ENTRIES = 1024
ROUND = 128  # chunks of this multiple keep matrix products on their fast path


@eager
def logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    logit_bytes: int | None = None,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """(log p(label) [T], entropy [T] or None) of softmax(hidden @ weight.T / temperature); both
    differentiable, in nats. With a `cap` the products x are cap · tanh(x / cap) before the temperature.

    hidden [T, D] and weight [V, D] of one dtype, labels int64 [T] in [0, V). Results are float32
    (float64 for float64 inputs); gradients arrive in the dtypes of hidden and weight, the weight's
    accumulated over all tokens before it is rounded. Nothing waits for the device.

    Extra memory, besides the results and gradients, with chunks of C tokens × S entries such that
    C·S·a ≤ `logit_bytes` (by default 640 MiB on a GPU, 64 MiB on a CPU): forward C·S·a, backward
    C·S·a + S·D·a + T·D·a, and at most 64 bytes per token in both. On the CPU (and for float64)
    twice C·S·a, three times with a cap, and for bfloat16 there another (C + S)·D·a.

    The entropy's gradient with respect to logit j is −p_j (log p_j + entropy) / temperature. Raises
    ValueError for a temperature ≤ 0.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} does not define a distribution: it must be above 0."
        )
    _check(hidden_TD, weight_VD, labels_T)
    logp, ent = _Logprobs.apply(
        hidden_TD,
        weight_VD,
        labels_T,
        1.0 / temperature,
        entropy,
        _budget(hidden_TD, logit_bytes),
        cap,
    )
    return logp, ent if entropy else None


@eager
def weighted_logprob_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    logit_bytes: int | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Σ weights · log p(label): a 0-d tensor, float32 (float64 for float64 inputs). `cap` as in
    `logprobs`.

    Minus this is the summed SFT loss.

    Shapes and dtypes as in `logprobs`; weights float [T], a constant. Where a weight is 0 the token
    has no influence, whatever its label. The gradients are computed in the forward, from the same
    logits, and scaled in the backward: three matrix products in all.

    Extra memory with chunks of C tokens such that C·V·a ≤ `logit_bytes` (by default 640 MiB on a
    GPU, 64 MiB on a CPU; at least a token): forward C·V·a + V·D·a (weight gradient) + T·D·(bytes of
    hidden) (hidden gradient) and at most 64 bytes per token. On the CPU (and for float64) twice
    C·V·a and another C·D·a, and for bfloat16 there another (C + V)·D·a. The two gradients stay
    until the backward, which makes each once more, scaled and in the dtype asked for. Without
    gradients to compute: as `logprobs`.
    """
    _check(hidden_TD, weight_VD, labels_T)
    budget = _budget(hidden_TD, logit_bytes)
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return _WeightedSum.apply(hidden_TD, weight_VD, labels_T, weights_T, budget, cap)
    logp, _ = _Logprobs.apply(hidden_TD, weight_VD, labels_T, 1.0, False, budget, cap)
    # More than a product: what a label outside the vocabulary gave is NaN, and so is 0 times it
    return torch.where(weights_T == 0, 0, logp * weights_T).sum()


def sum_logit_bytes(device: str, recompute: Recompute) -> int:
    """`logit_bytes` of `weighted_logprob_sum` over a decoder that recomputes so.

    On a GPU its products run faster in larger chunks: each reads and writes the whole weight gradient.
    """
    return (ROOMY_LOGIT_BYTES if recompute == "none" else LOGIT_BYTES)[device]


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    shapes = (
        f"hidden {tuple(hidden_TD.shape)} {hidden_TD.dtype}, weight {tuple(weight_VD.shape)} "
        f"{weight_VD.dtype}"
    )
    assert hidden_TD.shape[1] == weight_VD.shape[1] and hidden_TD.dtype == weight_VD.dtype, shapes
    assert labels_T.shape == hidden_TD.shape[:1] and labels_T.dtype == torch.int64, (
        f"labels {tuple(labels_T.shape)} {labels_T.dtype}"
    )


def _budget(hidden: Tensor, logit_bytes: int | None) -> int:
    """Logits that fit."""
    size = LOGIT_BYTES["cuda" if hidden.is_cuda else "cpu"] if logit_bytes is None else logit_bytes
    return max(1, size // accumulation_dtype(hidden).itemsize)


def _down(n: int, most: int) -> int:
    """The largest chunk ≤ n of `most`, a multiple of ROUND where n allows it."""
    return max(1, min(most, n if n < ROUND else n // ROUND * ROUND))


def chunk_shape(tokens: int, vocab: int, budget: int) -> tuple[int, int]:
    """(C, S) of `logprobs`: as many tokens as CHUNK_TOKENS, unless that leaves fewer than
    CHUNK_ENTRIES vocabulary entries.
    """
    rows = _down(budget // min(vocab, CHUNK_ENTRIES), min(tokens, CHUNK_TOKENS))
    return rows, _down(budget // rows, vocab)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        entropy: bool,
        budget: int,
        cap: float,
    ) -> tuple[Tensor, Tensor | None]:
        rows, entries = chunk_shape(len(hidden), len(weight), budget)
        stats = new_stats(hidden)
        buffer = workspace(hidden, rows, entries)
        # The vocabulary outside: see [Note: which loop is outside].
        for columns in _slices(len(weight), entries):
            for tokens in _slices(len(hidden), rows):
                logits = product(hidden[tokens], weight[columns], buffer)
                here = labels[tokens] - columns.start
                update(stats[:, tokens], logits, here, scale, entropy, cap)
        logp, lse, ent = finish(stats, entropy)
        ctx.save_for_backward(hidden, weight, labels, lse, ent)
        ctx.scale = scale
        ctx.cap = cap
        ctx.chunks = (rows, entries)
        # Without this autograd would make zeros for the entropy's gradient where nobody asked for
        # entropies.
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_logp: Tensor | None, g_ent: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse, ent = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows, entries = ctx.chunks
        dtype = accumulation_dtype(hidden)
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp.contiguous()
        g_ent = None if g_ent is None else g_ent.contiguous()
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        buffer = workspace(hidden, rows, entries)
        for columns in _slices(len(weight), entries):
            # Summed wide over all tokens, and rounded once, when these entries are done
            part = torch.zeros_like(weight[columns], dtype=dtype) if need_weight else None
            for tokens in _slices(len(hidden), rows):
                logits = product(hidden[tokens], weight[columns], buffer)
                g_e, e = (None, None) if g_ent is None else (g_ent[tokens], ent[tokens])
                d_logits = gradient(
                    logits,
                    labels[tokens] - columns.start,
                    ctx.scale,
                    lse[tokens],
                    e,
                    g_logp[tokens],
                    g_e,
                    hidden.dtype,
                    ctx.cap,
                )
                if d_hidden is not None:
                    add_product(d_hidden[tokens], d_logits, weight[columns])
                if part is not None:
                    add_product(part, d_logits.t(), hidden[tokens])
            if d_weight is not None and part is not None:
                d_weight[columns] = part
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None,
            None,
            None,
            None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        budget: int,
        cap: float,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # All of the vocabulary at once: one chunk of logits then serves the loss and both
        # gradients.
        rows = _down(budget // len(weight), max(1, len(hidden)))
        weights = weights.to(accumulation_dtype(hidden)).contiguous()
        # The kernel leaves tokens of weight 0 alone
        logp = torch.zeros_like(weights)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=weights.dtype) if need_weight else None
        buffer = workspace(hidden, rows, len(weight))
        for tokens in _slices(len(hidden), rows):
            logits = product(hidden[tokens], weight, buffer)
            d_logits = softmax_gradient(
                logits, labels[tokens], weights[tokens], logp[tokens], hidden.dtype, cap
            )
            if d_hidden is not None:
                d_hidden[tokens] = d_logits @ weight.to(d_logits.dtype)
            if d_weight is not None:
                add_product(d_weight, d_logits.t(), hidden[tokens])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return (weights * logp).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = scaled(d_weight, grad, ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None
