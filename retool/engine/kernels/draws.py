"""What a row's random draw depends on, and its random numbers: shared by the samplers in torch and
in Triton.

The numbers are a counter through SplitMix64's mixer (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

from operator import index
from typing import NamedTuple

from torch import Tensor

# Tokens whose share of a row is summed up before one of them is drawn. Another number, other draws
BLOCK = 512

# SplitMix64's increment and multipliers, as signed 64-bit integers: torch has no others
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
MASK = (1 << 64) - 1


class Draws(NamedTuple):
    """Per row [R]: `keys` of the seeds (int64), `positions` that the drawn tokens will have (int64),
    `temperature` (float32), `top_k` (int64), `top_p` (float32).
    """

    keys: Tensor
    positions: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def seed_key(seed: tuple[int, ...]) -> int:
    """A signed 64-bit key of a seed; every element and their order count."""
    key = len(seed)
    # numpy's numbers have no room for more than 64 bits
    for part in map(index, seed):
        key = _mixed_int((key + (part & MASK) + GOLDEN) & MASK) ^ (part >> 64 & MASK)
    return key - (1 << 64) if key >= 1 << 63 else key


def _mixed_int(z: int) -> int:
    """SplitMix64's output function."""
    z = ((z ^ (z >> 30)) * (FIRST & MASK)) & MASK
    z = ((z ^ (z >> 27)) * (SECOND & MASK)) & MASK
    return z ^ (z >> 31)
