"""The vocabulary head: log-probabilities and their gradients against the matrix products they can't
do without.

    python benchmarks/logprobs.py [--tokens 16384 --vocab 151936 --dim 896] [--json out.json]

The baseline is the three products of a training step (logits, hidden gradient, weight gradient) on
bfloat16 matrices of these sizes and nothing else. `dense` is `cross_entropy` on whole float32
logits, where it fits. GiB is memory on top of the inputs, results included. `error` is the hidden
gradient's ‖g − float64‖ / ‖float64‖ on the first 64 tokens. Without a GPU: float32, 1/16 of tokens
and vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from table import arguments, attempt, failed, hardware, head, measure, row, save, spread
from torch import Tensor

from retool.model.logprobs import logprobs, weighted_logprob_sum
from retool.perf import GIB

Step = Callable[[], Any]


def steps(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Step]:
    """What is timed. Those that return gradients return the hidden states' first."""
    like_logits = torch.randn(
        min(4096, len(hidden)), len(weight), device=hidden.device, dtype=hidden.dtype
    )
    h = hidden.detach()
    w = weight.detach()

    def products() -> None:
        for i in range(0, len(h), len(like_logits)):
            part = h[i : i + len(like_logits)]
            torch.mm(part, w.t())
            torch.mm(like_logits[: len(part)], w)
            torch.mm(like_logits[: len(part)].t(), part)

    def dense() -> tuple[Tensor, ...]:
        losses = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
        return torch.autograd.grad((losses * -weights).sum(), [hidden, weight])

    def summed(logit_bytes: int | None) -> Step:
        return lambda: torch.autograd.grad(
            weighted_logprob_sum(hidden, weight, labels, weights, logit_bytes), [hidden, weight]
        )

    def forward(entropy: bool) -> Step:
        return lambda: logprobs(h, w, labels, 1.0, entropy)

    def full(entropy: bool) -> Step:
        def run() -> tuple[Tensor, ...]:
            logp, ent = logprobs(hidden, weight, labels, 1.0, entropy)
            flow = (logp * weights).sum()
            return torch.autograd.grad(
                flow if ent is None else flow + 0 * ent.sum(), [hidden, weight]
            )

        return run

    cases: dict[str, Step] = {"three products": products}
    if len(hidden) * len(weight) * 14 < 60e9:
        cases["dense"] = dense
    if hidden.is_cuda:
        cases |= {
            f"weighted_logprob_sum, {gib} GiB of logits": summed(int(gib * GIB))
            for gib in (0.5, 1, 2, 4)
        }
    else:
        cases["weighted_logprob_sum"] = summed(None)
    cases |= {"logprobs, forward": forward(False), "logprobs + entropy, forward": forward(True)}
    return cases | {
        "logprobs, forward + backward": full(False),
        "logprobs + entropy, forward + backward": full(True),
    }


def exact_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    h = hidden[:64].detach().double().requires_grad_()
    total = (
        F.cross_entropy(h @ weight.detach().double().t(), labels[:64], reduction="none")
        * -weights[:64].double()
    ).sum()
    return torch.autograd.grad(total, h)[0]


COLUMNS = ["", "ms", "× three products", "GiB", "error"]


def in_table(line: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, len(COLUMNS))
    times = (
        ""
        if "failed" in base
        else f"{statistics.median(line['ms']) / statistics.median(base['ms']):.2f}×"
    )
    return [
        line["name"],
        spread(line["ms"]),
        times,
        f"{line['gib']:.2f}",
        "" if line["error"] is None else f"{line['error']:.1e}",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dim", type=int, default=896)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    tokens, vocab = (args.tokens, args.vocab) if on_gpu else (args.tokens // 16, args.vocab // 16)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden = (
        torch.randn(tokens, args.dim, device=device, generator=generator).to(dtype).requires_grad_()
    )
    weight = (
        (torch.randn(vocab, args.dim, device=device, generator=generator) * 0.05)
        .to(dtype)
        .requires_grad_()
    )
    labels = torch.randint(vocab, (tokens,), device=device, generator=generator)
    weights = torch.rand(tokens, device=device, generator=generator) + 0.5
    want = exact_gradient(hidden, weight, labels, weights)
    lines = list[dict[str, Any]]()

    def timed(step: Step) -> dict[str, Any]:
        result = step()
        gradients = (
            isinstance(result, tuple)
            and isinstance(result[0], Tensor)
            and result[0].shape == hidden.shape
        )
        error = (
            ((result[0][:64].double() - want).norm() / want.norm()).item() if gradients else None
        )
        del result
        return {"error": error, **measure(step, device, args.repeats)}

    print(hardware(device))
    title = (
        f"{tokens:,} tokens, vocabulary {vocab:,}, width {args.dim}; three products are "
        f"{6e-12 * tokens * vocab * args.dim:.2f} TFLOP"
    )
    head(title, COLUMNS)
    for name, step in steps(hidden, weight, labels, weights).items():
        lines.append(
            {
                "name": name,
                "tokens": tokens,
                "vocab": vocab,
                "dim": args.dim,
                **attempt(partial(timed, step)),
            }
        )
        row(in_table(lines[-1], lines[0]))
        save(args.json, device, lines)


if __name__ == "__main__":
    main()
