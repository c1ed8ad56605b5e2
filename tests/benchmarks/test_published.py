"""The published commands' table: from the script in `examples/` to its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_all import benchmark, lines_of, questions, rows_of

PARTS = {
    "sync_weights": 1.0,
    "gen": 20.0,
    "tools": 2.0,
    "reward": 3.0,
    "old_log_prob": 4.0,
    "update_actor": 8.0,
    "step": 34.0,
    "testing": 5.0,
}


def test_parts_add_up_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    published = benchmark("published")
    entries: list[dict[str, Any]] = [
        {"step": 1, **{f"timing_s/{name}": seconds for name, seconds in PARTS.items()}},
        {"step": 1, "val-core/acc/mean@1": 0.5},
    ]
    line = {"name": "dapo", "whole": 50.0, "starting": 7.0, "note": "", "entries": entries}
    published.show_dapo(line, "2 GPUs")
    text = capsys.readouterr().out
    cells = {row[0].strip(): row[1].strip() for row in rows_of(text) if "seconds" not in row[0]}
    parts = ("weights", "sampling", "tools", "reward", "old log-probs", "update", "other")
    assert cells["sampling"] == "15.00" and cells["other"] == "1.00"
    assert sum(float(cells[name]) for name in parts) == float(cells["the step"]) == 34
    assert "starting 7.0, ending 4.0, the whole command 50.0" in text


SLOW_TO_STOP = """#!/bin/sh
step() { echo "{\\"step\\": $1, \\"timing_s/step\\": 0.1}" >> "$SAVE_PATH/metrics.jsonl"; }
mkdir -p "$SAVE_PATH"
trap 'sleep 0.3; step 2; exit 143' TERM
sleep 0.2
step 1
sleep 30 &
wait
"""


def test_what_a_run_does_while_it_stops_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reaches torchrun through the script, and the table waits for it."""
    published = benchmark("published")
    (tmp_path / "torchrun").write_text(SLOW_TO_STOP)
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    args = Namespace(model="m", gpus=2, device="cpu", overrides="", timeout=1.2, stopping=5)
    line = published.run(args, "dapo", [tmp_path, tmp_path], [], tmp_path)
    assert [entry["step"] for entry in line["entries"]] == [1, 2]
    assert line["note"] == "stopped after 1 s" and 0 < line["starting"] < line["whole"] - 0.5
    assert line["whole"] < 5


@pytest.mark.slow
def test_both_commands_on_two_ranks(tmp_path: Path, repository: Path) -> None:
    questions(tmp_path)
    conversations = [str(tmp_path / f"{name}.parquet") for name in ("train", "test")]
    asked = []
    for name in ("questions", "held-out"):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{name} {i}?"}],
                "reward_model": {"ground_truth": "4"},
            }
            for i in range(4)
        ]
        asked.append(str(tmp_path / f"{name}.jsonl"))
        Path(asked[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = (
        "--shape tiny --gpus 2 --device cpu --questions 2 --samples 2 --response 8 --sft-steps 1"
    )
    command = [sys.executable, str(repository / "benchmarks" / "published.py"), *sizes.split()]
    out = tmp_path / "out.json"
    words = ["--dapo", *asked, "--sft", *conversations, "--json", str(out)]
    ran = subprocess.run(
        [*command, *words, "--overrides", "data.train_batch_size=2"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    dapo, sft = lines_of(out)
    assert "failed" not in dapo and "failed" not in sft, ran.stdout + ran.stderr[-2000:]
    assert [entry["step"] for entry in dapo["entries"] if "timing_s/step" in entry] == [1, 2]
    assert "the step" in ran.stdout and "seconds a step" in ran.stdout
