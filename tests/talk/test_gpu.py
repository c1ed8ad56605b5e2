"""Both commands on a GPU: the engine's own kernels and CUDA graphs under them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from retool.__main__ import main

# They take most of the memory that is free
pytestmark = [pytest.mark.gpu, pytest.mark.alone]


def test_a_piped_question_is_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", str(folder), "--max-tokens", "40", "--temperature", "0", "--device", "cuda"]
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("How many?"))
        assert main([*words, "--tools", "none"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 40


def test_a_file_is_answered(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"How much is {i}?"}) + "\n" for i in range(40)))
    out = tmp_path / "out.jsonl"
    words = [str(folder), str(rows), "--n", "3", "--max-tokens", "30", "--isolation", "best_effort"]
    assert main(["generate", *words, "--tools", "code", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"]["prompt"] for line in lines] == [f"How much is {i}?" for i in range(40)]
    answers = [answer for line in lines for answer in line["completions"]]
    assert len(answers) == 120 and len({answer["text"] for answer in answers}) > 60
    assert all(0 < answer["tokens"] <= 30 for answer in answers)
