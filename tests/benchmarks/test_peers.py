"""The table of all systems, from what their scripts print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.benchmarks.test_all import benchmark

RUN = """echo noise
echo "RESULT trl liger=True recompute=False batch=1 full: 55092 tok/s/GPU, step 2.38 s, peak 20.0 GiB, reserved 21.0 GiB"
echo "RESULT verl published full: 31095 tok/s/GPU, step 4.21 s, peak 9.7 GiB, reserved 12.0 GiB"
echo "FAILED, see the log"
"""
BOUND = """print("RESULT bound cudnn 1 x 16384: 1000 tok/s/GPU, 400 model TFLOP/s (MFU 40.4%), peak 21.6 GiB")"""


@pytest.mark.slow
def test_one_table_of_everything_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.sh").write_text(RUN)
    (tmp_path / "single_gpu_bound.py").write_text(BOUND)
    peers = benchmark("peers")
    assert set(peers.OURS.split(",")) <= set(benchmark("sft").ROWS)
    monkeypatch.setattr(peers, "OURS", "full,full-sp1")
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)

    def table(part: str) -> str:
        folders = [str(tmp_path)] * 3 + [str(tmp_path / "out")]
        sizes = "--shape tiny --scale 1024 --gpus 1".split()
        monkeypatch.setattr(sys, "argv", ["peers", *folders, *sizes, "--only", part])
        peers.main()
        return capsys.readouterr().out

    assert table("peers,bound").count("1.00×") == 1
    said = table("ours")
    rows = {
        cells[1]: cells[2:]
        for cells in ([c.strip() for c in line.split("|")] for line in said.splitlines())
        if len(cells) > 4
    }
    assert rows["full: trl liger=True recompute=False batch=1"][:3] == ["55,092", "20.0", "1.00×"]
    assert rows["full: verl published"][2] == "0.56×"
    ours = rows["full: **retool**, full, sp 1: the published command"]
    assert float(ours[0].replace(",", "")) > 0 and ours[2].endswith("×") and ours[2] != "nan×"
    share = rows["**retool**, full, sp 1"]
    assert (
        share[1] == "cudnn 1,000"
        and abs(float(share[2]) - float(share[0].replace(",", "")) / 1000) < 0.01
    )
