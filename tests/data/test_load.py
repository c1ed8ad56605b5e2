"""Tokenizers from disk: what transformers makes of a folder, next to what its tokenizer.json says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retool.data.tokens.load import load_tokenizer, other_tokens
from tests import warm
from tests.real_data import real


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2 folder whose own splitting keeps numbers together, which Qwen2's doesn't."""
    vocab = {
        token: i
        for i, token in enumerate(
            [*sorted(pre_tokenizers.ByteLevel.alphabet()), "19", "<|im_end|>"]
        )
    }
    raw = Tokenizer(models.BPE(vocab, [("1", "9")]))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return tmp_path


def test_another_splitting_is_said_and_can_be_mended(folder: Path) -> None:
    (said,) = other_tokens(load_tokenizer(str(folder)), folder)
    assert "In 1999" in said and "29 tokens" in said and "itself 28" in said
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert not list(other_tokens(load_tokenizer(str(folder)), folder))


def test_the_same_splitting_is_not() -> None:
    folder = real("qwen2.5-tokenizer")
    assert not list(other_tokens(load_tokenizer(str(folder)), folder))


def test_the_audit_says_it(folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    command = [
        sys.executable,
        "-m",
        "retool.data",
        "audit",
        str(folder / "rows.jsonl"),
        "--model",
        str(folder),
        "--num-workers",
        "0",
    ]
    done = warm.run(command)
    assert "note: transformers makes 29 tokens" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("begins", "package"), [(b"\n\x0e<unk>", "sentencepiece"), (b"IQ== 0\n", "tiktoken")]
)
def test_a_tokenizer_that_a_missing_package_reads_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: bytes, package: str
) -> None:
    monkeypatch.setattr("retool.data.tokens.load.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(begins)
    with pytest.raises(ValueError, match=rf"which {package} reads: pip install {package}\."):
        load_tokenizer(str(tmp_path))
