"""What the README and the page on Python show must run: on one process and, under torchrun, on two."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

import retool
from examples.quickstart import model as tiny
from retool.data.read.rows import to_conversation
from retool.data.template.choose import TEMPLATES
from retool.data.tool_schema import schema_of
from retool.rl.data import PromptOptions, to_question
from retool.rl.reward.source import own_reward
from tests.ranks import run_ranks
from tests.test_docs import fenced


def the_sharding_one(repository: Path) -> str:
    blocks = fenced(repository / "docs/python.md", "python")
    (code,) = [block for block in blocks if "shard(" in block]
    return code


def train(code: str) -> tuple[int, float, float]:
    """(ranks that share the parameters, global gradient norm, updates) after the sample."""
    names: dict[str, Any] = {}
    exec(code, names)
    model = names["model"]
    return model.layout.shards, float(model.grad_norm()), float(names["optimizer"].steps)


def test_the_sharding_sample_trains_on_one_process_and_on_two(repository: Path) -> None:
    code = the_sharding_one(repository)
    for processes in (1, 2):
        said = [train(code)] if processes == 1 else run_ranks(train, 2, code)
        assert len(set(said)) == 1  # the ranks agree
        shards, norm, updates = said[0]
        assert (shards, updates) == (processes, 1) and norm > 0


def test_a_row_of_each_kind_is_what_the_commands_read(repository: Path) -> None:
    rows = [json.loads(block) for block in fenced(repository / "README.md", "json")]
    (sft,) = [row for row in rows if "messages" in row]
    (rl,) = [row for row in rows if "prompt" in row]
    assert to_conversation(sft, "README.md", 0).assistant_turns == [1, 3]
    assert to_question(rl, "README.md", 0, PromptOptions()).ground_truth == "391"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer with a chat template, in the place of a hub's."""
    folder = tmp_path_factory.mktemp("standin") / "model"
    texts = ["What is 2 + 2?", "You are a tool. 4", "0 1 2 3 4 5 6 7 8 9"]
    tokenizer = tiny.train_tokenizer(texts)
    tiny.write_tokenizer(folder, tokenizer, TEMPLATES["hermes"].read_text())
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_a_model_is_trained_and_asked_from_python(
    page: str,
    repository: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = [block for block in fenced(repository / page, "python") if "retool.sft(" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model)), names)
    last = names["result"].last
    assert names["result"].finished and (last.get("train/loss") or last["critic/score/mean"])
    assert names["output"].outputs[0].finish_reason in ("stop", "length")


def test_the_page_on_python_gives_rl_arguments_that_it_takes(repository: Path) -> None:
    code = next(
        block for block in fenced(repository / "docs/python.md", "python") if "rl(" in block
    )
    names: dict[str, Any] = {}
    exec(code, names)
    takes = inspect.signature(retool.rl)  # type: ignore[arg-type]
    names["retool"] = SimpleNamespace(rl=takes.bind)
    given = names["train"]("model", []).arguments
    own_reward(given["reward"])
    assert [schema_of(tool)["function"]["name"] for tool in given["tools"][:1]] == ["price_of"]


def test_the_page_on_trl_gives_arguments_that_are_taken(repository: Path) -> None:
    (code,) = fenced(repository / "docs/from-trl.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    takes = {name: inspect.signature(getattr(retool, name)).bind for name in ("sft", "rl")}
    names["retool"] = SimpleNamespace(**takes)
    assert names["fine_tune"]([]).arguments["batch_size"] == 32
    assert names["improve"]([], len, len).arguments["num_generations"] == 8
