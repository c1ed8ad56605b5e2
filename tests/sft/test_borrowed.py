"""A model without a file here, from the plan to an export that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.checkpoint.merge import no_progress
from retool.checkpoint.verify import verify
from retool.config import read
from retool.preflight.show import memory_words, model_words
from retool.sft.__main__ import main
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.plan import SFTReport
from retool.sft.preflight import preflight
from tests.model.zoo import make_borrowed
from tests.sft.test_command import steps, words


@pytest.fixture(scope="module")
def borrowed(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work` with another model: files call its head otherwise than transformers' module does."""
    folder = tmp_path_factory.mktemp("borrowed")
    shutil.copytree(work, folder, dirs_exist_ok=True)
    vocab = len(AutoTokenizer.from_pretrained(work / "model"))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    make_borrowed(folder / "model", "gpt_neox", vocab_size=vocab, max_position_embeddings=4096)
    return folder


def planned(work: Path, out: Path, *more: str) -> SFTReport:
    parsed = read(SFTConfig, words(work, out, *more), SYNONYMS)
    return preflight(parsed, planning=True, environment={})


def test_a_run_resumes_and_exports_what_transformers_loads(borrowed: Path, tmp_path: Path) -> None:
    every = {"trainer__save_freq": 1, "data__train_max_samples": 8}
    assert main(words(borrowed, tmp_path, **every, trainer__total_training_steps=1)) == 0
    assert main(words(borrowed, tmp_path, **every, trainer__total_training_steps=2)) == 0
    assert len(steps(tmp_path)) == 2
    export = tmp_path / "global_step_2" / "huggingface"
    loaded: Any = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()) and "embed_out.weight" in load_file(export / "model.safetensors")
    before: Any = AutoModelForCausalLM.from_pretrained(borrowed / "model")
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight.bfloat16())


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(borrowed: Path, tmp_path: Path) -> None:
    def run(name: str, count: int) -> Path:
        few = {"trainer__total_training_steps": count, "optim__lr_scheduler": "constant"}
        assert main(words(borrowed, tmp_path / name, **few)) == 0
        return tmp_path / name / f"global_step_{count}"

    whole = run("whole", 3)
    run("parts", 1)
    parts = run("parts", 3)
    assert not verify(parts, no_progress)
    again = load_file(parts / "huggingface" / "model.safetensors")
    for name, values in load_file(whole / "huggingface" / "model.safetensors").items():
        assert torch.equal(again[name], values), name


def test_the_plan_says_which_way_a_model_runs(borrowed: Path, work: Path, tmp_path: Path) -> None:
    report = planned(borrowed, tmp_path)
    assert not report.faults
    assert "runs as transformers' own GPTNeoXForCausalLM" in model_words(report)
    assert "activations counted" in memory_words(report)
    assert "runs as retool's own decoder" in model_words(planned(work, tmp_path))
    asked = model_words(planned(work, tmp_path, "model.impl=transformers"))
    assert "runs as transformers' own" in asked and "model.impl=transformers asks for it" in asked


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("model.enable_gradient_checkpointing=selective", "Use true, false or auto."),
        ("model.fp32_residual=true", "Use false."),
        ("model.use_compile=true", "Use auto."),
    ],
)
def test_what_only_our_decoder_does_is_refused(
    borrowed: Path, tmp_path: Path, word: str, wanted: str
) -> None:
    (fault,) = planned(borrowed, tmp_path, word).faults
    assert (fault.where, fault.remedy) == (word, wanted)


def test_samples_beyond_the_table_of_positions_are_refused(borrowed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(borrowed, folder)
    (folder / "model" / "model.safetensors").unlink()
    vocab = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    make_borrowed(folder / "model", "gpt2", vocab_size=vocab, max_position_embeddings=16)
    (fault,) = planned(folder, tmp_path / "run").faults
    assert (
        fault.where == "data.max_length"
        and "its table of positions (transformer.wpe)" in fault.problem
    )
    assert "data.max_length=16" in fault.remedy
