"""The documents of the SFT benchmarks, the same for every system that is measured. It needs numpy
alone: the peers run in Pythons of their own.

*full*: 16 documents of 16,384 tokens a step. *mixed*: 64 documents, lengths lognormal (median
3,200, σ 0.7, clipped to 256…16,384). *4096*: 64 documents of 4,096 tokens, *few*: 16 of them.
"""

from __future__ import annotations

import numpy as np

STEPS = 8
DOCUMENTS = {"full": 16, "mixed": 64, "4096": 64, "few": 16}  # of a step
COUNTED = slice(3, 8)
LONGEST = 16_384
VOCABULARY = 150_000


def lengths_of(workload: str, steps: int = STEPS, scale: int = 1) -> np.ndarray:
    """Tokens of each document, in order; `scale` divides them, for a look on a small machine."""
    count = DOCUMENTS[workload]
    if workload == "mixed":
        drawn = np.random.default_rng(0).normal(np.log(3_200), 0.7, count * STEPS)
        lengths = np.clip(np.exp(drawn), 256, LONGEST)[: count * steps]
    else:
        lengths = np.full(count * steps, LONGEST if workload == "full" else 4_096)
    return np.maximum(lengths.astype(np.int64) // scale, 2)


def documents_of(lengths: np.ndarray, vocabulary: int) -> list[np.ndarray]:
    """Random token ids."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, min(vocabulary, VOCABULARY), n).astype(np.int32) for n in lengths]
