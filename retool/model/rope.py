"""Rotary position embedding (Su et al., arXiv 2104.09864), with the scalings of longer contexts:
linear, Llama 3.1's and YaRN.

Channel i of a head turns with channel i + H/2, which is Hugging Face's convention.

Legend: t tokens of this rank · N heads · H head dim · C = H/2 pairs of channels.
"""

from __future__ import annotations

import math

import torch

from retool.model.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Radians that each pair of channels turns per position, fp32 [H/2]."""
    even = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inverse_C = 1.0 / config.rope_theta ** (even / config.head_dim)
    match config.rope_scaling:
        case None:
            return inverse_C
        case LinearScaling(factor):
            return inverse_C / factor
        case Llama3Scaling() as scaling:
            return _llama3(inverse_C, scaling)
        case YarnScaling() as scaling:
            return _yarn(inverse_C, scaling, config)


def _llama3(inverse_C: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's: slow pairs are divided by `factor`, fast ones stay, with a ramp between them.

    A pair's place on the ramp, 0 to 1, is given by how often it turns within the original length.
    """
    wavelength = 2 * math.pi / inverse_C
    turns = scaling.original_max_position / wavelength
    width = scaling.high_freq_factor - scaling.low_freq_factor
    ramp = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    return (1 - ramp) * inverse_C / scaling.factor + ramp * inverse_C


def _yarn(inverse_C: torch.Tensor, scaling: YarnScaling, config: ModelConfig) -> torch.Tensor:
    """YaRN's (section 3.2, "NTK-by-parts"): as Llama 3.1's, but the ramp goes by channel, between
    those that turn `beta_fast` and `beta_slow` times within the original length.
    """

    def channel(turns: float) -> float:
        """The channel that turns so often: theta^(channel / H) · 2π · turns = the length."""
        stretch = scaling.original_max_position / (2 * math.pi * turns)
        return config.head_dim * math.log(stretch) / (2 * math.log(config.rope_theta))

    first = channel(scaling.beta_fast)
    last = channel(scaling.beta_slow)
    if scaling.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, config.head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp, as transformers makes it
    pairs = torch.arange(len(inverse_C), device=inverse_C.device, dtype=torch.float32)
    slow_C = ((pairs - first) / (last - first)).clamp(0, 1)
    return inverse_C / scaling.factor * slow_C + inverse_C * (1 - slow_C)


def rope_tables(
    positions_t: torch.Tensor, inverse_C: torch.Tensor, config: ModelConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin of every layer, fp32 [t, H/2] each.

    Angles are taken in fp32 as transformers does, whatever the compute dtype. A layer without rope
    turns by nothing. What scales attention's scores goes into the tables, half of it to the
    queries and half to the keys: YaRN's factor is meant so, and the kernels know of no other.
    """
    angles_tC = positions_t.to(torch.float32)[:, None] * inverse_C
    scaling = config.rope_scaling
    scale = math.sqrt(config.score_scale)
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    turned = _times(scale * factor, angles_tC.cos(), angles_tC.sin())
    if not config.unrotated:
        return [turned] * config.layers
    unturned = _times(scale, torch.ones_like(angles_tC), torch.zeros_like(angles_tC))
    return [unturned if i in config.unrotated else turned for i in range(config.layers)]


def _times(
    factor: float, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x_tNH: torch.Tensor, cos_tC: torch.Tensor, sin_tC: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of channels (i, i + H/2) of every head.

    Computed in at least fp32; the result keeps that precision.
    """
    x_tNH = x_tNH.to(torch.promote_types(x_tNH.dtype, torch.float32))
    cos = cos_tC[:, None].to(x_tNH.dtype)
    sin = sin_tC[:, None].to(x_tNH.dtype)
    first, second = x_tNH.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
