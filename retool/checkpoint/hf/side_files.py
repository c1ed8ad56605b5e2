"""Everything but the weights of a Hugging Face folder: config, tokenizer, chat template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from retool.files.untrusted import read_bytes
from retool.model.hub import eos_ids_of, read_json_object

MOST_CONFIG_BYTES = 16 << 20  # real ones have a few thousand
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}  # .py: own tokenizers
GENERATION = "generation_config.json"
CONFIGS_WITH_DTYPE = ("config.json", GENERATION)
MORE_TEMPLATES = "additional_chat_templates"
NOT_SIDE = re.compile(
    r".*\.index\.json|trainer_state\.json|training_args\.json|README.*|requirements\.txt",
    re.IGNORECASE,
)


def copy_side_files(
    source: Path, target: Path, dtype: torch.dtype, chat_template: str | None = None
) -> None:
    """Copy everything but the weights from one Hugging Face folder to another, byte for byte.

    Only the dtype fields of config.json and generation_config.json change. A `chat_template` takes
    the place of the model's own.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == MORE_TEMPLATES:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.suffix in SIDE_SUFFIXES and not NOT_SIDE.fullmatch(path.name):
            if path.name in CONFIGS_WITH_DTYPE:
                text = with_dtype(_text(path), dtype, add=path.name == "config.json")
                (target / path.name).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, target / path.name)
    if chat_template is not None:
        write_template(target, chat_template)


def write_template(folder: Path, template: str) -> None:
    """Make `template` the only chat template of a tokenizer's folder, wherever its own ones were.

    It goes into chat_template.jinja and, for readers that look only there, into
    tokenizer_config.json where that had one. Named templates go: a reader would take the one for
    tools, with which nothing was trained.
    """
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = read_json_object(config) if config.exists() else {}
    if "chat_template" in settings:
        settings["chat_template"] = template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        config.write_text(f"{text}\n", encoding="utf-8")


def stop_at(folder: Path, turn_ends: Collection[int]) -> None:
    """Let who samples from a model's folder stop at `turn_ends`, too, whatever library it uses.

    A base model's files name only the token that ends a document. Trained on turns, it ends them
    with another one, and a library that doesn't know would sample on through turns of its own.
    """
    path = folder / GENERATION
    if not path.exists():  # then transformers and inference servers read config.json
        path = folder / "config.json"
    named = eos_ids_of(path)
    missing = [token for token in turn_ends if token not in named]
    if not missing or not path.exists():
        return
    settings = {**read_json_object(path), "eos_token_id": [*named, *missing]}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MOST_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text. Fetch it again.") from error


def with_dtype(text: str, dtype: torch.dtype, add: bool) -> str:
    """A config's text with its dtype fields set; every other byte stays.

    `add` puts one in where there is none.
    """
    name = str(dtype).removeprefix("torch.")
    # By text, not by JSON: a reader of the export should see the file that its author wrote.
    text, count = re.subn(r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)', rf'\g<1>"{name}"', text)
    if count == 0 and add:
        text = re.sub(r"^\s*\{", f'{{\n  "torch_dtype": "{name}",', text, count=1)
    return text


def tied(config_folder: Path) -> bool:
    """Whether config.json says that the head is the embedding; where it says nothing, as Gemma's,
    whether transformers' models of its type have it so.
    """
    path = config_folder / "config.json"
    if not path.exists():
        return False
    config = read_json_object(path)
    said = config.get("tie_word_embeddings")
    return _usually_tied(config.get("model_type")) if said is None else bool(said)


def _usually_tied(model_type: Any) -> bool:
    # Here, as most files say it and the import takes seconds
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))


def untie(config: Path) -> None:
    """Let a config.json say that the head isn't the embedding; every other byte stays."""
    text = re.sub(r'("tie_word_embeddings"\s*:\s*)(?:true|null)', r"\g<1>false", _text(config))
    # It may be there in a part alone, such as the text model's
    if "tie_word_embeddings" not in json.loads(text):
        text = re.sub(r"^\s*\{", '{\n  "tie_word_embeddings": false,', text, count=1)
    config.write_text(text, encoding="utf-8")
