"""A small model's state made of known numbers: what the save and load tests share.

Module-level, so that ranks can import it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from retool import checkpoint
from retool.checkpoint import ModelState, SaveOptions
from retool.parallel.fsdp.layout import Layout, local_pieces, make_layout
from retool.parallel.mesh import Mesh, make_mesh

TIED = (("lm_head.weight", "model.embed_tokens.weight"),)


def layout(shards: int) -> Layout:
    """Uneven rows, fewer rows than ranks, several parameters in a slot, a tied head, parameters in
    another order than the units.
    """
    units = [
        ("embed", [("embed", (11, 8), [("model.embed_tokens.weight", (11, 8))], True)]),
        *(
            (
                f"block{i}",
                [
                    (
                        "qkv",
                        (14, 8),
                        [
                            (f"model.layers.{i}.q.weight", (8, 8)),
                            (f"model.layers.{i}.k.weight", (3, 8)),
                            (f"model.layers.{i}.v.weight", (3, 8)),
                        ],
                        True,
                    ),
                    (
                        "bias",
                        (14,),
                        [
                            (f"model.layers.{i}.q.bias", (8,)),
                            (f"model.layers.{i}.k.bias", (3,)),
                            (f"model.layers.{i}.v.bias", (3,)),
                        ],
                        True,
                    ),
                    ("down", (8, 133), [(f"model.layers.{i}.down.weight", (8, 133))], True),
                ],
            )
            for i in range(2)
        ),
        ("norm", [("norm", (2,), [("model.norm.weight", (2,))], True)]),
    ]
    names = [m for _, slots in units for _, _, members, _ in slots for m, _ in members]
    return make_layout(units, shards, TIED, (names[0], names[-1], *names[1:-1]))


def truth(dtype: torch.dtype, salt: int) -> dict[str, torch.Tensor]:
    """Every parameter, whole. `salt` 0 for weights, 1 and 2 for the moments."""
    generator = torch.Generator().manual_seed(100 + salt)
    return {
        m.name: torch.randn(m.shape, dtype=torch.float64, generator=generator).to(dtype)
        for _, m in layout(1).members
    }


def flat(lay: Layout, rank: int, dtype: torch.dtype, salt: int) -> torch.Tensor:
    out = torch.zeros(lay.shard_numel, dtype=dtype)
    whole = truth(dtype, salt)
    for p in local_pieces(lay, rank):
        out[p.local : p.local + p.stop - p.start] = whole[p.member.name].view(-1)[p.start : p.stop]
    return out


def state(mesh: Mesh, dtype: torch.dtype = torch.float32, step: int = 7) -> ModelState:
    lay = layout(mesh.shards)
    return ModelState(
        lay, *(flat(lay, mesh.shard_rank, dtype, salt) for salt in range(3)), updates=step
    )


def blank(mesh: Mesh, dtype: torch.dtype = torch.float32) -> ModelState:
    lay = layout(mesh.shards)
    return ModelState(
        lay, *(torch.full((lay.shard_numel,), float("nan"), dtype=dtype) for _ in range(3))
    )


def source_model(folder: Path) -> Path:
    """A model folder's small files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text("{}")
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def save(
    root: str,
    fsdp_size: int = -1,
    dtype: torch.dtype = torch.float32,
    steps: tuple[int, ...] = (5,),
    **options: Any,
) -> list[str | None]:
    """Save `steps`, one after the other; the errors."""
    mesh = make_mesh(fsdp_size=fsdp_size)
    torch.manual_seed(1000 + mesh.rank)
    np.random.seed(mesh.rank)
    staging = checkpoint.Staging(mesh)
    errors = []
    for step in steps:
        pending = checkpoint.save(
            root,
            state(mesh, dtype),
            mesh,
            checkpoint.TrainingState(
                step=step, extra={"mine": [mesh.rank, "x"], "epoch": 2}, data_state={"position": 17}
            ),
            model_folder=Path(root).parent / "source",
            options=SaveOptions(**options),
            staging=staging,
        )
        errors.append(pending.wait().error)
    staging.close()
    return errors


def load_and_compare(
    folder: str, fsdp_size: int = -1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Load on these ranks, check every element, and tell what came besides."""
    mesh = make_mesh(fsdp_size=fsdp_size)
    fresh = blank(mesh, dtype)
    expected = state(mesh, dtype)
    loaded = checkpoint.load(folder, fresh, mesh, seed=3)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(fresh, name), getattr(expected, name)), name
    numbers = [torch.rand(2).tolist(), np.random.rand(2).tolist()]
    return {
        "extra": loaded.extra,
        "data": loaded.data_state,
        "step": loaded.step,
        "updates": loaded.optimizer_step,
        "same": loaded.same_layout,
        "numbers": numbers,
    }


def under_way(root: Path, since: float) -> bool:
    """Whether a save that began after `since` (time.time) is unfinished; an older one is a torn
    save's remains.
    """
    for folder in root.glob("global_step_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_ctime > since:
                return True
    return False


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a huggingface/ folder, read by the safetensors library."""
    out: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        out |= load_file(file)
    return out
