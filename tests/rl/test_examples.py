"""The examples of reinforcement learning, run as their first lines say."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import custom_data, custom_reward, rl_from_scratch
from examples.retool_recipe import CustomRLHFDataset, compute_score
from retool.metrics import read_jsonl
from retool.rl.__main__ import main
from retool.rl.agent.tools.load import load_tools
from tests import warm
from tests.real_data import real
from tests.rl.test_command import ARR, words
from tests.rl.test_config import PUBLISHED

EXAMPLES = Path(custom_data.__file__).parent


@pytest.mark.slow
def test_from_python(work: Path, tmp_path: Path) -> None:
    """The example as its first lines say."""
    conversations = tmp_path / "conversations.jsonl"
    question = {"role": "user", "content": "What is 1 + 2?"}
    row = {"messages": [question, {"role": "assistant", "content": "3"}]}
    conversations.write_text(8 * (json.dumps(row) + "\n"))
    asked = [work / "model", conversations, work / "train.jsonl"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "from_python.py", *asked],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished at step 2 of 2: runs/rl" in done.stdout


def test_rl_from_scratch_learns(work) -> None:
    means = rl_from_scratch.main(work / "model", 25)
    assert sum(means[-3:]) > sum(means[:3]) + 0.3, means


# In a process that finds nothing of the repository but the package
ALONE = """
import os, sys
model, folder = sys.argv[1:]
others = [path for path in sys.path if not os.path.isdir(os.path.join(path, "examples"))]
sys.path[:] = [folder, *others]
for name in [*sys.modules]:
    if name.split(".")[0] in ("examples", "tests"):
        del sys.modules[name]
import custom_data, custom_reward, custom_tool, retool_recipe, rl_from_scratch
rl_from_scratch.main(model, 1)
try:
    import examples
except ModuleNotFoundError:
    print("nothing else is found")
"""


def test_copied_out_of_the_repository_they_need_nothing_but_the_package(
    work, tmp_path, repository
) -> None:
    for name in ("rl_from_scratch", "custom_reward", "custom_tool", "custom_data", "retool_recipe"):
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    (tmp_path / "retool").symlink_to(repository / "retool")
    done = warm.run([sys.executable, "-c", ALONE, work / "model", tmp_path])
    assert done.returncode == 0 and "step 1: score" in done.stdout, done.stderr
    assert "nothing else is found" in done.stdout


def test_custom_reward() -> None:
    extra = {"stop_reason": "no_call"}
    assert custom_reward.compute_score("", "\\boxed{4}", "4", extra) == {
        "score": 1.0,
        "acc": 1.0,
        "pred": "4",
    }
    assert custom_reward.compute_score("", "\\boxed{3}", "4", extra)["score"] == pytest.approx(
        0.3 * 0.75
    )
    assert custom_reward.compute_score("", "?", "4", {"stop_reason": "length"})["score"] == -0.5


def test_custom_tool(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (tmp_path / "tools.yaml").write_text(
        "tools:\n  - class_name: custom_tool.PriceList\n    config: {prices: {apple: 3, pear: 5}}\n"
    )
    (tool,) = load_tools(tmp_path / "tools.yaml")
    assert asyncio.run(tool.call({"fruit": "pear"})).text == "5" and tool.name == "price_of"
    assert asyncio.run(tool.call({"fruit": 7})).status == "error"


def test_custom_data_reward_and_tool_in_one_run(work, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (tmp_path / "tools.yaml").write_text(
        "tools:\n  - class_name: custom_tool.PriceList\n    config: {prices: {apple: 3}}\n"
    )
    (tmp_path / "sums.csv").write_text(
        "question,answer,topic\n" + "".join(f"{i} + {i}?,{2 * i},sums\n" for i in range(4))
    )
    more = [
        f"data.train_files={tmp_path}/sums.csv",
        f"data.custom_cls.path={EXAMPLES}/custom_data.py",
        "data.custom_cls.name=read_csv",
        f"custom_reward_function.path={EXAMPLES}/custom_reward.py",
        "custom_reward_function.name=compute_score",
        "data.max_prompt_length=1500",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_config_path={tmp_path}/tools.yaml",
        "trainer.total_training_steps=1",
    ]
    assert main(words(work, tmp_path / "run", *more)) == 0
    (entry,) = [e for e in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "timing_s/step" in e]
    assert entry["critic/score/min"] == -0.5 and entry["reward/exceptions"] == 0


def test_recipe_reads_both_schemas(tmp_path) -> None:
    first = next(iter(CustomRLHFDataset(str(real("dapo-math-17k/dapo_math_17k.parquet")))))
    assert first["reward_model"] == {"ground_truth": "34"} and first["prompt"][0][
        "content"
    ].endswith("goes here.'}")
    (tmp_path / "aime.jsonl").write_text('{"Problem": "1+1?", "Answer": 2}\n')
    assert next(iter(CustomRLHFDataset(str(tmp_path / "aime.jsonl"))))["data_source"] == "aime"
    assert compute_score("", "\\boxed{2}", "2", {"num_turns": 2})["score"] == 1.0


def test_the_script_is_the_published_command(work, tmp_path) -> None:
    """Its words are those of the published list but for paths, the engine's name and its split; and
    it plans for two GPUs.
    """
    fake = tmp_path / "bin" / "torchrun"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$WORDS"\n')
    fake.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "WORDS": str(tmp_path / "words"),
        "MODEL_PATH": str(work / "model"),
        "TRAIN": f"{work}/train.jsonl",
        "EVAL": f"{work}/val.jsonl",
    }
    subprocess.run(["bash", str(EXAMPLES / "dapo_qwen2_5.sh")], check=True, env=environment)
    given = dict(
        word.split("=", 1)
        for word in (tmp_path / "words").read_text().splitlines()
        if "=" in word and not word.startswith("-")
    )
    published = dict(word.split("=", 1) for word in PUBLISHED)
    different = {
        key
        for key in given
        if str(given[key]).replace("'", "").replace('"', "")
        != str(published.get(key)).replace("'", "")
    }
    assert different <= {
        "data.train_files",
        "data.val_files",
        "data.custom_cls.path",
        "custom_reward_function.path",
        f"{ARR}model.path",
        "trainer.logger",
        "trainer.default_local_dir",
        f"{ARR}rollout.name",
        f"{ARR}rollout.tensor_model_parallel_size",
    }, different
    smaller = [
        "trainer.n_gpus_per_node=2",
        "data.train_batch_size=16",
        f"{ARR}actor.ppo_mini_batch_size=8",
        "trainer.device_memory_gb=80",
    ]
    assert main([*(f"{key}={value}" for key, value in given.items()), *smaller, "--check"]) == 0
