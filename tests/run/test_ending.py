"""What a run says at its end: where its model is, and how to look at it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from retool.report.__main__ import main as report
from retool.run.ending import what_is_there
from tests.report.conftest import write_metrics


@pytest.mark.parametrize("inner", ["", "actor"])
def test_a_run_ends_with_its_model_and_the_command_for_its_page(
    tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "my runs" / "one"
    write_metrics(run, [{"step": 3, "train/loss": 1.0}])
    shards = run / "global_step_3" / inner
    export = shards / "huggingface"
    export.mkdir(parents=True)
    (shards / "model_world_size_1_rank_0.pt").touch()
    merging, page = what_is_there(run, 3)
    words = shlex.split(merging.split("python -m retool.checkpoint ")[1])
    assert words == ["merge", str(shards), "--out", str(run / "merged")]
    (export / "model.safetensors").touch()
    exported, page = what_is_there(run, 3)
    assert exported.endswith(f": {export}") and "merge" not in exported
    monkeypatch.chdir(tmp_path)
    assert report(shlex.split(page.split("python -m retool.report ")[1])) == 0
    assert (run / "report.html").is_file()


def test_a_run_that_saved_nothing_names_no_model(tmp_path: Path) -> None:
    (page,) = what_is_there(tmp_path, 3)
    assert "python -m retool.report" in page
