"""Families under sequence parallelism: the same logits and gradients as one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retool.batch import pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.model.build import ModelOptions
from retool.parallel.fsdp import local_pieces
from retool.parallel.mesh import make_mesh
from tests.model.test_decoder import logits, sample
from tests.model.tiny import FAMILIES, make
from tests.ranks import run_ranks

LENGTHS = 17, 1, 40, 8  # some within the tiny models' windows and original lengths, some beyond
# What goes by a document's length or a layer's window, which a rank sees a part of only
BY_DEFAULT = ["phi4-mini", "ministral", "gemma2", "gemma3"]
Found = dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]  # logits [t, V], pieces of gradients


def computed(folder: str, families: list[str], sp: int) -> Found:
    """Of each family this rank's logits, and its part of the gradient."""
    f64 = torch.float64
    mesh = make_mesh(sp=sp, device="cpu")
    found: Found = {}
    for family in families:
        options = ModelOptions(f64, f64, f64, recompute="full")
        model = load_pretrained(f"{folder}/{family}", mesh, options)
        rng = np.random.default_rng(0)
        batch = pack([sample(rng, n) for n in LENGTHS])
        out = model(batch.slice(mesh.sp_rank, sp), logits)
        out.square().sum().backward()
        model.finish_gradients()
        pieces = {
            f"{piece.member.name} {piece.start}": model.grad[
                piece.local : piece.local + piece.stop - piece.start
            ].numpy()
            for piece in local_pieces(model.layout, mesh.shard_rank)
        }
        found[family] = out.detach().numpy(), pieces
    return found


def same_as_alone(folder: Path, families: list[str]) -> None:
    for family in families:
        make(folder / family, family)
    alone = computed(str(folder), families, 1)
    apart = run_ranks(computed, 2, str(folder), families, 2)
    for family in families:
        whole, gradients = alone[family]
        together = np.concatenate([rank[family][0] for rank in apart])
        np.testing.assert_allclose(together, whole, rtol=1e-9, atol=1e-11)
        flat = {name.split()[0]: gradient for name, gradient in gradients.items()}
        for rank in apart:
            for name, gradient in rank[family][1].items():
                parameter, start = name.split()
                want = flat[parameter][int(start) : int(start) + len(gradient)]
                np.testing.assert_allclose(gradient, want, rtol=1e-7, atol=1e-9, err_msg=name)


def test_two_ranks_of_a_sequence_compute_what_one_does(tmp_path: Path) -> None:
    same_as_alone(tmp_path, BY_DEFAULT)


@pytest.mark.slow
def test_two_ranks_of_a_sequence_compute_what_one_does_in_every_family(tmp_path: Path) -> None:
    same_as_alone(tmp_path, list(FAMILIES))
