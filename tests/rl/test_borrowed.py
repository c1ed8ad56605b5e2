"""RL of a model that has no file here: it trains and samples as transformers' module."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.rl.__main__ import main
from tests import warm
from tests.model.zoo import make_borrowed
from tests.rl.test_command import ARR, TORCHRUN, steps, words

HF = f"{ARR}rollout.name=hf"


def write_borrowed(folder: Path, work: Path, **more: Any) -> None:
    """`work` with a model of another architecture."""
    shutil.copytree(work, folder, dirs_exist_ok=True)
    vocab = len(AutoTokenizer.from_pretrained(work / "model"))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    shape = {"vocab_size": vocab, "max_position_embeddings": 4096, **more}
    make_borrowed(folder / "model", "glm", **shape)


@pytest.fixture(scope="module")
def borrowed(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work` with another model."""
    folder = tmp_path_factory.mktemp("borrowed")
    write_borrowed(folder, work)
    return folder


def test_one_step(borrowed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The sampler is the trainer's model, and what is exported isn't what it was."""
    assert main(words(borrowed, tmp_path, HF, "trainer.total_training_steps=1")) == 0
    assert "transformers' continuous batching samples" in capfd.readouterr().out
    (entry,) = steps(tmp_path)
    assert entry["training/rollout_logp_diff_mean"] < 1e-4
    assert entry["actor/grad_norm"] > 0


@pytest.mark.slow  # `tests/engine/test_hf.py` has what it says
def test_our_engine_refuses_it(
    borrowed: Path, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(borrowed, tmp_path, "--check")) == 1
    said = "".join(capfd.readouterr())
    assert f"{ARR}rollout.name=native: model_type glm runs as transformers' module" in said
    assert f"Use {ARR}rollout.name=hf" in said
    # A model that has a file here can be had as ours
    ours = words(work, tmp_path, f"{ARR}model.impl=transformers", "--check")
    assert main(ours) == 1
    assert f"Use {ARR}model.impl=auto, or " in "".join(capfd.readouterr())


@pytest.mark.slow
def test_two_ranks_with_a_reference_and_tools(borrowed: Path, tmp_path: Path) -> None:
    """Each gathers what both share; KL to a frozen policy, entropy, a tool, validation, an export."""
    out = tmp_path / "run"
    more = [
        HF,
        "trainer.total_training_steps=2",
        "trainer.val_before_train=true",
        f"data.val_files={borrowed}/val.jsonl",
        f"{ARR}rollout.free_cache_engine=true",
        f"{ARR}rollout.val_kwargs.do_sample=false",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_config_path={borrowed}/tools.yaml",
        f"{ARR}rollout.multi_turn.tool_isolation=best_effort",
        f"{ARR}actor.use_kl_loss=true",
        f"{ARR}actor.entropy_coeff=0.01",
        f"{ARR}actor.ulysses_sequence_parallel_size=2",
    ]
    done = warm.run([*TORCHRUN, *words(borrowed, out, *more)], timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = steps(out)
    assert len(found) == 2
    for entry in found:
        assert entry["training/rollout_logp_diff_mean"] < 1e-4
        assert entry["actor/grad_norm"] > 0 and "actor/kl_loss" in entry
    export = out / "global_step_2" / "actor" / "huggingface"
    loaded: Any = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(loaded[1].values())


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "free"), [(8, "true"), (64, "true"), (64, "false")])
def test_on_a_gpu(work: Path, tmp_path: Path, head_dim: int, free: str) -> None:
    """With heads of 64 flash-attn samples where it is there; not every build of it takes heads of 8."""
    folder = tmp_path / "borrowed"
    write_borrowed(folder, work, head_dim=head_dim)
    more = [
        HF,
        "trainer.total_training_steps=2",
        "data.max_response_length=64",
        f"{ARR}rollout.free_cache_engine={free}",
        f"{ARR}rollout.gpu_memory_utilization=0.05",
    ]
    assert main(words(folder, tmp_path / "run", *more)) == 0
    for entry in steps(tmp_path / "run"):
        gap = entry["training/rollout_logp_diff_mean"]
        print(f"\nstep {entry['step']}: gap {gap:.4f}, gen {entry['timing_s/gen']:.2f} s")
        assert gap < 2e-2
