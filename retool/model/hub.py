"""A model's folder from what the user named: a local folder, or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
UNWANTED = ["original/*", "onnx/*", "*.onnx*"]


def find_model(name: str, weights: bool = True) -> Path:
    """The folder `name`, or the local copy of the hub model `name`, fetched if it isn't in the cache yet.

    Without `weights` only what the tokenizer and the configuration need. ValueError when it is neither, or can't be fetched.
    Fetch on one process and let the others follow.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name} is no folder. Give a Hugging Face model folder with config.json, tokenizer and safetensors.")
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except Exception as error:  # network, authorisation, no such repository: the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ").rstrip(".")
        problem = f"{name} is no local folder, and the hub gives no model of that name ({reason})"
        raise ValueError(f"{problem}. Check the path; without a network, give a local folder.") from error
