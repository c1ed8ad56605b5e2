"""Random states as plain integer tensors, so that they load without running anything."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of torch (CPU and `device`), numpy and Python: uint8 and int64 tensors, numbers
    and None.
    """
    mt19937 = np.random.get_state(legacy=False)
    assert isinstance(mt19937, dict) and mt19937["bit_generator"] == "MT19937"
    keys = mt19937["state"]["key"]
    position = mt19937["state"]["pos"]
    version, words, gauss = random.getstate()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(mt19937["has_gauss"]),
            "cached": float(mt19937["gauss"]),
        },
        "random": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture` took.

    A state of another device type leaves that device's generator alone.
    """
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    n = state["numpy"]
    r = state["random"]
    np.random.set_state(
        ("MT19937", n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["cached"])
    )
    random.setstate((r["version"], tuple(r["words"].tolist()), r["gauss"]))


def derive(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank): what a resume on another number of ranks does."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(int.from_bytes(digest[12:20], "little"))
