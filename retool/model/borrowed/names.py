"""What the files of a borrowed model call its parameters: transformers' own names, but for those
that it renames where it reads and writes.
"""

from __future__ import annotations

from typing import Any

import torch


def names_on_disk(causal: Any) -> dict[str, str]:
    """Name of a parameter of the module → its name in files, in the module's order.

    A tied parameter has all of its names. ValueError where files hold something else than the
    parameters.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # A tensor of its own for each name, by which it is known again
    marks: dict[str, torch.Tensor] = {}
    every = causal.named_parameters(remove_duplicate=False)
    for name, parameter in every:
        shape = parameter.shape
        marks[name] = torch.empty(shape, device="meta")
    written: dict[str, torch.Tensor]
    written = revert_weight_conversion(causal, dict(marks))
    stored = {id(mark): name for name, mark in written.items()}
    names: dict[str, str] = {}
    for name, mark in marks.items():
        if id(mark) not in stored:
            problem = f"its files hold {name} in another form"
            raise ValueError(f"{problem} than it computes with")
        names[name] = stored[id(mark)]
    return names
