"""The small tokenizer and templates of the data tests, and trajectories made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retool.rl.types import Prompt, Stop, Trajectory
from tests.data.conftest import conversation, qwen_tokenizer, renderer_of, tokenizer, tool_row

__all__ = ["conversation", "qwen_tokenizer", "renderer_of", "tokenizer", "tool_row"]


def make_prompt(index=0, ids=(1, 2, 3), truth="4", source="numbers", extra=None):
    return Prompt(index, [{"role": "user", "content": "?"}], None, np.asarray(ids, np.int32), source, truth, extra or {})


def make_trajectory(prompt=None, sample=0, response=(5, 6, 7), mask=None, logp=None, stop=Stop.NO_CALL, version=0, text="", **changes):
    """A trajectory whose response is all sampled unless `mask` says otherwise."""
    prompt = prompt or make_prompt()
    n = len(prompt.ids)
    mask = np.asarray([False] * n + list(mask if mask is not None else [True] * len(response)), bool)
    full = np.zeros(len(mask), np.float32)
    full[mask] = -0.5 if logp is None else logp
    numbers = {"num_turns": 2, "tool_calls": 0, "tool_errors": 0, "tool_timeouts": 0, "tool_seconds": 0.0, **changes}
    tokens = np.concatenate([prompt.ids, np.asarray(response, np.int32)])
    return Trajectory(prompt, sample, tokens, n, mask, full, full.copy(), stop, policy_version=version, assistant_text=text, **numbers)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
