"""Weights that aren't numbers, or aren't the model's: refused while loading, on every rank, and
found by `verify`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from retool import checkpoint
from retool.batch import pack
from retool.checkpoint.__main__ import main
from retool.checkpoint.flat.state import sum_of
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.model.catalogue.families import read_model_config
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.model.test_decoder import logits, relative, sample
from tests.model.tiny import make
from tests.ranks import run_ranks

EMBEDDING = "model.embed_tokens.weight"


def edit(folder: Path, **values: torch.Tensor | None) -> None:
    """Put tensors into a model's file, or take them out."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil(folder: Path, name: str, place: int, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor.view(-1)[place] = value
    edit(folder, **{name: tensor})


def refusal(folder: str) -> str:
    try:
        load_pretrained(folder, make_mesh())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("model.norm.weight", 3, float("nan")),
        (EMBEDDING, 0, float("inf")),
        ("model.layers.2.mlp.down_proj.weight", -1, -float("inf")),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, name: str, place: int, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a model"
    make(folder, "qwen2")
    assert main(["verify", str(folder)]) == 0 and not refusal(str(folder))
    capsys.readouterr()
    spoil(folder, name, place, value)
    said = refusal(str(folder))
    assert name in said and str(folder) in said
    _, _, command = said.partition("python -m retool.checkpoint ")
    assert main(shlex.split(command)) == 1
    assert f"{name} has 1 values that are not finite" in capsys.readouterr().out


