"""What a whole model costs: parameters, and FLOPs of a document.

**Model FLOPs** are those of the mathematics, whatever is recomputed: a multiply-add counts 2,
backward twice the forward.

    matrices    6 FLOPs per token and weight that it is multiplied with: the vocabulary head once,
                tied or not; of experts a token's own; no embedding look-up, norms or biases
    attention   6 · n² · channels per layer, for a document of n tokens: the two products QKᵀ and PV
                are 2 · 2 · n² · channels forward, three times that with backward, and half of it
                under the causal mask

Qwen2.5-0.5B at 16,384 tokens: 494.0M weights give 2.96 GFLOP a token, attention 2.11, together 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable

from retool.model.config import ModelConfig
from retool.model.families.layer_costs import LayerCosts
from retool.model.families.read import FAMILIES


def layer_costs(config: ModelConfig, sp: int = 1) -> LayerCosts:
    """What a layer costs, as its family says, under `sp` sequence-parallel ranks."""
    return FAMILIES[config.family].costs(config, sp)


def multiplied_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: all matrices but an untied embedding and the experts
    of other tokens.
    """
    return config.layers * layer_costs(config).active_parameters + config.vocab * config.hidden


def parameter_count(config: ModelConfig) -> int:
    """Parameters, but for norms and biases (less than one in a thousand)."""
    tables = 1 if config.tied else 2
    return config.layers * layer_costs(config).parameters + tables * config.vocab * config.hidden


def model_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Training FLOPs (forward and backward) of documents of these lengths.

    Padding is not a document: leave it out.
    """
    tokens = 0
    squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    matrices = 6.0 * multiplied_parameters(config) * tokens
    attention = 6.0 * config.layers * layer_costs(config).attention_width * squares
    return matrices + attention


def quadratic_length(config: ModelConfig) -> int:
    """Tokens of a document whose attention takes as many FLOPs as everything else.

    23,000 for 0.5B parameters, 57,000 for 8B.
    """
    channels = config.layers * layer_costs(config).attention_width
    return max(1, round(multiplied_parameters(config) / channels))
