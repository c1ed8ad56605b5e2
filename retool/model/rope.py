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
    RopeScaling,
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

    `beyond`: LongRoPE's, for documents longer than the original length. `windowed`: of the layers
    with a window, where they have a rope of their own.
    """

    within: torch.Tensor
    beyond: torch.Tensor | None = None
    windowed: torch.Tensor | None = None


def frequencies(config: ModelConfig, device: torch.device) -> Frequencies:
    """What turns a model's keys, made once."""
    channels = config.turned_channels
    even = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
    within = _scaled(even, config.rope_theta, config.rope_scaling)
    beyond = None
    if isinstance(config.rope_scaling, LongScaling):
        long = torch.tensor(config.rope_scaling.long, dtype=torch.float32, device=device)
        beyond = 1.0 / (long * config.rope_theta**even)
    windowed = None
    if config.window_rope is not None:
        windowed = _scaled(even, *config.window_rope)
    return Frequencies(within, beyond, windowed)


def _scaled(even_C: torch.Tensor, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Frequencies [C] of documents up to the original length; `even` is 0, 2/R, 4/R, …"""
    turns_C = theta**even_C
    inverse_C = 1.0 / turns_C
    match scaling:
        case None | DynamicScaling():
            return inverse_C
        case LinearScaling(factor):
            return inverse_C / factor
        case Llama3Scaling():
            return _llama3(inverse_C, scaling)
        case YarnScaling():
            return _yarn(inverse_C, scaling, theta)
        case LongScaling():
            short = torch.tensor(scaling.short, dtype=torch.float32, device=even_C.device)
            return 1.0 / (short * turns_C)


def _llama3(inverse_C: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's: slow pairs are divided by `factor`, fast ones stay, with a ramp between them.

    A pair's place on the ramp, 0 to 1, is given by how often it turns within the original length.
    """
    wavelength = 2 * math.pi / inverse_C
    turns = scaling.original_max_position / wavelength
    width = scaling.high_freq_factor - scaling.low_freq_factor
    ramp = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    return (1 - ramp) * inverse_C / scaling.factor + ramp * inverse_C


def _yarn(inverse_C: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    """YaRN's (section 3.2, "NTK-by-parts"): as Llama 3.1's, but the ramp goes by channel, between
    those that turn `beta_fast` and `beta_slow` times within the original length.
    """

    channels = 2 * len(inverse_C)

    def channel(turns: float) -> float:
        """The channel that turns so often: theta^(channel / R) · 2π · turns = the length."""
        stretch = scaling.original_max_position / (2 * math.pi * turns)
        return channels * math.log(stretch) / (2 * math.log(theta))

    first = channel(scaling.beta_fast)
    last = channel(scaling.beta_slow)
    if scaling.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, channels - 1)
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
    scale = math.sqrt(config.score_scale)
    turned = _table(positions_t, inverse, scale * _factor(config.rope_scaling))
    windowed = turned
    if found.windowed is not None and config.window_rope is not None:
        factor = scale * _factor(config.window_rope[1])
        windowed = _table(positions_t, found.windowed, factor)
    unturned = turned
    if config.unrotated:
        # cos 1 and sin 0, times what the scores are scaled with all the same
        unturned = _table(positions_t, torch.zeros_like(found.within), scale)
    tables = [windowed if config.window(i) else turned for i in range(config.layers)]
    return [unturned if i in config.unrotated else table for i, table in enumerate(tables)]


def document_lengths(batch: PackedBatch, rank: int) -> torch.Tensor:
    """The length of each token's document, [t] on sequence-parallel rank `rank`."""
    lengths = batch.cu_seqlens.diff()
    # The host knows how many they are: nothing waits for the device
    whole_T = torch.repeat_interleave(lengths, lengths, output_size=sum(batch.seqlens))
    t = len(batch.positions)
    if batch.alone:
        return whole_T
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


def _factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied with for the context's length."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongScaling) else 1.0


def _table(
    positions_t: torch.Tensor, inverse: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [t, C] of a rope, times `factor`."""
    angles_tC = positions_t.to(torch.float32)[:, None] * inverse
    cos = angles_tC.cos()
    sin = angles_tC.sin()
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
