"""A model's folder from what the user named: a local folder, or a Hugging Face hub id. And what its
small files say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retool.files.untrusted import read_bytes

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# .py: tokenizers with code of their own
WANTED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
]
UNWANTED = ["original/*", "onnx/*", "*.onnx*"]
ADAPTER = "adapter_config.json"  # peft's
MAX_JSON_BYTES = 100 << 20  # a tokenizer.json has 10 or 20 MB


def find_model(name: str, weights: bool = True) -> Path:
    """The folder `name`, or the local copy of the hub model `name`, fetched if it isn't in the
    cache yet.

    Without `weights` only what the tokenizer and the configuration need. ValueError when it is
    neither, or can't be fetched. Fetch on one process and let the others follow.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(
            f"{name} is no folder. Give a Hugging Face model folder with config.json, tokenizer and "
            "safetensors, or a model of the hub: org/name."
        )
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except (
        Exception
    ) as error:  # network, authorisation, no such repository: the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ").rstrip(".")
        problem = f"{name} is no local folder, and the hub gives no model of that name ({reason})"
        raise ValueError(
            f"{problem}. Check the path; without a network, give a local folder."
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a model's folder holds.

    ValueError names the file where it holds anything else.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: that is no file of a model. Fetch it again.")
    data = read_bytes(path, MAX_JSON_BYTES)  # no pipe, which would be waited for
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(
            f"{path} is no JSON file: it is nested without end. Fetch it again."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a JSON object. Fetch it again."
        )
    return content


def require_no_adapter(folder: Path) -> None:
    """ValueError where a folder holds a LoRA adapter, alone or beside weights that it may be part of."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = read_json_object(path).get("base_model_name_or_path")
    told = f" of {base}" if isinstance(base, str) and base.isprintable() and len(base) < 200 else ""
    raise ValueError(
        f"{folder} holds an adapter{told} ({ADAPTER}), and only whole models are read. Merge it, with "
        f"peft's AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload(), and save "
        f"that. If the weights beside it are merged already, take {ADAPTER} away."
    )


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that the model's own files say end a text: `eos_token_id` of
    generation_config.json and config.json, a number or a list in either; none where neither tells.

    ValueError, with the file's name, where one isn't what such a file is.
    """
    names = ("generation_config.json", "config.json")
    return tuple(dict.fromkeys(token for name in names for token in eos_ids_of(folder / name)))


def eos_ids_of(path: Path) -> tuple[int, ...]:
    """`eos_token_id` of one file; none where it isn't there. Raises ValueError as `eos_ids` does."""
    said = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if said is None:
        return ()
    ids: list[Any] = said if isinstance(said, list) else [said]
    if not all(type(token) is int for token in ids):
        raise ValueError(
            f"{path} holds no token ids as eos_token_id ({said!r:.80}). Fetch it again."
        )
    return tuple(ids)
