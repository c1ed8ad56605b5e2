"""Hugging Face folders: reading weights out of one, and writing the small files of an export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from retool.checkpoint.format.safetensors import INDEX, SINGLE, SafetensorsFile
from retool.files.untrusted import read_bytes
from retool.model.hub import read_json

SIDE_BYTES = 16 << 20  # of a config.json; real ones have a few thousand
# .py: tokenizers with code of their own
SIDE_SUFFIXES = {
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".tiktoken",
    ".py",
}
MORE_TEMPLATES = "additional_chat_templates"
NOT_SIDE = re.compile(
    r".*\.index\.json|trainer_state\.json|training_args\.json|README.*|requirements\.txt",
    re.IGNORECASE,
)


class SafetensorsSource:
    """The weights of a Hugging Face folder: one `model.safetensors`, or several with an index.

    Files are mapped on first use.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._map = self._weight_map()
        self._open: dict[str, SafetensorsFile] = {}

    def __repr__(self) -> str:
        return str(self.folder)

    def _weight_map(self) -> dict[str, str]:
        """Name → file name.

        Where there is one file and an index too, the one file counts, as it does for transformers.
        """
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is not a folder. Give a local Hugging Face model folder (config.json and "
                "*.safetensors)."
            )
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(SafetensorsFile(self.folder / SINGLE).entries, SINGLE)
        if (self.folder / INDEX).exists():
            return self._indexed(self.folder / INDEX)
        bins = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f" It has {bins[0]}: save it again as safetensors." if bins else ""
        raise ValueError(f"{self.folder} holds neither {SINGLE} nor {INDEX}.{hint}")

    def _indexed(self, index: Path) -> dict[str, str]:
        try:
            weight_map: dict[str, str] = read_json(index)["weight_map"]
            missing = sorted(
                {
                    f
                    for f in weight_map.values()
                    if f != Path(f).name or not (self.folder / f).is_file()
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not a safetensors index ({error!r}). Fetch it again."
            ) from error
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing[:8])}{more}, named by {INDEX}. Fetch the "
                "missing files."
            )
        return weight_map

    def _file(self, name: str) -> SafetensorsFile:
        file_name = self._map[name]
        if file_name not in self._open:
            self._open[file_name] = SafetensorsFile(self.folder / file_name)
        file = self._open[file_name]
        if name not in file.entries:
            raise ValueError(
                f"{self.folder / file_name} lacks {name}, which {INDEX} places there. Fetch both again."
            )
        return file

    def names(self) -> Collection[str]:
        return self._map.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._file(name).entries[name][0]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file(name).read(name, start, stop)


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
            if path.name in ("config.json", "generation_config.json"):
                (target / path.name).write_text(
                    with_dtype(_text(path), dtype, add=path.name == "config.json")
                )
            else:
                shutil.copyfile(path, target / path.name)
    if chat_template is not None:
        write_template(target, chat_template)


def write_template(folder: Path, template: str) -> None:
    """Make `template` the only one of a tokenizer's folder, wherever its own were written.

    It goes into chat_template.jinja and, for readers that look only there, into
    tokenizer_config.json where that had one. Named templates go: a reader would take the one for
    tools, with which nothing was trained.
    """
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.exists() and "chat_template" in (settings := read_json(config)):
        settings["chat_template"] = template
        config.write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _text(path: Path) -> str:
    try:
        return read_bytes(path, SIDE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text. Fetch it again.") from error


def with_dtype(text: str, dtype: torch.dtype, add: bool) -> str:
    """A config's text with its dtype fields set; every other byte stays.

    `add` puts one in where there is none.
    """
    name = str(dtype).removeprefix("torch.")
    text, count = re.subn(r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)', rf'\g<1>"{name}"', text)
    if count == 0 and add:
        text = re.sub(r"^\s*\{", f'{{\n  "torch_dtype": "{name}",', text, count=1)
    return text


def tied(config_folder: Path) -> bool:
    """Whether config.json says that the head is the embedding.

    Llama and Qwen default to no where it says nothing.
    """
    path = config_folder / "config.json"
    return path.exists() and bool(read_json(path).get("tie_word_embeddings", False))


def untie(config: Path) -> None:
    """Let a config.json say that the head isn't the embedding; every other byte stays."""
    config.write_text(re.sub(r'("tie_word_embeddings"\s*:\s*)true', r"\g<1>false", _text(config)))
