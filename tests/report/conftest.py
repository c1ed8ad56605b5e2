"""Folders of runs as training leaves them behind, small and made up, and a browser for all tests of
a session.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.config import to_dict
from retool.metrics.transcripts import Segment, Transcript, write_transcripts
from retool.rl.config import RLConfig
from retool.sft.config import SFTConfig
from tests.report.browser import Browser, chromium, missing


def write_metrics(folder: Path, entries: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def change(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def sft_run(folder: Path, steps: int = 250, lr: float = 1e-5, seed: int = 0) -> Path:
    """An SFT run: loss falls, validation every 50 steps, saves take time."""
    rng = random.Random(seed)
    entries = []
    for step in range(1, steps + 1):
        loss = 0.55 + 1.1 * math.exp(-step * lr / 4e-4) + rng.gauss(0, 0.04)
        seconds = {"data": 0.01, "forward_backward": 3.9 + rng.gauss(0, 0.1), "optimizer": 0.05}
        timing = {f"timing_s/{k}": v for k, v in seconds.items()} | {
            "timing_s/step": sum(seconds.values()) + 0.15
        }
        if step % 50 == 1 and step > 1:
            timing |= {"timing_s/testing": 6.0, "timing_s/save": 1.2}
        entries.append(
            {
                "step": step,
                "train/loss": loss,
                "train/grad_norm": 2 / math.sqrt(step) + rng.random() * 0.4,
                "train/lr": lr * min(1, step / 25),
                "train/global_tokens": 262_144,
                "train/trained_tokens": 81_000 + rng.randrange(4000),
                "train/epoch": step * 2 // (steps + 1),
                "train/mfu": 0.47 + rng.gauss(0, 0.004),
                "train/skipped_steps": 0,
                "perf/tokens_per_second_per_gpu": 31_900 + rng.gauss(0, 300),
                "perf/max_memory_allocated_gb": 22.1 if step > 3 else 19.0,
                "perf/max_memory_reserved_gb": 24.6,
                **timing,
            }
        )
        if step % 50 == 0:
            val = 0.6 + 1.1 * math.exp(-step * lr / 4e-4)
            entries.append({"step": step, "val/loss": val, "val/perplexity": math.exp(val)})
    write_metrics(folder, entries)
    config = change(
        to_dict(SFTConfig()),
        data__train_files=["train.parquet"],
        model__partial_pretrain="Qwen2.5-0.5B-Instruct",
        optim__lr=lr,
        data__max_length=16384,
        trainer__experiment_name=folder.name,
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)
    )
    return folder


QUESTION = "Every morning Aya goes for a 9-kilometer walk and stops at a coffee shop. At s km/h it takes 4 hours, including t minutes there. Find t."
CODE = "from sympy import *\ns, t = symbols('s t')\nprint(solve([9/s + t - 4, 9/(s + 2) + t - 2.4], [s, t]))"


def trajectory(step: int, rng: random.Random, split: str = "train") -> Transcript:
    """A question, a call, its result, an answer; worse ones are cut off."""
    good = rng.random() < 0.25 + step / 60
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant. You may call a function.\n<tools>\n"
        + '{"type": "function", "function": {"name": "code_interpreter"}}'
        f"\n</tools><|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    thought = "Let me write down two equations for the walking speed s and the time t in the shop, and solve them with sympy.\n"
    call = (
        '<tool_call>\n{"name": "code_interpreter", "arguments": '
        + json.dumps({"code": CODE})
        + "}\n</tool_call><|im_end|>"
    )
    result = "\n<|im_start|>user\n<tool_response>\n[(2.5, 0.4)]\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    answer = f"So t = 0.4 h, which is 24 minutes.\n\nThe answer is \\boxed{{{204 if good else 24}}}.<|im_end|>"

    def segment(role: str, text: str) -> Segment:
        tokens = [
            piece
            for word in text.splitlines(keepends=True)
            for piece in word.replace(" ", "\0 ").split("\0")
            if piece
        ]
        if role != "assistant":
            return Segment(role, text, tokens)
        return Segment(
            role, text, tokens, [-rng.expovariate(1.6) for _ in tokens], 0.9 if good else -0.6, True
        )

    segments = [
        segment("assistant", thought + call),
        segment("tool", result),
        segment("assistant", answer),
    ]
    stop = "no_call" if rng.random() < 0.8 else "length"
    return Transcript(
        step,
        prompt,
        segments,
        1.0 if good else -0.6,
        stop,
        4,
        "aime_2024" if split == "val" else "math_dapo",
        "204",
        split,
        {"acc": int(good), "pred": "204" if good else "24"},
    )


def rl_run(folder: Path, steps: int = 40, seed: int = 1) -> Path:
    """A DAPO run with a tool: the score rises, validation every 5 steps, transcripts of each step."""
    rng = random.Random(seed)
    entries = []
    for step in range(1, steps + 1):
        score = -0.55 + 1.2 * step / steps + rng.gauss(0, 0.06)
        seconds = {
            "gen": 95 + step,
            "tools": 22,
            "reward": 1.5,
            "old_log_prob": 21,
            "adv": 0.1,
            "update_actor": 74 + rng.random() * 4,
            "sync_weights": 0.6,
        }
        entry = {
            "step": step,
            "critic/score/mean": score,
            "critic/score/max": 1.0,
            "critic/score/min": -1.0,
            "critic/rewards/mean": score - 0.02,
            "response_length/mean": 2100 + 70 * step + rng.gauss(0, 120),
            "response_length/max": 16384,
            "response_length/clip_ratio": 0.04,
            "num_turns/mean": 3.1 + step / 30,
            "tool/calls": 8000 + 200 * step,
            "tool/errors": 2000 - 20 * step,
            "perf/total_num_tokens": 30_000_000,
            "tool/latency": 0.4,
            "actor/pg_loss": rng.gauss(0, 0.01),
            "actor/entropy": 0.5 - step / 160 + rng.gauss(0, 0.01),
            "actor/grad_norm": 0.2 + rng.random() * 0.1,
            "actor/lr": 1e-6,
            "actor/ppo_kl": abs(rng.gauss(0, 1e-4)),
            "stop/no_call": 7800,
            "stop/length": 330,
            "critic/acc/mean": 0.5 + score / 2,
            "perf/throughput": 5200 + rng.gauss(0, 90),
            "perf/max_memory_allocated_gb": 61.0,
            "perf/max_memory_reserved_gb": 66.0,
            "training/rollout_logp_diff_mean": 0.006,
            **{f"timing_s/{k}": v for k, v in seconds.items()},
            "timing_s/step": sum(seconds.values()) - 22 - 1.5 + 3,
        }
        if step % 5 == 0:
            accuracy = 0.1 + 0.4 * step / steps
            entry |= {
                "val-core/aime_2024/acc/mean@30": accuracy,
                "val-core/aime_2024/acc/best@30/mean": accuracy + 0.2,
                "val-core/aime_2024/acc/maj@30/mean": accuracy + 0.08,
                "val-aux/aime_2024/score/std@30": 0.4,
                "val-aux/aime_2024/num_turns/mean": 4.0,
                "timing_s/testing": 240.0,
            }
        entries.append(entry)
        write_transcripts(folder, f"train_{step:06d}", [trajectory(step, rng) for _ in range(4)])
    write_transcripts(folder, "val_000040", [trajectory(40, rng, "val") for _ in range(6)])
    write_metrics(folder, entries)
    config = change(
        to_dict(RLConfig()),
        data__train_files=["questions.parquet"],
        data__val_files=["aime_2024.parquet"],
        actor_rollout_ref__model__path="sft/global_step_62/huggingface",
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)
    )
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with chromium(tmp_path_factory.mktemp("browser")) as window:
        yield window
