"""Reinforcement learning of a mixture of experts: its balance, and the sampler's choices replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from retool.rl.__main__ import main
from tests import warm
from tests.rl.conftest import make
from tests.rl.test_command import ARR, TORCHRUN, steps, words

REPLAY = f"{ARR}rollout.enable_rollout_routing_replay=true"


def write_experts(folder: Path) -> None:
    """A random mixture of experts in place of the folder's model."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=64,
        moe_intermediate_size=32,
        intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.15,
        output_router_logits=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("bypass", [False, True])
def test_a_run_replays_what_was_sampled(tmp_path: Path, bypass: bool) -> None:
    work = make(tmp_path / "work")
    write_experts(work / "model")
    more = [REPLAY, "trainer.total_training_steps=2", f"{ARR}actor.ppo_mini_batch_size=2"]
    if bypass:
        more.append("algorithm.rollout_correction.bypass_mode=true")
    assert main(words(work, tmp_path / "run", *more)) == 0
    logged = steps(tmp_path / "run")
    assert len(logged) == 2
    for step in logged:
        assert 0 < step["router/logp_diff_mean_without_replay"] < 1e-4
        assert step["training/rollout_logp_diff_mean"] < 1e-4
        # A token has two experts: 2 at perfect balance
        assert 1.9 < step["router/balance_loss"] < 6
        assert step["router/least_used"] <= 1 <= step["router/most_used"]
    exported = tmp_path / "run/global_step_2/actor/huggingface"
    assert AutoModelForCausalLM.from_pretrained(exported).config.num_experts == 6


@pytest.mark.slow
def test_two_ranks_divide_experts(tmp_path: Path) -> None:
    """Each has an engine with all experts, and a half of them to train."""
    work = make(tmp_path / "work")
    write_experts(work / "model")
    divided = f"{ARR}actor.fsdp_config.expert_parallel_size=2"
    more = [REPLAY, divided, "trainer.total_training_steps=2", f"{ARR}actor.ppo_mini_batch_size=2"]
    done = warm.run([*TORCHRUN, *words(work, tmp_path / "run", *more)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "experts divided over 2" in done.stdout
    logged = steps(tmp_path / "run")
    assert len(logged) == 2
    for step in logged:
        assert step["training/rollout_logp_diff_mean"] < 1e-4
        assert 1.9 < step["router/balance_loss"] < 6
    exported = tmp_path / "run/global_step_2/actor/huggingface"
    assert AutoModelForCausalLM.from_pretrained(exported).config.num_experts == 6


def test_replay_without_experts_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(work, tmp_path, REPLAY, "--check")) == 1
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert (
        "enable_rollout_routing_replay=true: a qwen2 model has no experts. Leave the key out."
        in said
    )
