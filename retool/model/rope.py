"""Rotary position embedding (Su et al., arXiv 2104.09864), with Llama 3.1's scaling.

Channel i of a head turns with channel i + H/2, which is Hugging Face's convention.

Legend: t tokens of this rank · N heads · H head dim · C = H/2 pairs of channels.
"""

from __future__ import annotations

import math

import torch

from retool.model.config import Llama3Scaling, ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Radians that each pair of channels turns per position, fp32 [H/2]."""
    even = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inverse = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling is None:
        return inverse
    return _scaled(inverse, config.rope_scaling)


def _scaled(inverse_C: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's: slow pairs are divided by `factor`, fast ones stay, with a ramp between them.

    A pair's place on the ramp, 0 to 1, is given by how often it turns within the original length.
    """
    wavelength = 2 * math.pi / inverse_C
    turns = scaling.original_max_position / wavelength
    width = scaling.high_freq_factor - scaling.low_freq_factor
    ramp = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    return (1 - ramp) * inverse_C / scaling.factor + ramp * inverse_C


def rope_tables(
    positions_t: torch.Tensor, inverse_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [t, H/2] each.

    Angles are taken in fp32 as transformers does, whatever the compute dtype.
    """
    angles_tC = positions_t.to(torch.float32)[:, None] * inverse_C
    return angles_tC.cos(), angles_tC.sin()


def rotate(x_tNH: torch.Tensor, cos_tC: torch.Tensor, sin_tC: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of channels (i, i + H/2) of every head.

    Computed in at least fp32; the result keeps that precision.
    """
    x_tNH = x_tNH.to(torch.promote_types(x_tNH.dtype, torch.float32))
    cos = cos_tC[:, None].to(x_tNH.dtype)
    sin = sin_tC[:, None].to(x_tNH.dtype)
    first, second = x_tNH.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
