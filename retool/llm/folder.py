"""The name that a user gives a model → the folder with its weights."""

from __future__ import annotations

import shlex
from pathlib import Path

from retool.checkpoint.format.folder import model_folder
from retool.checkpoint.format.tracker import candidates
from retool.model.hub import find_model
from retool.preflight.resume import export_of


def model_of(name: str | Path) -> Path:
    """A model's folder as it is; of a run's folder the model of its newest checkpoint that has one;
    of a checkpoint's folder its model; a hub id's copy on this machine.

    ValueError where there is none, with the command that makes one.
    """
    folder = find_model(str(name))
    if (folder / "config.json").is_file():
        return folder
    found = candidates(folder, say=False)
    exported = next(filter(None, map(export_of, found)), None) or export_of(folder)
    if exported is not None:
        return exported
    newest = found[0] if found else folder
    if not any(model_folder(newest).glob("model_world_size_*.pt")):
        raise ValueError(
            f"{folder} holds no model: it has no config.json, and no checkpoint of a run. Give a "
            "Hugging Face model folder, or the folder of a run."
        )
    raise ValueError(
        f"{newest} has no model that can be loaded (it was saved without hf_model). This makes one: "
        f"python -m retool.checkpoint merge {shlex.quote(str(newest))} --out DIR"
    )
