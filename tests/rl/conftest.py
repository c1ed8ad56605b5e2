"""The small tokenizer and templates of the data tests, and trajectories made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.quickstart import data, model
from retool.data.template.choose import TEMPLATES
from retool.rl.reward.calling import Asked
from retool.rl.reward.protocol import Judged, Judges
from retool.rl.types import Prompt, Stop, Trajectory
from tests.data.conftest import conversation, qwen_tokenizer, renderer_of, tokenizer, tool_row

__all__ = ["conversation", "qwen_tokenizer", "renderer_of", "tokenizer", "tool_row"]


def make_prompt(index=0, ids=(1, 2, 3), truth="4", source="numbers", extra=None):
    return Prompt(
        index,
        [{"role": "user", "content": "?"}],
        None,
        np.asarray(ids, np.int32),
        source,
        truth,
        extra or {},
    )


def make_trajectory(
    prompt=None,
    sample=0,
    response=(5, 6, 7),
    mask=None,
    logp=None,
    stop=Stop.NO_CALL,
    version=0,
    text="",
    **changes,
):
    """A trajectory whose response is all sampled unless `mask` says otherwise."""
    prompt = prompt or make_prompt()
    n = len(prompt.ids)
    mask = np.asarray(
        [False] * n + list(mask if mask is not None else [True] * len(response)), bool
    )
    full = np.zeros(len(mask), np.float32)
    full[mask] = -0.5 if logp is None else logp
    numbers = {
        "num_turns": 2,
        "tool_calls": 0,
        "tool_errors": 0,
        "tool_timeouts": 0,
        "tool_seconds": 0.0,
        **changes,
    }
    tokens = np.concatenate([prompt.ids, np.asarray(response, np.int32)])
    return Trajectory(
        prompt,
        sample,
        tokens,
        n,
        mask,
        full,
        full.copy(),
        stop,
        policy_version=version,
        assistant_text=text,
        **numbers,
    )


async def judged_by(judges: Judges, trajectory: Trajectory) -> Judged:
    """As a rollout has it judged."""
    return await judges.score(Asked.about(trajectory, judges.seen))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """`model/` (two layers, random), `train.jsonl` (24 questions), `val.jsonl` (3)."""
    return make(tmp_path_factory.mktemp("rl"))


def make(folder: Path) -> Path:
    """`work` in a folder of one's own."""
    folder.mkdir(exist_ok=True)
    problems = data.make_problems(27, seed=0)
    texts = [message["content"] for p in problems for message in data.to_row(p, "t")["messages"]]
    tokenizer = model.train_tokenizer([*texts, json.dumps(data.TOOL)])
    model.write_tokenizer(folder / "model", tokenizer, TEMPLATES["hermes"].read_text())
    write_model(folder / "model", tokenizer.get_vocab_size())
    for name, part in (("train", problems[3:]), ("val", problems[:3])):
        rows = [
            {
                "data_source": "shop",
                "prompt": [{"role": "user", "content": p[0].text}],
                "reward_model": {"ground_truth": str(p[0].answer)},
            }
            for p in part
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tools.yaml").write_text(
        "tools:\n  - class_name: retool.rl.agent.tools.CodeInterpreter\n    config: {num_workers: 2, default_timeout: 10}\n"
    )
    return folder


def write_model(folder: Path, vocab: int) -> None:
    """One layer of 64 dimensions, random: enough to learn to write digits."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