def test_every_rank_refuses_what_one_of_them_would_read(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    spoil(tmp_path, "lm_head.weight", -1, float("nan"))
    first, second = run_ranks(refusal, 2, str(tmp_path))
    assert first == second and "lm_head.weight" in first


def copies_refused(folders: list[str]) -> list[str]:
    """What is said where this rank, a replica, has a copy of its own, and where it has the other's."""
    mine = folders[int(os.environ["RANK"])]
    said = list[str]()
    for folder in (mine, folders[0]):
        try:
            load_pretrained(folder, make_mesh(fsdp_size=1))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_replicas_begin_with_the_same_weights(tmp_path: Path) -> None:
    """Two machines' copies of a model differ in one bit, far from what preflight compares."""
    folders = [tmp_path / "here", tmp_path / "there"]
    make(folders[0], "llama")
    shutil.copytree(*folders)
    weights = folders[1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1001] ^= 1
    weights.write_bytes(content)
    for folder, said in zip(
        folders, run_ranks(copies_refused, 2, [*map(str, folders)]), strict=True
    ):
        apart, alike = said
        assert alike == ""
        assert f"{folder} isn't the same on all machines: ranks 0 and 1 read" in apart
        assert "model.layers." in apart or "model.norm" in apart, apart


class LargestSum(TorchDispatchMode):
    """How many elements are added up at once, at most."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name == "aten::sum":
            self.elements = max(self.elements, args[0].numel())
        return func(*args, **(kwargs or {}))


def test_replicas_are_compared_without_a_copy_of_an_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch converts all that it adds up at once to int64: twice the memory of the weights."""
    monkeypatch.setattr("retool.checkpoint.flat.state.ADDED_AT_ONCE", 8)
    bits = torch.randint(-(2**31), 2**31 - 1, (37,), dtype=torch.int32)
    expected = sum(bits.tolist())
    with LargestSum() as largest:
        found = sum_of(bits)
    assert found == expected and 0 < largest.elements <= 8


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_resumed(tmp_path: Path) -> None:
    states.source_model(tmp_path / "source")
    mesh = make_mesh()
    state = states.state(mesh)
    state.params[2] = float("nan")
    checkpoint.save(
        tmp_path / "run",
        state,
        mesh,
        checkpoint.TrainingState(step=1),
        model_folder=tmp_path / "source",
    ).wait()
    with pytest.raises(ValueError, match=rf"can't be resumed: .*{EMBEDDING}.*an older one"):
        checkpoint.load(tmp_path / "run/global_step_1", states.blank(mesh), mesh, seed=0)


# --- a head of its own, or none ---


def test_a_head_that_config_json_says_is_the_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers unties such a model; we say how to, and then compute the same."""
    make(tmp_path, "qwen2")
    edit(
        tmp_path, **{"lm_head.weight": load_file(tmp_path / "model.safetensors")[EMBEDDING].clone()}
    )
    assert not refusal(str(tmp_path)) and main(["verify", str(tmp_path)]) == 0
    edit(tmp_path, **{"lm_head.weight": torch.randn(131, 48)})
    assert (
        '"tie_word_embeddings": false' in refusal(str(tmp_path))
        and main(["verify", str(tmp_path)]) == 1
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    batch = pack([sample(np.random.default_rng(0), 30)])
    with torch.no_grad():
        expected = theirs(batch.tokens[None].long()).logits[0]
        assert relative(load_pretrained(tmp_path, make_mesh())(batch, logits), expected) < 1e-5


def test_a_head_that_is_not_there_says_how_to_tie_it(tmp_path: Path) -> None:
    make(tmp_path, "qwen2", tie_word_embeddings=False)
    edit(tmp_path, **{"lm_head.weight": None})
    assert "lm_head.weight [131, 48] is missing" in refusal(
        str(tmp_path)
    ) and '"tie_word_embeddings": true' in refusal(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    assert not refusal(str(tmp_path))


@pytest.mark.parametrize(("family", "said"), [("qwen2", True), ("gemma2", None)])
def test_a_merge_keeps_a_head_that_was_trained_apart(
    tmp_path: Path, family: str, said: bool | None
) -> None:
    """Another program's checkpoint of such a model has two matrices, under a config.json that says
    they are one, or by its silence.
    """
    source = tmp_path / "model"
    make(source, family, tie_word_embeddings=False)
    config = source / "config.json"
    mesh = make_mesh()
    model = load_pretrained(source, mesh)
    content = json.loads(config.read_text()) | {"tie_word_embeddings": said}
    config.write_text(
        json.dumps({key: content[key] for key in content if content[key] is not None})
    )
    run = tmp_path / "run"
    options = checkpoint.SaveOptions(contents=("model", "optimizer", "extra"))
    state = checkpoint.ModelState(model.layout, model.master)
    checkpoint.save(
        run, state, mesh, checkpoint.TrainingState(step=1), model_folder=source, options=options
    ).wait()
    assert (
        main(
            [
                "convert",
                str(run / "global_step_1"),
                "--world-size",
                "2",
                "--out",
                str(tmp_path / "two"),
            ]
        )
        == 0
    )
    assert (
        main(["merge", str(tmp_path / "two"), "--out", str(tmp_path / "merged"), "--dtype", "fp32"])
        == 0
    )
    assert not read_model_config(tmp_path / "merged").tied
    assert torch.equal(load_pretrained(tmp_path / "merged", mesh).master, model.master)


@pytest.mark.parametrize("damage", ["shard", "shape", "config"])
def test_verify_finds_what_is_wrong_with_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    make(tmp_path, "llama")
    if damage == "shard":
        (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
        weight_map = {
            "model.norm.weight": "model-1.safetensors",
            "lm_head.weight": "model-2.safetensors",
        }
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        expected = "lacks model-2.safetensors"
    elif damage == "shape":
        edit(tmp_path, **{"model.norm.weight": torch.ones(47)})
        expected = "model.norm.weight is [47], the model has [48]"
    else:
        (tmp_path / "config.json").write_text("[]")
        expected = "not a JSON object"
    assert main(["verify", str(tmp_path)]) == 1
    assert expected in capsys.readouterr().out


def test_one_file_counts_before_an_index_as_it_does_for_transformers(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "old.safetensors")
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "old.safetensors")})
    )
    edit(tmp_path, **{"model.norm.weight": torch.full((48,), 7.0)})
    assert "two sets of weights" in refusal(str(tmp_path)), "nothing says which is meant"
    (tmp_path / "old.safetensors").unlink()
    sharded = load_pretrained(tmp_path, make_mesh())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight[0].item() == 7.0
    unit = next(
        unit for unit, member in sharded.layout.members if member.name == "model.norm.weight"
    )
    assert 7.0 in sharded.master[unit.start : unit.start + unit.numel].tolist()
