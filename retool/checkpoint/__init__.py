"""Checkpoints: sharded files that any world size resumes from, Hugging Face folders in and out."""

from retool.checkpoint.flat.fill import TensorSource, load_flat
from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.checkpoint.read import Loaded, load
from retool.checkpoint.resume import latest, load_whole
from retool.checkpoint.staging import Staging
from retool.checkpoint.types import PendingSave, SaveOptions, SaveResult, TrainingState
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
    "TrainingState",
    "latest",
    "load",
    "load_flat",
    "load_whole",
    "save",
]
