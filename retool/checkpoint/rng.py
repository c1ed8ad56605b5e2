"""Random states as plain integer tensors, so that they load without running anything."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of torch (CPU and `device`), numpy and Python.

    {"cpu": uint8 tensor, "cuda": the same or None, "numpy": {…}, "random": {…}}, in both of which
    the Mersenne twister's words are an int64 tensor.
    """
    on_gpu = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
        "numpy": _capture_numpy(),
        "random": _capture_python(),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture` took.

    A state of another device type leaves that device's generator alone.
    """
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    _restore_numpy(state["numpy"])
    _restore_python(state["random"])


def derive(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank): what a resume on another number of ranks does."""
    # Hashed, so that neighbouring seeds, steps and ranks have nothing in common.
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(int.from_bytes(digest[12:20], "little"))


def _capture_numpy() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict) and state["bit_generator"] == "MT19937"
    twister = state["state"]
    return {
        "keys": torch.from_numpy(twister["key"].astype(np.int64)),
        "position": int(twister["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "cached": float(state["gauss"]),
    }


def _restore_numpy(state: dict[str, Any]) -> None:
    keys = state["keys"].numpy().astype(np.uint32)
    gauss = (state["has_gauss"], state["cached"])
    np.random.set_state(("MT19937", keys, state["position"], *gauss))


def _capture_python() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {
        "version": version,
        "words": torch.tensor(words, dtype=torch.int64),
        "gauss": gauss,
    }


def _restore_python(state: dict[str, Any]) -> None:
    words = tuple(state["words"].tolist())
    random.setstate((state["version"], words, state["gauss"]))
