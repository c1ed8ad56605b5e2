"""`retool models`: the list is the code's own, and a folder's model is told as a run would tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool.model.catalogue.families import FAMILIES
from retool.preflight.models import BORROWED, OWN, main
from tests.model import tiny
from tests.model.zoo import tiny_config

ROOT = Path(__file__).parents[2]


def test_every_family_is_listed_and_has_a_case_in_the_tests_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in FAMILIES)
    tested = {config.model_type for config, *_ in tiny.FAMILIES.values()}
    assert set(FAMILIES) <= tested
    for name in (*OWN.tests, *BORROWED.tests):
        assert name in said and (ROOT / name).is_file()
    for name in OWN.tests:
        assert "from tests.model.tiny import FAMILIES" in (ROOT / name).read_text()


def write_config(folder: Path, model_type: str) -> Path:
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type)))
    return folder


def test_a_folder_is_told_which_way_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_config(tmp_path, "exaone4"))]) == 0
    said = capsys.readouterr().out
    assert "runs as transformers' own Exaone4ForCausalLM" in said
    assert "sliding windows of 8 tokens" in said and "parallel_size: 1 to 6" in said
    assert main([str(write_config(tmp_path, "gpt2"))]) == 0
    assert "at most 128 tokens: its table of positions" in capsys.readouterr().out
    assert main([str(write_config(tmp_path, "llama"))]) == 0
    assert "runs as retool's own decoder" in capsys.readouterr().out


def test_what_runs_neither_way_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_config(tmp_path, "mamba"))]) == 1
    out = capsys.readouterr()
    assert not out.out and "layers of linear_attention" in out.err
    assert main([str(tmp_path / "nowhere")]) == 1
