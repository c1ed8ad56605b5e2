"""The table of all systems: from the peers' jobs, ours, and the lean loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests import warm
from tests.benchmarks.test_all import benchmark

BOUND = "RESULT bound cudnn 1 x 16384: 1000 tok/s/GPU, 400 model TFLOP/s, peak 21.6 GiB\n"
RATES = {"trl-full": 55_092, "verl-published": 31_095, "verl-mixed": 40_000}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """peers.py, whose peers are away: each job leaves a rate of RATES, or fails; so is the bound."""
    module = benchmark("peers")
    inner = module.run

    def run(command: list[str], path: str, log: Path, seconds: float) -> str:
        if log.stem == "bound":
            log.write_text(BOUND)
            return ""
        if not any(word.endswith("peer_sft.py") for word in command):
            return inner(command, path, log, seconds)
        if log.stem not in RATES:
            return "exit status 1: ModuleNotFoundError: No module named 'verl'"
        options = json.loads(command[-1])
        found = {"tokens_per_second_per_gpu": RATES[log.stem], "peak_gib": 20.0}
        Path(options["out"]).write_text(json.dumps(found))
        return ""

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "write_model", lambda *_: None)
    return module


def table(
    peers: ModuleType,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[dict[str, list[str]], str]:
    """The rows by their first cell, and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    peers.main()
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    return {row[1]: row[2:] for row in cells if len(row) > 4}, said


def test_peers_that_ran_have_rows_and_one_that_failed_says_why(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(peers.OURS.split(",")) <= set(benchmark("sft").ROWS)
    (tmp_path / "retool.json").write_text(
        json.dumps(
            {
                "lines": [
                    {
                        "name": "full-sp1",
                        "row": "full, sp 1",
                        "tokens_per_second_per_gpu": 76_403.0,
                        "peak_gib": 21.2,
                    },
                    {"name": "mixed", "row": "mixed", "failed": "no room"},
                ]
            }
        )
    )
    words = [str(tmp_path), "--only", "trl,verl,bound", "--bound", "bound.py"]
    rows, said = table(peers, words, monkeypatch, capsys)
    trl = rows["full: TRL, FSDP2, liger, padding-free, no recomputation"]
    assert trl[:3] == ["55,092", "20.0", "1.00×"] and said.count("1.00×") == 2
    assert rows["full: verl, published settings (sp 2, recomputation)"][2] == "0.56×"
    assert rows["full: **retool**, full, sp 1"][2] == "1.39×"
    assert rows["**retool**, full, sp 1"][:3] == ["76,403", "cudnn 1,000", "76.40"]
    assert "verl-full: exit status 1: ModuleNotFoundError: No module named 'verl'" in said


def test_a_peers_rate_is_of_the_counted_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = benchmark("peer_sft")
    out = tmp_path / "out.json"
    options = {"workload": "mixed", "scale": 64, "vocabulary": 512, "out": str(out)}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # The first two steps compile; from the third's end each takes half a second
    monkeypatch.setattr(worker, "ends", [10.0, 19.0, 20.0, 20.5, 21.0, 21.5, 22.0, 22.5])
    worker.report(options)
    tokens = sum(len(document) for document in worker.documents(options)) / 8
    found = json.loads(out.read_text())
    assert found["steps"] == 8
    assert found["tokens_per_second_per_gpu"] == pytest.approx(tokens / 0.5 / 2)
    out.unlink()
    monkeypatch.setattr(worker, "ends", [1.0, 2.0])
    worker.report(options)
    assert not out.exists()


def test_every_system_trains_on_the_same_documents() -> None:
    ours = benchmark("sft").Documents("mixed", 8, 512, 64)
    theirs = benchmark("peer_sft").documents({"workload": "mixed", "scale": 64, "vocabulary": 512})
    assert len(ours) == len(theirs) == 512
    assert all(np.array_equal(ours[i].tokens, theirs[i]) for i in (0, 17, 511))


@pytest.mark.slow
def test_ours_is_in_the_table(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers, "OURS", "full,full-sp1")
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)
    sizes = "--shape tiny --scale 1024 --gpus 1 --only retool,trl".split()
    rows, _ = table(peers, [str(tmp_path), *sizes], monkeypatch, capsys)
    ours = rows["full: **retool**, full, sp 1: the published command"]
    assert float(ours[0].replace(",", "")) > 0 and ours[2].endswith("×") and ours[2] != "nan×"
