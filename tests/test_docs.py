"""What the documents show must run, and what they link to must be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retool.rl.objective.advantages import AdvantageInputs
from retool.rl.objective.user_functions import find_estimator, find_loss

DOCS = Path(__file__).resolve().parents[1] / "docs"


def snippets(name: str) -> dict[str, dict[str, Any]]:
    """The names that each Python block of a document defines, by its heading."""
    found = {}
    for section in (DOCS / name).read_text().split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            names: dict[str, Any] = {}
            exec(compile(code, f"{name}: {heading}", "exec"), names)
            found[heading] = names | {"code": code}
    return found


def test_what_extending_shows_is_what_it_is_called_to_be(tmp_path: Path) -> None:
    shown = snippets("extending.md")
    assert {"A reward", "A tool", "A loss", "A model family", "A rollout backend"} <= set(shown)
    score = shown["A reward"]["compute_score"]
    told = {"stop_reason": "no_call"}
    assert score("s", "so \\boxed{4}", "4", told) == {"score": 1.0, "acc": 1.0, "pred": "4"}
    path = tmp_path / "mine.py"
    path.write_text(shown["A loss"]["code"] + shown["An advantage estimator"]["code"])
    assert find_loss(f"{path}/reinforce").sequence_level
    inputs = AdvantageInputs(
        [np.array([0.0, 1.0]), np.array([0.0, 0.0])], [np.ones(2, bool)] * 2, np.array([0, 1])
    )
    advantages, _ = find_estimator(f"{path}/centred").function(inputs)
    assert advantages[0].tolist() == [0.5, 0.5] and advantages[1].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    text = path.read_text()
    made = {"keys-sft.md", "keys-rl.md"}  # by `make docs`, from the code
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert target.split("/")[-1] in made or (path.parent / target).exists(), target
    root = DOCS.parent
    for named in re.findall(
        r"`((?:retool|tests|examples|benchmarks)/[\w./]+\.(?:py|md|sh))`", text
    ):
        assert (root / named).exists(), named
