"""Models without a file here train as transformers' module: five steps against transformers alone,
packed, padded, sharded and sequence-parallel.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from retool.batch import Sample, pack, pack_apart
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.model.borrowed.buffers import fill_buffers
from retool.model.borrowed.module import BorrowedModel
from retool.model.borrowed.read import read_any_config
from retool.model.build import ModelOptions
from retool.model.decoder import Decoder
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import local_pieces
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.loss import loss_sum
from retool.sft.step import train_step
from tests.model.tiny import make
from tests.model.zoo import ARCHITECTURES, SHAPE, make_borrowed, tiny_config
from tests.ranks import run_ranks

STEPS = 5
LR = 1e-3
PAD_TO = 24
ADAMW = AdamWOptions()


def batches() -> list[list[Sample]]:
    """Four samples a step, of 2 to 20 tokens."""
    rng = np.random.default_rng(0)
    return [
        [
            Sample(rng.integers(3, SHAPE["vocab_size"], n).astype(np.int32), rng.random(n) < 0.7)
            for n in rng.integers(2, 21, 4)
        ]
        for _ in range(STEPS)
    ]


def theirs(folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and weights in the end, of transformers alone: one document at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, betas=ADAMW.betas, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay
    )
    losses = []
    for samples in batches():
        optimizer.zero_grad()
        trained = sum(sample.trained for sample in samples)
        loss = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logp.gather(1, ids[0, 1:, None])[:, 0]
            loss = loss - picked[torch.from_numpy(sample.mask[1:])].sum() / trained
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder / "after")  # under the names that files have
    return losses, load_file(folder / "after" / "model.safetensors")


def ours(
    folder: Path, sp: int, recompute: Recompute, pad_to: int | None
) -> tuple[list[float], dict[tuple[str, int], np.ndarray]]:
    """The same as a run does it; this rank's pieces of the weights."""
    mesh = make_mesh(sp=sp)
    double = torch.float64
    options = ModelOptions(double, double, double, recompute=recompute)
    model = load_pretrained(folder, mesh, options)
    optimizer = AdamW(model, ADAMW)
    losses = []
    for samples in batches():
        mine = samples[mesh.dp_rank :: mesh.dp]
        half = len(mine) // 2
        packs = [pack(each, sp, pad_to) for each in (mine[:half], mine[half:])]
        if sp == 2 and pad_to is None:
            # Documents that lie on one rank each
            packs[1] = pack_apart([mine[half:-1], mine[-1:]])
        trained = sum(sample.trained for sample in samples)
        loss, _, skipped = train_step(
            model, optimizer, packs, trained, LR, StepTimer(mesh.device)
        ).read()
        assert not skipped
        losses.append(loss)
    return losses, {
        (p.member.name, p.start): model.master[p.local : p.local + p.stop - p.start].numpy().copy()
        for p in local_pieces(model.layout, mesh.shard_rank)
    }


def require_same(folder: Path, results: list[Any]) -> None:
    """Every rank's losses, and all weights, are those of transformers alone."""
    losses, weights = theirs(folder)
    seen = dict.fromkeys(weights, 0)
    for found, pieces in results:
        assert found == pytest.approx(losses, rel=1e-6)
        for (name, start), values in pieces.items():
            wanted = weights[name].reshape(-1)[start : start + len(values)]
            np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=3e-6, err_msg=name)
            seen[name] += len(values)
    assert seen == {name: values.size for name, values in weights.items()}


def test_two_ranks_train_as_transformers_alone(tmp_path: Path) -> None:
    """A tied head; logits and scores that the model scales."""
    make_borrowed(tmp_path, "hyperclovax", tie_word_embeddings=True)
    require_same(tmp_path, run_ranks(ours, 2, tmp_path, 2, "full", None))


def test_windows_are_those_of_transformers(tmp_path: Path) -> None:
    """A layer with a sliding window, and one without."""
    make_borrowed(tmp_path, "exaone4")
    assert sorted(read_any_config(tmp_path).windows) == [0, 8]
    require_same(tmp_path, [ours(tmp_path, 1, "full", None)])


