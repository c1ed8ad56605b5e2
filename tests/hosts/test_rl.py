"""Reinforcement learning on two machines: an engine and a sandbox on each."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.sandbox.probe import find
from tests.hosts.launch import run
from tests.hosts.network import Host
from tests.rl.conftest import work
from tests.rl.test_command import ARR, steps, words

__all__ = ["work"]
SAME = (
    "critic/score/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "response_length/mean",
)


@pytest.mark.slow
def test_an_engine_and_a_sandbox_on_each_machine(
    work: Path, hosts: list[Host], tmp_path: Path
) -> None:
    """Two ranks share an engine, four train: the numbers of one machine with the same layout."""
    if find().unmet():
        pytest.skip("no strict isolation here")
    keys = [
        "trainer.total_training_steps=2",
        f"{ARR}rollout.tensor_model_parallel_size=2",
        f"{ARR}actor.fsdp_config.fsdp_size=2",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_workers=1",
    ]
    apart = tmp_path / "apart"
    together = tmp_path / "together"
    ended = run(hosts, 2, ["-m", "retool.rl", *words(work, apart, *keys)], tmp_path / "logs")
    assert [one.status for one in ended] == [0, 0], [one.text[-3000:] for one in ended]
    command = ["-m", "retool.rl", *words(work, together, *keys)]
    (alone,) = run(hosts[1:], 4, command, tmp_path / "logs of one")
    assert alone.status == 0, alone.text[-3000:]
    for two, one in zip(steps(apart), steps(together), strict=True):
        assert {name: two[name] for name in SAME} == {name: one[name] for name in SAME}
