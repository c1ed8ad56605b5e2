"""Tokenizers that never end, or make more text than there is memory for: refused, soon, by the
name of their file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from retool.data.tokens import bounds
from retool.data.tokens.bounds import growth
from retool.data.tokens.load import load_tokenizer
from tests.bounded import bounded
from tests.data.conftest import conversation

__all__ = ["AutoTokenizer", "conversation"]  # imported here once, not in each child
TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer that splits at a pattern."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def token(text: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": text, **flags}


def hostile() -> dict[str, tuple[dict[str, Any], str]]:
    """What is put into a tokenizer.json, and what is said of it."""
    bytes_40 = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 40
    return {
        "replacing again and again": (
            {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 40}},
            "its normalizer may write",
        ),
        "replacing after decoding": (
            {"decoder": {"type": "Sequence", "decoders": [TWICE] * 40}},
            "its decoder may write",
        ),
        "bytes of bytes": (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": bytes_40}},
            "its pre_tokenizer may write",
        ),
        "a long text for one letter": (
            {"normalizer": {**TWICE, "content": "b" * 1_000_000}},
            "its normalizer may write 1e+06 characters for one",
        ),
        "a long text between letters": (
            {"normalizer": {**TWICE, "pattern": {"Regex": "a*"}, "content": "b" * 1000}},
            "its normalizer may write",
        ),
        "a pattern without end": ({"pre_tokenizer": split("(a+)+b")}, "gives up at a short text"),
        "a slow pattern": (
            {"pre_tokenizer": split("(?:a|a){20}[^a]")},
            "computes for more than 1 seconds",
        ),
        "a token of a million characters": (
            {"added_tokens": [token("z" * 1_000_000, 9999)]},
            "a token has 1,000,000 characters",
        ),
        "a map that is none": (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
            "gives up at a short text",
        ),
    }


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(bounds, "TRIAL_SECONDS", 1)
    return tmp_path


def change(folder: Path, changes: dict[str, Any]) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_tokenizer_is_refused_soon(folder: Path, name: str) -> None:
    changes, said = hostile()[name]
    file = change(folder, changes)
    outcome = bounded(lambda: load_tokenizer(str(folder)) and None, seconds=20, megabytes=800)
    assert outcome.error.startswith(f"ValueError: {file}: ") and said in outcome.error
    assert len(outcome.error) < 700


def test_one_that_takes_all_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "growth", lambda step: 1.0)  # whatever the settings don't tell
    monkeypatch.setattr(bounds, "TRIAL_SECONDS", 20)
    monkeypatch.setattr(bounds, "TRIAL_BYTES", 1 << 26)
    file = change(folder, {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 40}})
    outcome = bounded(lambda: load_tokenizer(str(folder)) and None, seconds=20, megabytes=800)
    assert outcome.error.startswith(f"ValueError: {file}: the tokenizer takes more than 0.0625 GiB")


def test_absurd_vocabularies_and_merges_name_the_folder(folder: Path) -> None:
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    for changed in (
        {"vocab": {**model["vocab"], "zz": -1}},
        {"merges": [*model["merges"], ["q" * 500_000, "q"]]},
    ):
        change(folder, {"model": {**model, **changed}})
        outcome = bounded(lambda: load_tokenizer(str(folder)) and None, seconds=20, megabytes=800)
        assert outcome.error.startswith("ValueError: ") and str(folder) in outcome.error
        assert len(outcome.error) < 700


def test_a_tokenizer_is_tried_once_and_again_when_its_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = list[int]()
    real = bounds._in_child
    monkeypatch.setattr(bounds, "_in_child", lambda load: tries.append(1) or real(load))
    for _ in range(2):
        load_tokenizer(str(folder))
    assert len(tries) == 1
    change(folder, {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 40}})
    with pytest.raises(ValueError, match="its normalizer may write"):
        load_tokenizer(str(folder))


def test_honest_settings_grow_little() -> None:
    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    assert growth(replace({"String": " "}, "▁")) == 1
    assert growth(replace({"Regex": r"\s+"}, " ")) == 1
    assert growth(replace({"Regex": r"\p{Han}{2}"}, "abcd")) == 2
    assert growth(replace({"Regex": "x*"}, "ab")) == 3
    assert growth({"type": "NFC"}) == 1
    many = [replace({"Regex": rf"[{mark}]"}, " ") for mark in "abcdefghijklmnopqrstuvw"]
    assert growth({"type": "Sequence", "normalizers": many}) == 1


def test_a_text_that_a_pattern_chokes_on_is_refused_by_its_row(
    folder: Path, conversation: Any
) -> None:
    from retool.data.read.files import Chunk
    from retool.data.read.source import RowFormat
    from retool.data.render.renderer import make_renderer
    from retool.data.render.rendering import Rendering
    from retool.data.tokenise import LengthLimit, tokenise_chunk

    change(folder, {"pre_tokenizer": split("(q+)+z")})  # no probe has a q
    renderer = make_renderer(load_tokenizer(str(folder)), Rendering())
    row = {
        "messages": [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "b"}]
    }
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    chunk = Chunk("rows.jsonl", 0, [row, good])
    done = tokenise_chunk(chunk, renderer, RowFormat(), LengthLimit())
    assert len(done.samples) == 1 and len(done.refusals) == 1
    assert done.refusals[0].startswith("rows.jsonl, row 0: the tokenizer gives up at this text")


STUCK = """
import sys
from retool.data.tokens import bounds
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
bounds.STUCK_SECONDS = 0.5
backend = Tokenizer(models.BPE({"a": 0}, []))
backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?:a|a){18}[^a]"), "isolated")
with bounds.stuck_ends_process():
    backend.encode("a")
print("one row done", flush=True)
with bounds.stuck_ends_process():
    backend.encode("a" * 100_000)
"""


def test_what_nothing_else_stops_ends_the_process_with_its_stack() -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.returncode == -signal.SIGPROF and done.stdout == "one row done\n"
    assert 'File "<string>", line 12' in done.stderr and time.monotonic() - begin < 30
