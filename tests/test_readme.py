"""What the README shows must run."""

from __future__ import annotations

import re
from pathlib import Path

from retool.config import parse
from retool.sft.config import SYNONYMS, SFTConfig


def blocks(repository: Path, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL
    )


def test_the_library_example_trains(repository: Path) -> None:
    (code,) = blocks(repository, "python")
    names: dict[str, object] = {}
    exec(code + "\nstart = model.module[0][0].weight.detach().clone()\n", names)
    model = names["model"]
    optimizer = names["optimizer"]
    assert float(optimizer.steps) == 1 and float(model.grad.norm()) > 0  # type: ignore[attr-defined]


def test_the_command_parses(repository: Path) -> None:
    command = next(b for b in blocks(repository, "bash") if "retool.sft" in b)
    words = [w for w in command.replace("\\\n", " ").split() if "=" in w and not w.startswith("--")]
    config = parse(SFTConfig, words, SYNONYMS)
    assert config.ulysses_sequence_parallel_size == 2 and config.data.train_batch_size == 16


def test_every_file_it_links_to_is_there(repository: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (repository / "README.md").read_text()):
        assert (repository / target).exists(), target