def test_padded_is_packed(tmp_path: Path) -> None:
    """A head with a bias, and part of the channels rotated."""
    make_borrowed(tmp_path, "phi")
    packed, _ = ours(tmp_path, 1, "none", None)
    padded, _ = ours(tmp_path, 1, "none", PAD_TO)
    assert padded == pytest.approx(packed, rel=1e-9)


def test_a_family_with_a_file_runs_as_transformers_module_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    """The same loss and gradients as our decoder's."""
    make(tmp_path, "qwen3")
    double = torch.float64
    found = []
    for impl in ("auto", "transformers"):
        options = ModelOptions(double, double, double, impl=impl)
        model = load_pretrained(tmp_path, make_mesh(), options)
        loss = loss_sum(model, pack(batches()[0]))
        loss.backward()
        parts = {
            member.name: model.grad[unit.start + member.offset :][: member.numel]
            for unit, member in model.layout.members
        }
        found.append((type(model.module), float(loss.detach()), parts))
    (own, own_loss, own_parts), (module, loss, parts) = found
    assert (own, module) == (Decoder, BorrowedModel)
    assert loss == pytest.approx(own_loss, rel=1e-7)  # transformers' norms are in fp32
    assert parts.keys() == own_parts.keys()
    for name, part in parts.items():
        wanted = own_parts[name]
        assert (part - wanted).norm() < 1e-5 * wanted.norm(), name


def test_what_transformers_cannot_do_names_the_way_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("olmoe")))
    with pytest.raises(ValueError, match=r"a mixture of experts.* Use model\.impl=auto"):
        read_any_config(tmp_path, "transformers")


# model_type, what its config.json says, what the refusal names
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", {}, "call no other function than their own"),
    ("bloom", {}, "takes no position_ids"),
    ("mamba", {}, "layers of linear_attention"),
    ("gemma2", {}, "final_logit_softcapping=30.0"),
    ("gemma2", {"final_logit_softcapping": None}, "asks for softcap=50"),
    ("mixtral", {}, "a mixture of experts"),
    ("mixtral", {"attention_dropout": 0.1}, "lists. attention_dropout=0.1 is not implemented"),
    ("qwen2_moe", {"sliding_window": 0}, "a mixture of experts"),
    ("gpt2", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    (
        "gemma3_text",
        {"use_bidirectional_attention": True, "final_logit_softcapping": None},
        "its attention isn't causal",
    ),
    ("minicpm3", {}, "heads of keys and values differ in width"),
    ("diffllama", {}, "calls attention 2 times, not once"),
    ("apertus", {}, "its files hold model.layers.0.mlp.act_fn.beta"),
    ("bert", {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}, "bert"),
    ("bart", {}, "is_encoder_decoder=true"),
    ("gemma3", {}, "vision_config and text_config are there"),
    ("glm", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "its rope (dynamic)"),
    ("glm", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("glm", {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "code of its own"),
    ("recurrent_gemma", {}, "layers of linear_attention"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers of conv"),
]


@pytest.mark.parametrize("architecture, settings, named", REFUSED)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, architecture: str, settings: dict[str, Any], named: str
) -> None:
    content = tiny_config(architecture, **settings)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        # Gemma 2 has a file
        read_any_config(tmp_path, "transformers")
    assert named in str(error.value)
    assert re.search(r"\b(Use|Give|Take|write|way out)\b", str(error.value))


class WithTable(nn.Module):
    """Has a buffer of which nobody says the values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(3, device="meta"))

    def _init_weights(self, module: nn.Module) -> None:
        pass


def test_a_buffer_without_values_is_refused_by_name() -> None:
    causal = nn.Module()
    causal.inner = WithTable()
    causal._init_weights = causal.inner._init_weights
    with pytest.raises(ValueError, match=r"inner\.table is in no file"):
        fill_buffers(causal, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "world, sp, recompute, pad_to",
    [(1, 1, "none", None), (1, 1, "full", PAD_TO), (2, 1, "none", PAD_TO), (2, 2, "full", None)],
)
def test_every_architecture_trains_as_transformers_alone(
    tmp_path: Path, architecture: str, world: int, sp: int, recompute: Recompute, pad_to: int | None
) -> None:
    make_borrowed(tmp_path, architecture)
    require_same(tmp_path, run_ranks(ours, world, tmp_path, sp, recompute, pad_to))
