"""Tokenizers from disk, and whether they split text as their own file says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retool.data.tokens.bounds import check_tokenizer
from retool.files.untrusted import shown

PROBES = (
    "In 1999, 31415926 + 0.25 = 7.",
    "if x:\n    return  y\n\n\n\tz ",
    "They're, I'LL; don't!\n\n",
    "naïve Straße 你好吗 🙂🙂",
    "a_b(c)['d'] -> <e/>",
)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a Hugging Face folder or hub id. Raises ValueError when there is none."""
    from transformers import AutoTokenizer

    if os.path.isdir(path):
        known = (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "tokenizer_config.json",
        )
        if not any(os.path.exists(os.path.join(path, name)) for name in known):
            raise ValueError(
                f"the folder {path} has no tokenizer (none of {', '.join(known)}): copy it from the "
                "model's origin."
            )
        _check_library(Path(path))
        if not trust_remote_code:  # what may run code of its own needs no bomb
            _check_bounds(Path(path))
    elif path.startswith((".", "/", "~")):
        raise ValueError(f"the model folder {path} doesn't exist.")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # transformers raises many kinds, for a config.json that contradicts itself, too
        raise ValueError(
            f"the tokenizer of {path} can't be loaded: {shown(' '.join(str(error).split()))}"
        ) from error


def _check_library(folder: Path) -> None:
    """ValueError where the only file of a tokenizer needs a package that isn't there: transformers
    tries one kind after the other then, and asks for the wrong one.
    """
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not file.is_file():
        return
    # Sentencepiece's files begin with their first piece, tiktoken's are lines of base64
    with file.open("rb") as stream:
        package = "sentencepiece" if stream.read(1) == b"\n" else "tiktoken"
    if find_spec(package) is None:
        raise ValueError(
            f"the tokenizer of {folder} is a tokenizer.model, which {package} reads: pip install "
            f"{package}. Or fetch the model's tokenizer.json, if it has one."
        )


def _check_bounds(folder: Path) -> None:
    """ValueError unless the tokenizer of a folder has bounds: by its tokenizer.json, or by the
    files that it is made from.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        check_tokenizer(file, lambda: Tokenizer.from_file(str(file)))
        return

    def make() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        return tokenizer.backend_tokenizer if tokenizer.is_fast else None

    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        if (folder / name).is_file():
            check_tokenizer(folder / name, make)
            return


def other_tokens(tokenizer: Any, folder: str | Path) -> Iterator[str]:
    """A sentence where `tokenizer` splits text otherwise than the folder's tokenizer.json.

    transformers ≥ 5 puts a model type's splitting (Qwen2's, for one) in the place of the file's.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    plain = Tokenizer.from_file(str(path))
    for probe in PROBES:
        here = tokenizer(probe, add_special_tokens=False)["input_ids"]
        there = plain.encode(probe, add_special_tokens=False).ids
        if here != there:
            yield (
                f"transformers makes {len(here)} tokens of {probe!r}, and {path} itself "
                f"{len(there)}, or others: training goes by the first, programs that read the file "
                "by the second. AutoTokenizer.from_pretrained(folder).save_pretrained(folder) "
                "makes them agree."
            )
            return
