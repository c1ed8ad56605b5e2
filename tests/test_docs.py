"""What the documents show must run, the keys they name must exist, and what they link to must be there."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from retool.config import ConfigError, parse
from retool.config.elsewhere import key_for
from retool.config.schema import leaves
from retool.rl.agent.formats.table import FORMATS
from retool.rl.config import RLConfig
from retool.rl.config import names as rl_names
from retool.rl.objective.advantages import AdvantageInputs
from retool.rl.objective.user_functions import find_estimator, find_loss
from retool.sft.config import SYNONYMS, SFTConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
MADE = {"keys-sft.md", "keys-rl.md"}  # by `make docs`, from the code
GROUPS = "data|model|optim|trainer|algorithm|actor_rollout_ref|reward_model|custom_reward_function"
KEY = re.compile(rf"(?<![\w./-])((?:{GROUPS}|engine|checkpoint)(?:\.[a-z]\w*)+)(?![\w/(])")
FILES = (".py", ".pt", ".parquet", ".jsonl", ".csv", ".json", ".yaml", ".safetensors")
COLUMNS = {"reward_model.ground_truth"}  # of a row, with the name of a group of keys
COMMAND = re.compile(r"(?:-m retool\.|retool )(sft|rl)\b(.*)", re.DOTALL)


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@cache
def keys(command: str) -> frozenset[str]:
    """Everything that a command takes for a key."""
    if command == "sft":
        return frozenset([*(leaf.key for leaf in leaves(SFTConfig)), *SYNONYMS])
    ours = (leaf.key for leaf in leaves(RLConfig))
    return frozenset([*ours, *rl_names.SYNONYMS, *rl_names.IGNORED])


def is_key(name: str) -> bool:
    """Whether it is a key of either command, an entry of a mapping, or a group of keys."""
    mapping = "data.apply_chat_template_kwargs."
    return name.startswith(mapping) or any(
        known == name or known.startswith(name + ".") for known in keys("sft") | keys("rl")
    )


def rows_of(path: Path, heading: str) -> Iterator[list[str]]:
    """Rows of the tables below a heading, without their own."""
    section = path.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


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
    assert inspect.iscoroutinefunction(shown["A loop"]["checked"])
    world = shown["An environment"]["Echo"]()
    asked = [{"role": "user", "content": "?"}]
    assert len(world.reset({"reward_model": {"ground_truth": "4"}, "prompt": asked})) == 2
    assert world.step({"role": "assistant", "content": "It is 4."})[1:] == (1.0, True)
    advantages, _ = find_estimator(f"{path}/centred").function(inputs)
    assert advantages[0].tolist() == [0.5, 0.5] and advantages[1].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    for target in [*links, *re.findall(r'<img src="([^"]+)"', text)]:
        assert target.split("/")[-1] in MADE or (path.parent / target).exists(), target
    for named in re.findall(
        r"`((?:retool|tests|examples|benchmarks)/[\w./]+\.(?:py|md|sh))`", text
    ):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_key_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text().split("\n## Not here\n")
    named = KEY.findall(text[0])
    for row in text[1:]:
        named += [
            key for line in row.splitlines() for key in KEY.findall(line.rpartition(" | ")[2])
        ]
    wrong = {key for key in named if not key.endswith(FILES) and not is_key(key)} - COLUMNS
    assert not wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_commands_that_a_document_shows_are_understood(path: Path) -> None:
    for block in fenced(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := COMMAND.search(line.partition(" # ")[0]):
                understood(found[1], [w for w in shlex.split(found[2]) if "=" in w])


def understood(command: str, words: list[str]) -> None:
    """Every word is a key of the command with a value it takes; what isn't given stands in a file."""
    words = [word for word in words if not word.startswith("config=")]
    required = {"sft": "model.partial_pretrain=m", "rl": "actor_rollout_ref.model.path=m"}
    words = ["data.train_files=t.jsonl", required[command], *words]
    if command == "sft":
        parse(SFTConfig, words, SYNONYMS)
    else:
        parse(RLConfig, words, rl_names.SYNONYMS, rl_names.IGNORED)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_settings_that_a_document_shows_are_understood(path: Path, tmp_path: Path) -> None:
    for index, block in enumerate(fenced(path, "yaml")):
        content = yaml.safe_load(block)
        if "data" not in content:
            continue  # tools
        file = tmp_path / f"{index}.yaml"
        file.write_text(block)
        if "actor_rollout_ref" in content:
            parse(RLConfig, [f"config={file}"], rl_names.SYNONYMS, rl_names.IGNORED)
        else:
            parse(SFTConfig, [f"config={file}"], SYNONYMS)


def test_what_isnt_here_is_refused() -> None:
    for row in rows_of(DOCS / "from-verl.md", "Not here"):
        for key in code_in(row[0]):
            assert not is_key(key), key


def test_what_trl_calls_a_key_is_what_the_help_offers_for_it() -> None:
    seen = 0
    for heading, command in (("`SFTConfig`", "sft"), ("`GRPOConfig`", "rl")):
        for row in rows_of(DOCS / "from-trl.md", heading):
            ours = [word.partition("=")[0] for word in code_in(row[1])]
            for name in code_in(row[0]):
                offered = key_for(name.partition("=")[0], keys(command))
                if offered is None or "=" in name or not ours:
                    continue
                seen += 1
                assert any(offered in (key, *related(key)) for key in ours), (name, offered)
    assert seen > 30


def related(key: str) -> list[str]:
    """Other keys for the same: the group of a key given by its end, both ways to cut a batch."""
    whole = [known for known in keys("rl") if key.startswith(".") and known.endswith(key)]
    also = {
        "data.train_batch_size": ["data.micro_batch_size_per_gpu"],
        "actor_rollout_ref.actor.clip_ratio_low": ["actor_rollout_ref.actor.clip_ratio"],
    }
    return [*whole, *also.get(key, [])]


def test_the_page_on_tools_has_every_format_of_calls() -> None:
    rows = [code_in(row[0]) for row in rows_of(DOCS / "tools.md", "How calls are written")]
    assert [row[0] for row in rows] == [*FORMATS, "FILE.py/function"]


def texts_of_the_code() -> str:
    """Every text that the code holds; an f-string's values are gone from between its parts."""
    found = []
    for path in sorted((ROOT / "retool").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_that_troubleshooting_explains_are_the_codes() -> None:
    said = texts_of_the_code()
    page = (DOCS / "troubleshooting.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    parts = [part.strip() for row in rows for text in code_in(row) for part in text.split("…")]
    assert len(parts) > 60
    assert [part for part in parts if part not in said] == []


def test_a_wrong_key_would_be_found() -> None:
    assert KEY.findall("`data.max_lenght=1`") == ["data.max_lenght"] and not is_key(
        "data.max_lenght"
    )
    assert KEY.findall("see retool/data.py, `a/model.safetensors`") == []
    with pytest.raises(ConfigError):
        understood("sft", ["optim.learning=1"])
