"""What a causal model of transformers does between its last hidden state and its logits.

Its forward runs on made-up hidden states and a made-up head: what comes out is compared with the
plain product, whatever the fields of its configuration are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retool.model.borrowed.config import why

# Of the made-up hidden states and the made-up vocabulary
TOKENS = 5
WIDTH = 3
ENTRIES = 7
LARGE = 30.0  # about the largest logit: a soft-cap shows there
CLOSE = 1e-4


class _Hidden(nn.Module):
    """In the base model's place: gives one hidden state whatever it is asked."""

    def __init__(self, base: nn.Module, hidden_1tD: Tensor) -> None:
        super().__init__()
        self.hidden = hidden_1tD
        for name, _ in base.named_children():
            # Some call a part of the base model. No module may hold itself as a module
            object.__setattr__(self, name, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import (
            BaseModelOutputWithPastAndCrossAttentions as Outputs,
        )

        del args, kwargs
        return Outputs(last_hidden_state=self.hidden)


def logits_scale(causal: Any) -> float:
    """What the model multiplies its head's product with.

    ValueError where it has no plain head, or does anything else to the logits.
    """
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise ValueError(f"its vocabulary head is no plain matrix ({kind})")
    base = causal.base_model_prefix
    beside = getattr(causal, base, None) is causal.base_model
    places = [name for name, part in causal.named_children() if part is head]
    if len(places) != 1 or not beside:
        raise ValueError("its vocabulary head isn't beside its base model")

    plain = _made_up(head.bias is not None)
    steps = torch.linspace(-1, 1, TOKENS * WIDTH)
    hidden = steps.sin().view(1, TOKENS, WIDTH)
    source = _Hidden(causal.base_model, hidden)
    with torch.no_grad():
        expected = plain(hidden)
        found = _with_parts(causal, {places[0]: plain, base: source})
    return _factor(causal, found, expected)


def _factor(causal: Any, found: Tensor, expected: Tensor) -> float:
    """By which the logits found differ from those expected."""
    products = (found * expected).sum()
    scale = float(products / expected.square().sum())
    scaled = expected * scale
    if not scale > 0 or not torch.allclose(found, scaled, CLOSE, CLOSE):
        cap = getattr(causal.config, "final_logit_softcapping", None)
        named = "" if cap is None else f" (final_logit_softcapping={cap})"
        raise ValueError(f"it changes its logits by more than a factor{named}")
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale


def _made_up(bias: bool) -> nn.Linear:
    linear = nn.Linear(WIDTH, ENTRIES, bias=bias)
    values = torch.arange(ENTRIES * WIDTH).cos()
    with torch.no_grad():
        linear.weight.copy_(LARGE * values.view(ENTRIES, WIDTH))
        if bias:
            linear.bias.copy_(torch.arange(ENTRIES).sin())
    return linear


def _with_parts(causal: Any, parts: dict[str, nn.Module]) -> Tensor:
    """The logits of the model's own forward while modules in `parts` are in their places."""
    before = {name: getattr(causal, name) for name in parts}
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    try:
        for name, module in parts.items():
            setattr(causal, name, module)
        return causal(input_ids=ids, use_cache=False).logits
    except Exception as error:  # its own code on parts that it doesn't know
        problem = f"what it does to its logits can't be found out ({why(error)})"
        raise ValueError(problem) from error
    finally:
        for name, module in before.items():
            setattr(causal, name, module)
