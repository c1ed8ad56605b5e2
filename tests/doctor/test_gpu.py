"""`retool doctor` over NCCL: it goes through, and its bandwidths are a GPU's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from retool.doctor.examine import Wanted, examine
from retool.doctor.finding import Finding, table
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.timeout(120)]
LEAST_GBIT = 800.0  # 100 GB/s: NVLink; PCIe has a quarter of it


def examined(folder: Path) -> list[Finding]:
    return examine(Wanted(folder, sandbox=False, megabytes=512, device="cuda"))


def gbit(finding: Finding) -> float:
    number = re.match(r"([\d,.]+) Gbit/s", finding.found)
    assert number is not None, finding
    return float(number[1].replace(",", ""))


def test_two_gpus_exchange_data_as_fast_as_nvlink_does(tmp_path: Path) -> None:
    need_gpus(2)
    first, second = run_ranks(examined, 2, tmp_path)
    print(table(first))
    assert first == second, "one table for all"
    lines = {finding.subject: finding for finding in first}
    assert lines["GPUs"].found.startswith(torch.cuda.get_device_name().split()[0])
    assert gbit(lines["all-reduce in a machine"]) > LEAST_GBIT
    assert gbit(lines["all-to-all in a machine"]) > LEAST_GBIT / 2
    assert "µs a message" in lines["latency in a machine"].found
    for subject in ("clocks", "product of matrices", "folder: shared"):
        assert not lines[subject].problem, lines[subject]
