"""A run of a mixture of experts whose ranks divide them, from the plan to one that goes on without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.sft.__main__ import main
from tests import warm
from tests.model.tiny import make
from tests.sft.test_command import TORCHRUN, steps, words

DIVIDED = "model.fsdp_config.expert_parallel_size=2"


@pytest.fixture(scope="module")
def mixture(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work` with a model of eight experts."""
    folder = tmp_path_factory.mktemp("mixture")
    shutil.copytree(work, folder, dirs_exist_ok=True)
    vocab = len(AutoTokenizer.from_pretrained(work / "model"))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    make(folder / "model", "qwen3_moe", vocab_size=vocab, max_position_embeddings=4096)
    return folder


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_alone(mixture: Path, tmp_path: Path) -> None:
    """Both ranks and one rank train alike, so it doesn't matter who does which step."""
    few = {"data__train_max_samples": 8, "trainer__total_training_steps": 2}
    micro = {"data__micro_batch_size_per_gpu": 4, "optim__lr_scheduler": "constant"}
    whole = tmp_path / "whole"
    assert main(words(mixture, whole, **few, **micro)) == 0
    parts = tmp_path / "parts"
    begun = few | {"trainer__total_training_steps": 1}
    done = warm.run([*TORCHRUN, *words(mixture, parts, DIVIDED, **begun, **micro)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "experts divided over 2" in done.stdout
    assert main(words(mixture, parts, **few, **micro)) == 0
    for wanted, found in zip(steps(whole), steps(parts), strict=True):
        for name in ("train/loss", "train/grad_norm", "router/balance_loss"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    exported = AutoModelForCausalLM.from_pretrained(parts / "global_step_2" / "huggingface")
    assert exported.config.num_experts == 8


@pytest.mark.slow
def test_what_divided_experts_send_is_in_the_plan(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = ("trainer.nnodes=2", "trainer.n_gpus_per_node=2", "trainer.device_memory_gb=80")
    assert main(words(mixture, tmp_path, DIVIDED, "--check", *box, "trainer.device=auto")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "experts divided over 2" in said
    assert "GB a step from each GPU in exchanges that leave the machine" in said


@pytest.mark.slow
def test_one_process_cannot_divide(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(mixture, tmp_path, DIVIDED, "--check")) == 1
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    wanted = "expert_parallel_size=2: does not fit the 1 processes that share a parameter"
    assert wanted in said
