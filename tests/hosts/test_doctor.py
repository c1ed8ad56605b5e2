"""`retool doctor` on two machines that share no disk, under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.launch import run
from tests.hosts.network import Host


@pytest.mark.slow
def test_two_machines_are_compared(work: Path, hosts: list[Host], tmp_path: Path) -> None:
    doctor = ["-m", "retool.doctor", "--command", "sft", "--megabytes", "4", "--folder"]
    model = ["--model", work / "model", "--tokens", "256"]
    ended = run(hosts, 2, [*doctor, tmp_path, *model], tmp_path / "logs")
    assert [one.status for one in ended] == [0, 0], ended
    said = ended[0].text
    assert "2 on host-a (10.77.0.1), 2 on host-b (10.77.0.2)" in said
    for name in ("all-reduce", "all-to-all", "all-gather", "reduce-scatter"):
        assert f"✓ {name} in a machine" in said and f"✓ {name} between machines" in said
    assert "✓ latency in a machine" in said and "✓ latency between machines" in said
    assert "✓ a step's network" in said and "fsdp_size=4 waits" in said
    assert "✓ clocks" in said and "✓ folder: renames show" in said
    assert "✓" not in ended[1].text, "one table for all"

    ended = run(hosts, 1, [*doctor, hosts[0].disk], tmp_path / "logs of two disks")
    assert [one.status for one in ended] == [1, 1]
    said = " ".join(ended[0].text.split())
    assert "✗ folder: shared" in said and "doesn't appear on host-a, host-b" in said
