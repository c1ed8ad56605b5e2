"""What a whole model costs: parameters, and FLOPs of a document.

**Model FLOPs** are those of the mathematics, whatever is recomputed: a multiply-add counts 2,
backward twice the forward.

    matrices    6 FLOPs per token and weight that it is multiplied with: the vocabulary head once,
                tied or not; of experts a token's own; no embedding look-up, norms or biases
    attention   6 · n² · channels per layer, for a document of n tokens: the two products QKᵀ and PV
                are 2 · 2 · n² · channels forward, three times that with backward, and half of it
                under the causal mask. A window of w < n tokens leaves 6 · (2·n·w − w²) · channels

Qwen2.5-0.5B at 16,384 tokens: 494.0M weights give 2.96 GFLOP a token, attention 2.11, together 5.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from retool.model.borrowed.config import BorrowedConfig
from retool.model.borrowed.costs import costs as borrowed_costs
from retool.model.catalogue.families import FAMILIES
from retool.model.config import ModelConfig
from retool.model.layer_costs.cost import LayerCosts

# Tokens: no document is so long
NO_QUADRATIC_LENGTH = 1 << 40
# Tokens times weights of a layer: see `few_tokens`
FEW = 3e10


def layer_costs(config: ModelConfig, sp: int = 1, compiled: bool = True) -> LayerCosts:
    """What a layer costs, as its family says, under `sp` sequence-parallel ranks."""
    if isinstance(config, BorrowedConfig):
        return borrowed_costs(config)  # never compiled, and measured so
    costs = FAMILIES[config.family].costs(config, sp)
    return costs if compiled else costs.as_uncompiled()


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
    pairs = 0  # twice as many as a query meets keys, over all layers
    layers = Counter(config.window(i) for i in range(config.layers))
    for length in lengths:
        tokens += length
        for window, count in layers.items():
            seen = min(window, length) if window else length
            pairs += count * (2 * length * seen - seen * seen)
    matrices = 6.0 * multiplied_parameters(config) * tokens
    attention = 6.0 * layer_costs(config).attention_width * pairs
    return matrices + attention


def few_tokens(config: ModelConfig) -> int:
    """Tokens of a micro-batch that leave a GPU waiting for its host.

    2,000 for 0.5B parameters, 140 for 8B: a quarter of what keeps an H200 busy (measured for 0.5B, in
    inverse proportion to a layer's weights for others).
    """
    return max(1, round(FEW / layer_costs(config).active_parameters))


def quadratic_length(config: ModelConfig) -> int:
    """Tokens of a document whose attention takes as many FLOPs as everything else.

    23,000 for 0.5B parameters, 57,000 for 8B. What a window's layer costs grows with the tokens and
    not with their square: it counts with everything else. Where all layers are such, no document is
    so long.
    """
    width = layer_costs(config).attention_width
    windows = [window for window in config.windows if window]
    whole = config.layers - len(windows)
    if not whole:
        return NO_QUADRATIC_LENGTH
    linear = multiplied_parameters(config) + 2 * width * sum(windows)
    return max(1, round(linear / (whole * width)))
