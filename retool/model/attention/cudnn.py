"""cuDNN's attention for the long documents of a pack, another kernel for the short ones between
them.

Shapes: T tokens · N query heads · K key/value heads · L tokens of a document · H head dim · B
documents

[Note: cuDNN plans] cuDNN compiles a plan per shape (tens of milliseconds, twice: forward and
backward), and documents have any length. Lengths are rounded up to one of 16 per octave, so a run
meets few shapes, and `retool.model.decoder.plan_attention` makes the plans of those that are known
before the first step, for one document each. Documents of one length that follow each other are a
shape of their own, planned when it comes. What stands behind a document's last token is read along,
the next document as a rule, and nothing is copied. Causality hides those keys from the document's
queries; what the queries behind it give is dropped. In the backward their log-sum-exp is set so
high that their probabilities are exactly zero, and with them their share of every gradient. torch
keys its plans on the strides of q, k and v alone, so out and dout always have the one layout
[documents, L, N, H].
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retool.model.attention.pack import Attended, Backward, Forward, Gradients, Pack
from retool.model.attention.parts import new_parts, together

CUDNN_SHORTEST = (
    4096  # below it FlashAttention-2 over all documents at once fills the device better
)
CUDNN_LARGEST_HEAD = 128
# Elements from a run's start to its end; FlashAttention-2 counts in 64 bits, of cuDNN it isn't
# known
INDEXABLE = 1 << 31
# A log-sum-exp beside which any score is e^-infinity
HIDES = 1e30


class Run(NamedTuple):
    """Consecutive documents for one kernel: documents [first, stop), tokens [begin, end); `length`
    is 0 where they are short.
    """

    first: int
    stop: int
    begin: int
    end: int
    length: int


@lru_cache(maxsize=256)
def _runs(seqlens: tuple[int, ...]) -> tuple[Run, ...]:
    """Long documents of one length that follow each other are one cuDNN batch, short ones that do
    are one call of the other kernel.
    """
    runs: list[Run] = []
    begin = 0
    for i, n in enumerate(seqlens):
        length = n if n >= CUDNN_SHORTEST else 0
        joins = bool(runs) and runs[-1].length == length
        first, start = (runs[-1].first, runs[-1].begin) if joins else (i, begin)
        if joins:
            runs.pop()
        runs.append(Run(first, i + 1, start, begin + n, length))
        begin += n
    return tuple(runs)


def _short_pack(run: Run, pack: Pack) -> Pack:
    cu_seqlens = pack.cu_seqlens[run.first : run.stop + 1]
    seqlens = pack.seqlens[run.first : run.stop]
    return Pack(
        cu_seqlens if run.first == 0 else cu_seqlens - cu_seqlens[:1], max(seqlens), seqlens
    )


def _rounded(length: int) -> int:
    """Up to a multiple of a sixteenth of the power of two below, at most 6 % more."""
    step = max(1 << (length.bit_length() - 5), 1)
    return -(-length // step) * step


def planned_lengths(lengths: Iterable[int], row: int) -> list[int]:
    """What cuDNN needs a plan for each of where documents have these lengths, and a token's heads `row`
    elements; without those that are left to the other kernel.
    """
    rounded = {_rounded(n) for n in lengths if n >= CUDNN_SHORTEST}
    return sorted(n for n in rounded if n * row < INDEXABLE)


def _by_cudnn(q_TNH: Tensor, run: Run) -> bool:
    if not run.length:
        return False
    rows = (run.stop - run.first) * _rounded(run.length)
    return rows * q_TNH.stride(0) < INDEXABLE


def _batched(x_TNH: Tensor, run: Run) -> Tensor:
    """[T, N, H] → [documents, N, rounded L, H] of a run; a view unless what is read along would lie
    behind the pack's end, or between documents.
    """
    length = _rounded(run.length)
    extra = length - run.length
    alone = run.end - run.begin == run.length
    if alone and run.begin + length <= len(x_TNH):
        return x_TNH[run.begin : run.begin + length][None].transpose(1, 2)
    x = x_TNH[run.begin : run.end].unflatten(0, (-1, run.length))
    if extra and alone:
        x = _extended(x[0], length)[None]
    elif extra:
        x = F.pad(x, (0, 0, 0, 0, 0, extra))
    return x.transpose(1, 2)


def _extended(x_LNH: Tensor, length: int) -> Tensor:
    """A copy with zeros behind it and the strides of the original: plans are made for strides."""
    _, heads, dim = x_LNH.shape
    rows = x_LNH.new_zeros(length, x_LNH.stride(0))
    out = rows[:, : heads * dim].view(length, heads, dim)
    out[: len(x_LNH)] = x_LNH
    return out


def _flattened(x: Tensor, run: Run) -> Tensor:
    """The way back: [documents, N, rounded L, H] → [T of the run, N, H]."""
    return x.transpose(1, 2)[:, : run.length].flatten(0, 1)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack, short: Forward) -> Attended:
    """out [T, N, H] and lse float32 [N, T]; `short` computes the documents of fewer than
    `CUDNN_SHORTEST` tokens, and huge ones.
    """
    runs = _runs(pack.seqlens)
    # The usual pack has one run. To cut it out would take the host longer than to launch its kernel.
    if len(runs) == 1:
        if _by_cudnn(q, runs[0]):
            return _forward_run(q, k, v, runs[0])
        return short(q, k, v, pack)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    for run in runs:
        tokens = slice(run.begin, run.end)
        if _by_cudnn(q, run):
            out_run, lse_run = _forward_run(q, k, v, run)
        else:
            out_run, lse_run = short(q[tokens], k[tokens], v[tokens], _short_pack(run, pack))
        out[tokens], lse[:, tokens] = out_run, lse_run
    return out, lse


def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: Pack,
    short: Backward,
) -> Gradients:
    """(dq, dk, dv) of what `cudnn_forward` computed."""
    runs = _runs(pack.seqlens)
    if len(runs) == 1:
        if _by_cudnn(q, runs[0]):
            return _backward_run(dout, q, k, v, out, lse, runs[0])
        return short(dout, q, k, v, out, lse, pack)
    grads = new_parts(q, k)
    joined = together(grads)
    for run in runs:
        tokens = slice(run.begin, run.end)
        if _by_cudnn(q, run):
            parts = _backward_run(dout, q, k, v, out, lse, run)
        else:
            lse_run = lse[:, tokens].contiguous()
            parts = short(
                dout[tokens],
                q[tokens],
                k[tokens],
                v[tokens],
                out[tokens],
                lse_run,
                _short_pack(run, pack),
            )
        torch.cat(parts, 1, out=joined[tokens])
    return grads


def _forward_run(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Attended:
    q, k, v = (_batched(x, run) for x in (q, k, v))
    out, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True
    )
    lse = stats.reshape(out.shape[:3])[..., : run.length].transpose(0, 1).flatten(1)
    return _flattened(out, run).contiguous(), lse.contiguous()


def _backward_run(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, run: Run
) -> Gradients:
    length = _rounded(run.length)
    dout, q, k, v, out = (_batched(x, run) for x in (dout, q, k, v, out))
    stats = lse[:, run.begin : run.end].unflatten(1, (-1, run.length)).transpose(0, 1)
    # cuDNN wants four dimensions
    stats = F.pad(stats, (0, length - run.length), value=HIDES).contiguous()[..., None]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which isn't used
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, stats, seed, seed, None, None, None, length, length, 0.0, True
    )
    dq, dk, dv = (_flattened(g, run) for g in grads)
    return dq, dk, dv
