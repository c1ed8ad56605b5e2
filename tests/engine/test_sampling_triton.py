"""The GPU's sampler without a GPU: its kernels run by Triton's interpreter (pip install triton),
against the definition in torch.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from retool.engine.kernels.draws import Draws, seed_key
from retool.engine.kernels.sampling import cutoff, sample
from tests.interpreter import interpreted

FILTERS = [(1, 1.0), (5, 1.0), (1000, 1.0), (-1, 1e-6), (-1, 0.5), (-1, 0.95), (7, 0.9)]


def logits_of(kind: str) -> torch.Tensor:
    # Several blocks for a part, and for the cutoff
    long = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(3)) * 2
    normal = long[:, :1500]
    return {
        "long": long,
        "few": normal[:, :7],
        "far": normal - 1000,
        "wide": normal * 1e4,
        "ties": normal.round(),
        "flat": normal * 0,
        "masked": torch.where(torch.arange(1500) % 2 == 0, float("-inf"), normal),
    }[kind].contiguous()


KINDS = ("long", "few", "far", "wide", "ties", "flat", "masked")


def compare() -> None:
    """Every kind of logits at several temperatures, greedy rows among the others: without a filter,
    and under two of them.
    """
    from retool.engine.kernels.cutoff_triton import cutoff_rows
    from retool.engine.kernels.sampling_triton import sample_rows

    for number, kind in enumerate(KINDS):
        logits = logits_of(kind)
        for top_k, top_p in ((-1, 1.0), FILTERS[number - 3], FILTERS[number]):
            temperature = torch.tensor([0.0, 0.3, 1.0, 5.0])
            keys = torch.tensor([seed_key((9, i)) for i in range(4)])
            draws = Draws(
                keys,
                torch.arange(4) * 37,
                temperature,
                torch.full((4,), top_k),
                torch.full((4,), top_p),
            )
            filtered = top_k > 0 or top_p < 1
            said = (kind, top_k, top_p)
            want = sample(logits.clone(), draws, filtered)
            found = sample_rows(logits.clone(), draws, filtered)
            assert torch.equal(found[0], want[0]), said
            size = max(1.0, float(logits[logits > float("-inf")].abs().max()))
            assert float((found[1:] - want[1:]).abs().max()) < 1e-6 * size, said
            if filtered:  # the same tokens are kept
                x = logits * torch.where(temperature == 0, 1.0, 1.0 / temperature)[:, None]
                kept = [
                    (x >= least[:, None]).sum(1)
                    for least in (cutoff(x, draws.top_k, draws.top_p), cutoff_rows(logits, draws))
                ]
                assert torch.equal(*kept), said
    # Many rows, keys and positions of all sizes; among tokens alike the numbers alone decide
    for vocab in (2, 1100):
        generator = torch.Generator().manual_seed(vocab)
        keys, positions = torch.randint(-(2**63), 2**63 - 1, (2, 32), generator=generator)
        draws = Draws(
            keys,
            positions >> torch.arange(0, 64, 2),
            torch.ones(32),
            torch.full((32,), -1),
            torch.ones(32),
        )
        want, found = (draw(torch.zeros(32, vocab), draws, False) for draw in (sample, sample_rows))
        assert torch.equal(found[0], want[0])
        alone = Draws(*(value[9:10] for value in draws))
        assert torch.equal(sample_rows(torch.zeros(1, vocab), alone, False)[:, 0], found[:, 9])
        assert len(set(want[0].tolist())) > 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_draw_what_the_definition_does() -> None:
    interpreted(__name__)
