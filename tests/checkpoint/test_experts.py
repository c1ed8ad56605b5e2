"""Experts' matrices by the names of each and by fused ones; checkpoints of them, and what
transformers loads of that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retool import checkpoint
from retool.checkpoint.flat.fill import load_flat
from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.checkpoint.merge import merge
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.types import TrainingState
from retool.model.build import plan_layout
from retool.model.catalogue.families import read_model_config
from retool.parallel.mesh import make_mesh
from tests.model.tiny import make

FAMILIES = ("qwen3_moe", "olmoe")


def fuse(folder: Path) -> None:
    """Write the folder's weights again, with all experts of a layer in one tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors")


def shard(folder: Path, shards: int, rank: int) -> torch.Tensor:
    layout = plan_layout(read_model_config(folder), shards)
    out = torch.full((layout.shard_numel,), float("nan"))
    load_flat(layout, rank, SafetensorsSource(folder), out)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_names_are_read_as_those_of_each_expert(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    ranks = [(1, 0), (3, 0), (3, 1), (3, 2)]
    each = [shard(tmp_path, *place) for place in ranks]
    fuse(tmp_path)
    for place, wanted in zip(ranks, each, strict=True):
        assert torch.equal(shard(tmp_path, *place), wanted)


def test_a_fused_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe")
    fuse(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    whole = state[name]
    alone = "model.layers.1.mlp.experts.3.down_proj.weight"
    wrong = {
        r"layers\.1\.mlp\.experts\.down_proj is \[8, 32, 48\], the model has": {
            name: whole.transpose(1, 2).contiguous()
        },
        r"layers\.1\.mlp\.experts\.down_proj is quantised \(int8\)": {name: whole.to(torch.int8)},
        r"experts\.3\.down_proj\.weight is there twice: by itself, and in .*\.experts\.down_proj": {
            name: whole,
            alone: whole[3].clone(),
        },
    }
    for told, tensors in wrong.items():
        save_file(state | tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=told):
            load_pretrained(tmp_path, make_mesh())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_a_checkpoint_merges_to(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    reference = make(source, family)
    mesh = make_mesh()
    model = load_pretrained(source, mesh)
    moments = (torch.zeros_like(model.master), torch.zeros_like(model.master))
    state = ModelState(model.layout, model.master, *moments, updates=1)
    done = checkpoint.save(tmp_path, state, mesh, TrainingState(1), model_folder=source)
    assert done.wait().error is None
    merge(done.folder, tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(done.folder / "huggingface")
    for name, wanted in reference.state_dict().items():
        assert torch.equal(merged.state_dict()[name], wanted), name
        assert torch.equal(exported.state_dict()[name], wanted.bfloat16()), name
    # And any number of ranks resumes it
    layout = plan_layout(read_model_config(source), 2)
    again = torch.empty(layout.shard_numel)
    load_flat(layout, 1, ShardSource(done.folder), again)
    assert torch.equal(again, shard(source, 2, 1))
