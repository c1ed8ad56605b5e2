"""Rotary position embedding (Su et al., arXiv 2104.09864), with the scalings of longer contexts:
linear, dynamic NTK, Llama 3.1's, YaRN and LongRoPE.

Channel i of the R that are turned goes with channel i + R/2, which is Hugging Face's convention.

[Note: rope that depends on the length] LongRoPE and dynamic NTK turn a document's keys by other
angles once it is longer than the model's original length. Here each document of a pack has what its
own length asks for, as if it were alone. transformers looks at the longest of a batch, and with
dynamic NTK at the longest it has seen before. While a sequence is being sampled its length isn't
known yet, so the engine ends it at `ModelConfig.steady_length`.

Legend: t tokens of this rank · N heads · H head dim · R turned channels · C = R/2 pairs of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from retool.batch import PackedBatch
from retool.model.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ModelConfig,
    YarnScaling,
)


def too_long_to_sample(config: ModelConfig, tokens: int) -> str:
    """Why the engine takes no sequence of so many tokens, and the way out; empty where it does."""
    steady = config.steady_length
    if not steady or tokens <= steady:
        return ""
    alike = "give the model's rope other fields: linear or yarn"
    if isinstance(config.rope_scaling, LongScaling):
        alike = "give short_factor the numbers of long_factor in the model's config.json"
    return (
        f"{tokens:,} tokens are more than {steady:,}: beyond them this model's rope turns all keys by "
        f"other angles, and those in a cache stay as they are. Sample no more, or {alike}."
    )


class Frequencies(NamedTuple):
    """Radians that each pair of channels turns per position, fp32 [C].

    `beyond`: LongRoPE's, for documents longer than the original length.
    """

    within: torch.Tensor
    beyond: torch.Tensor | None = None


def frequencies(config: ModelConfig, device: torch.device) -> Frequencies:
    """What turns a model's keys, made once."""
    even = torch.arange(0, config.turned_channels, 2, device=device, dtype=torch.float32)
    turns_C = config.rope_theta ** (even / config.turned_channels)
    inverse_C = 1.0 / turns_C
    match config.rope_scaling:
        case None | DynamicScaling():
            return Frequencies(inverse_C)
        case LinearScaling(factor):
            return Frequencies(inverse_C / factor)
        case Llama3Scaling() as scaling:
            return Frequencies(_llama3(inverse_C, scaling))
        case YarnScaling() as scaling:
            return Frequencies(_yarn(inverse_C, scaling, config))
        case LongScaling() as scaling:
            short = torch.tensor(scaling.short, dtype=torch.float32, device=device)
            long = torch.tensor(scaling.long, dtype=torch.float32, device=device)
            return Frequencies(1.0 / (short * turns_C), 1.0 / (long * turns_C))


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
        """The channel that turns so often: theta^(channel / R) · 2π · turns = the length."""
        stretch = scaling.original_max_position / (2 * math.pi * turns)
        return config.turned_channels * math.log(stretch) / (2 * math.log(config.rope_theta))

    first = channel(scaling.beta_fast)
    last = channel(scaling.beta_slow)
    if scaling.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, config.turned_channels - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp, as transformers makes it
    pairs = torch.arange(len(inverse_C), device=inverse_C.device, dtype=torch.float32)
    slow_C = ((pairs - first) / (last - first)).clamp(0, 1)
    return inverse_C / scaling.factor * slow_C + inverse_C * (1 - slow_C)


def rope_tables(
    positions_t: torch.Tensor,
    found: Frequencies,
    config: ModelConfig,
    lengths_t: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin of every layer, fp32 [t, C] each.

    `lengths_t`: the length of each token's document, where the model has a `steady_length` (None:
    no document is longer than that). Angles are taken in fp32 as transformers does, whatever the
    compute dtype. A layer without rope turns by nothing. What scales attention's scores goes into
    the tables, half of it to the queries and half to the keys: the factors of YaRN and LongRoPE are
    meant so, and the kernels know of no other.
    """
    inverse = _by_length(found, config, lengths_t)
    angles_tC = positions_t.to(torch.float32)[:, None] * inverse
    scale = math.sqrt(config.score_scale)
    turned = _times(scale * _factor(config), angles_tC.cos(), angles_tC.sin())
    if not config.unrotated:
        return [turned] * config.layers
    unturned = _times(scale, torch.ones_like(angles_tC), torch.zeros_like(angles_tC))
    return [unturned if i in config.unrotated else turned for i in range(config.layers)]


def document_lengths(batch: PackedBatch, rank: int) -> torch.Tensor:
    """The length of each token's document, [t] on sequence-parallel rank `rank`."""
    lengths = batch.cu_seqlens.diff()
    # The host knows how many they are: nothing waits for the device
    whole_T = torch.repeat_interleave(lengths, lengths, output_size=sum(batch.seqlens))
    t = len(batch.positions)
    return whole_T[rank * t : (rank + 1) * t]


def _by_length(
    found: Frequencies, config: ModelConfig, lengths_t: torch.Tensor | None
) -> torch.Tensor:
    """[C], or [t, C] where documents differ. See [Note: rope that depends on the length]."""
    if lengths_t is None:
        return found.within
    match config.rope_scaling:
        case LongScaling() as scaling if found.beyond is not None:
            is_long = lengths_t > scaling.original_max_position
            return torch.where(is_long[:, None], found.beyond, found.within)
        case DynamicScaling() as scaling:
            channels = config.turned_channels
            length = lengths_t.clamp(min=scaling.original_max_position).to(torch.float32)
            stretch = scaling.factor * length / scaling.original_max_position - (scaling.factor - 1)
            theta_t = config.rope_theta * stretch ** (channels / (channels - 2))
            even = torch.arange(0, channels, 2, device=length.device, dtype=torch.float32)
            return 1.0 / theta_t[:, None] ** (even / channels)
        case _:
            return found.within


def _factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied with for the context's length."""
    match config.rope_scaling:
        case YarnScaling() | LongScaling() as scaling:
            return scaling.attention_factor
        case _:
            return 1.0


def _times(
    factor: float, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x_tNH: torch.Tensor, cos_tC: torch.Tensor, sin_tC: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of channels (i, i + C) of every head; those behind 2·C stay as they are.

    Computed in at least fp32; the result keeps that precision.
    """
    x_tNH = x_tNH.to(torch.promote_types(x_tNH.dtype, torch.float32))
    cos = cos_tC[:, None].to(x_tNH.dtype)
    sin = sin_tC[:, None].to(x_tNH.dtype)
    pairs = cos.shape[-1]
    if 2 * pairs == x_tNH.shape[-1]:
        first, second = x_tNH.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    first, second, rest = x_tNH.split([pairs, pairs, x_tNH.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
