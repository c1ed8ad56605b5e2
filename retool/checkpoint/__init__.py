"""Checkpoints: sharded files that any world size resumes from, Hugging Face folders in and out."""

from retool.checkpoint.format.source import ModelState, TensorSource, load_flat
from retool.checkpoint.hf.folder import SafetensorsSource
from retool.checkpoint.read import Loaded, load
from retool.checkpoint.staging import PendingSave, SaveOptions, SaveResult, Staging
from retool.checkpoint.whole import latest, load_whole
from retool.checkpoint.write import save

__all__ = [
    "Loaded",
    "ModelState",
    "PendingSave",
    "SafetensorsSource",
    "SaveOptions",
    "SaveResult",
    "Staging",
    "TensorSource",
    "latest",
    "load",
    "load_flat",
    "load_whole",
    "save",
]
