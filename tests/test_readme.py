"""What the README shows must run: its Python on one process and, where torchrun may start it, on two."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retool.data.read.rows import to_conversation
from retool.rl.data import PromptOptions, to_question
from tests.ranks import run_ranks
from tests.test_docs import fenced


def python_blocks(repository: Path) -> list[str]:
    return fenced(repository / "README.md", "python")


def the_sharding_one(repository: Path) -> str:
    (code,) = [block for block in python_blocks(repository) if "shard(" in block]
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


def test_every_name_that_a_sample_imports_from_retool_is_there(repository: Path) -> None:
    for block in python_blocks(repository):
        for line in re.findall(r"^(?:from|import) retool.*$", block, re.MULTILINE):
            exec(line, {})
