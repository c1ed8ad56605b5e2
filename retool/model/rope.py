"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's half-split convention,
with Llama 3.1's scaling.
"""

from __future__ import annotations

import math

import torch

from retool.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Rotation per position of each pair of channels, fp32 [H/2]."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inverse = 1.0 / config.rope_theta ** (half / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    ramp = (s.original_max_position / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * inverse / s.factor + ramp * inverse


def rope_tables(
    positions_t: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [t, H/2] each: angles are taken in fp32 as transformers does, whatever the
    compute dtype.
    """
    angles = positions_t.to(torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotate(x_tNH: torch.Tensor, cos_tC: torch.Tensor, sin_tC: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (i, i + H/2).

    Computed in at least fp32; the result keeps that precision.
    """
    x = x_tNH.to(torch.promote_types(x_tNH.dtype, torch.float32))
    a, b = x.chunk(2, -1)
    cos = cos_tC[:, None].to(x.dtype)
    sin = sin_tC[:, None].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
