"""What makes two runs the same run: model, data, reward, tools and objective.

Every checkpoint keeps it. A run that would go on from one compares, so that no folder silently
continues with another model's weights or on other samples. What one side doesn't know (a checkpoint
of an older version) isn't compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.hf.weights import SafetensorsSource
from retool.config import to_dict
from retool.config.redact import redact
from retool.model.config import ModelConfig

PIECES = (
    4  # of each tensor, that a model's weights are known by: its beginning and end, and two between
)
PIECE = 2048  # elements
# Where and how a run computes, not what: other values of these are no news.
UNTOLD = (
    "trainer.resume_",
    "trainer.default_local_dir",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.device_memory_gb",
    "data.cache_dir",
    "data.num_workers",
)


@dataclass(frozen=True)
class Trait:
    """One thing that makes a run what it is: the key that decides it, and its value (or a hash of
    it).

    `strict`: what a checkpoint holds means nothing under another value, so nobody can ask to go on
    all the same.
    """

    where: str
    value: str | int | float | bool | None
    strict: bool = False


Identity = Mapping[str, Trait]  # by name, in words


@dataclass(frozen=True)
class Change:
    """How the traits of a key differ from what they were, in words."""

    where: str
    words: str
    strict: bool


def record_of(command: str, identity: Identity, config: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the run that writes it: plain values only, secrets redacted."""
    return {
        "command": command,
        "identity": {name: trait.value for name, trait in identity.items()},
        "config": flat(config),
    }


def changes(then: Mapping[str, Any], now: Identity) -> list[Change]:
    """What differs from a checkpoint's `identity`: one entry for each key."""
    found: dict[str, list[str]] = {}
    strict: set[str] = set()
    for name, trait in now.items():
        if name not in then or then[name] == trait.value:
            continue
        found.setdefault(trait.where, []).append(
            f"{name}: then {shown(then[name])}, now {shown(trait.value)}"
        )
        if trait.strict:
            strict.add(trait.where)
    return [Change(where, "; ".join(words), where in strict) for where, words in found.items()]


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key of the configuration whose value has changed."""
    for key, value in now.items():
        if key in then and then[key] != value and not key.startswith(UNTOLD):
            yield f"{key}: then {shown(then[key])}, now {shown(value)}."


def flat(config: Any) -> dict[str, Any]:
    """A configuration as dotted key → value, lists among them; secrets redacted."""
    return dict(_flat(redact(to_dict(config))))


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: Any) -> str:
    """A value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


def model_traits(
    folder: Path, model: ModelConfig, key: str, strict: bool = False
) -> dict[str, Trait]:
    """A model's weights, and what its config.json says.

    ValueError where the weights can't be read.
    """
    found = {"the model's weights": Trait(key, weights_checksum(folder), strict)}
    for name, value in asdict(model).items():
        if name != "max_position":  # only notes depend on it
            found[f"the model's {name}"] = Trait(
                key, value if isinstance(value, (str, int, float, bool)) else str(value), strict
            )
    return found


def weights_checksum(folder: Path) -> str:
    """Hash of what a model folder's tensors are called, their shapes and dtypes, and of `PIECES`
    pieces of each.

    Two trainings of one model differ in some piece of some tensor, whichever part of it was
    trained. A few MB are read, not the whole.
    """
    source = SafetensorsSource(folder)
    found = hashlib.blake2b(digest_size=6)
    # Sorted: which file holds a tensor, and in which order, is no difference between two models.
    for name in sorted(source.names()):
        shape = source.shape(name)
        found.update(f"{name} {source.dtype(name)} {list(shape)}\n".encode())
        for start, stop in _pieces(prod(shape)):
            found.update(source.read(name, start, stop).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _pieces(numel: int) -> list[tuple[int, int]]:
    """Ranges of elements at even distances, the first and the last among them; all of a small
    tensor.
    """
    if numel <= PIECES * PIECE:
        return [(0, numel)]
    # Training changes every weight, so a few pieces tell two models apart. Reading all would take
    # minutes.
    starts = [place * (numel - PIECE) // (PIECES - 1) for place in range(PIECES)]
    return [(start, start + PIECE) for start in starts]


def digest(*parts: str | bytes) -> str:
    """A short hash of texts and their order."""
    found = hashlib.blake2b(digest_size=6)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # With its length, so that no two ways of cutting the same text have one hash.
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def file_digest(path: str | Path) -> str:
    """A short hash of a file's content."""
    return digest(Path(path).read_bytes())


def listed(values: Sequence[str]) -> str:
    """Several as one value, in order."""
    return ", ".join(values) or "none"
