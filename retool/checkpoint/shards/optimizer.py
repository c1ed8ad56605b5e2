"""What the optimizer files hold besides moments: which state belongs to which parameter, the number
of updates, and hyperparameters.
"""

from __future__ import annotations

from typing import Any

from retool.checkpoint.format.stored_tensors import StoredTensor
from retool.checkpoint.format.torch_file import WAY_OUT, TorchFile
from retool.checkpoint.shards.files import Shards, require_dict
from retool.checkpoint.shards.states import MOST_STEPS
from retool.model.hf.names import HEAD

MOST_PARAMETERS = 1 << 20
MOST_BETAS = 8  # numbers in one hyperparameter


def parameter_indices(optim: Shards) -> dict[str, int]:
    """Parameter name → its index in the optimizer's state.

    From the names in the file where it has them (ours does). Else the parameters are the model
    file's entries in order, without a tied head, which is the same parameter as the embedding and
    has no state of its own.
    """
    file = optim.file(0)
    states = optim.states(0)
    indices, names = _grouped_parameters(file)
    if not names:
        # verl's files have no names: the order of the model file is that of the parameters.
        names = list(Shards(optim.folder, "model").entries(0))
        # A tied head stands in the model file, and has no state of its own.
        if len(names) == len(indices) + 1 and HEAD in names:
            names.remove(HEAD)
    sound = all(isinstance(name, str) for name in names)
    sound = sound and all(type(index) is int for index in indices)
    if not sound or len(names) != len(indices) or len(set(names)) != len(names):
        raise ValueError(
            f"{file.path}: {len(indices)} optimizer states for {len(names)} parameters; which "
            "belongs to which can't be told. Start a new run from its weights (python -m "
            "retool.checkpoint merge)."
        )
    pairs = zip(names, indices, strict=True)
    return {name: index for name, index in pairs if index in states}


def _grouped_parameters(file: TorchFile) -> tuple[list[Any], list[Any]]:
    """The indices and the names (none in other programs' files) of all parameter groups, one after
    the other.
    """
    indices: list[Any] = []
    names: list[Any] = []
    for group in _groups(file):
        indices += _listed(file, group.get("params"))
        names += _listed(file, group.get("param_names", []))
        if max(len(indices), len(names)) > MOST_PARAMETERS:
            raise ValueError(
                f"{file.path}: more than {MOST_PARAMETERS} parameters in its param_groups. {WAY_OUT}"
            )
    return indices, names


def _groups(file: TorchFile) -> list[dict[Any, Any]]:
    content = require_dict(file, file.content)
    groups = _listed(file, content.get("param_groups"))
    return [require_dict(file, group) for group in groups]


def _listed(file: TorchFile, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{file.path}: its param_groups are not AdamW's. {WAY_OUT}")
    return value


def optimizer_steps(optim: Shards, rank: int) -> dict[int, int]:
    """Parameter's index → the number of updates that a rank's optimizer file records for it.
    Parameters without a record are left out.
    """
    file = optim.file(rank)
    counts: dict[int, int] = {}
    for index, state in optim.states(rank).items():
        step = require_dict(file, state).get("step")
        if isinstance(step, StoredTensor) and step.numel == 1:
            step = file.value(step).double().item()
        if step is None:
            continue
        if not isinstance(step, (int, float)) or not 0 <= step < MOST_STEPS:
            raise ValueError(
                f"{file.path}: the step of parameter {index} is no number of updates. {WAY_OUT}"
            )
        counts[index] = int(step)
    return counts


def optimizer_step(optim: Shards) -> int:
    """The number of updates that the optimizer of a checkpoint has made."""
    return next(iter(optimizer_steps(optim, 0).values()), 0)


def parameter_group(optim: Shards) -> dict[str, Any]:
    """AdamW's hyperparameters: the plain numbers of the first parameter group."""
    group = next(iter(_groups(optim.file(0))), {})
    hyperparameters: dict[str, Any] = {}
    for key, value in group.items():
        of_parameters = key in ("params", "param_names")
        if isinstance(key, str) and not of_parameters and _is_plain(value):
            hyperparameters[key] = value
    return hyperparameters


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        numbers = all(isinstance(part, (int, float)) for part in value)
        return numbers and len(value) <= MOST_BETAS
    return value is None or isinstance(value, (str, int, float))
