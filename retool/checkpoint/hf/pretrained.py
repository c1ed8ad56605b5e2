"""A Hugging Face folder → a sharded decoder with its weights, each rank reading only its part."""

from __future__ import annotations

import shlex
from pathlib import Path

from retool.checkpoint.flat.fill import load_flat, require_tied
from retool.checkpoint.flat.state import require_finite, require_same_replicas
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.model.borrowed.read import read_any_config
from retool.model.build import ModelOptions, build_decoder
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh


def load_pretrained(folder: str | Path, mesh: Mesh, options: ModelOptions | None = None) -> Sharded:
    """Build the decoder that `folder/config.json` describes and load its safetensors.

    A collective call.

    Raises ValueError for an unknown model type, a missing shard, missing or misshapen parameters,
    a head of its own where config.json has none, values that aren't finite, and others than another
    replica has.
    """
    options = options or ModelOptions()
    sharded = build_decoder(read_any_config(folder, options.impl), mesh, options)
    source = SafetensorsSource(folder)
    require_tied(sharded.layout, source)
    load_flat(sharded.layout, mesh.shard_rank, source, sharded.master)
    way_out = (
        "Fetch the model again; this lists what is wrong with it: python -m retool.checkpoint verify "
        f"{shlex.quote(str(folder))}"
    )
    require_finite(
        sharded.layout,
        mesh,
        sharded.master,
        f"the weights of {folder} are damaged",
        way_out,
    )
    require_same_replicas(sharded.layout, mesh, sharded.master, str(folder))
    sharded.refresh()
    return sharded
