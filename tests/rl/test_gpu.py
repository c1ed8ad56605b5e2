"""A whole run on a GPU: graphs survive updates, the engine's memory is kept or freed, the sampler
agrees with the trainer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.metrics import read_jsonl
from retool.rl.__main__ import main
from tests.rl.test_command import ARR, words

pytestmark = pytest.mark.gpu


@pytest.mark.first
@pytest.mark.parametrize("free", ["true", "false", "auto"])
def test_two_steps(work: Path, tmp_path: Path, free: str) -> None:
    more = [
        "trainer.total_training_steps=3",
        f"{ARR}rollout.free_cache_engine={free}",
        "data.max_response_length=64",
        "trainer.device=cuda",
        f"{ARR}rollout.gpu_memory_utilization=0.05",
    ]
    assert main(words(work, tmp_path / "run", *more)) == 0
    entries = [
        entry
        for entry in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if "timing_s/step" in entry
    ]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert all(entry["training/rollout_logp_diff_mean"] < 2e-2 for entry in entries)
