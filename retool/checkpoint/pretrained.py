"""A Hugging Face folder → a sharded decoder with its weights, each rank reading only its part."""

from __future__ import annotations

from pathlib import Path

from retool.checkpoint.hf import SafetensorsSource
from retool.checkpoint.source import load_flat
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import read_model_config
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh


def load_pretrained(folder: str | Path, mesh: Mesh, options: ModelOptions | None = None) -> Sharded:
    """Build the decoder that `folder/config.json` describes and load its safetensors.

    Raises ValueError for an unknown model type, a missing shard, and missing or misshapen parameters.
    """
    sharded = build_decoder(read_model_config(folder), mesh, options or ModelOptions())
    load_flat(sharded.layout, mesh.shard_rank, SafetensorsSource(folder), sharded.master)
    sharded.refresh()
    return sharded
