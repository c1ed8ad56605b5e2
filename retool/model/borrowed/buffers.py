"""Values of a borrowed model's buffers, such as rope's frequencies: they are in no file.

transformers computes them where it loads weights; the module here was made on the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def fill_buffers(causal: Any, device: torch.device) -> None:
    """Give every buffer its value, on `device`. The parameters stay on the meta device.

    ValueError names a buffer that transformers gives none.
    """
    for place, module in causal.named_modules():
        buffers = module._buffers
        there = [name for name, buffer in buffers.items() if buffer is not None]
        if not there:
            continue
        for name in there:
            buffers[name] = _unset(buffers[name])
        with torch.no_grad():
            causal._init_weights(module)
        for name in there:
            if _is_unset(buffers[name]):
                raise ValueError(
                    f"{place}.{name} is in no file, and transformers doesn't say its values. "
                    "Use another model."
                )
            buffers[name] = buffers[name].to(device)


def _unset(buffer: Tensor) -> Tensor:
    """Not numbers yet, where there is such a thing: what stays so is found."""
    empty = torch.zeros_like(buffer, device=CPU)
    return empty.fill_(torch.nan) if buffer.is_floating_point() else empty


def _is_unset(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and bool(buffer.isnan().any())
