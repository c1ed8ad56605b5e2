"""The folder of one checkpoint: the names of its files, what is recorded of them, and which are
missing.

    global_step_N[/actor]/                      complete once it has this name
        model_world_size_W_rank_R.pt            rows of every parameter
        optim_world_size_W_rank_R.pt            rows of AdamW's moments
        extra_state_world_size_W_rank_R.pt      what a rank keeps besides: random states, counts
        fsdp_config.json                        {"FSDP_version": 2, "world_size": W, "shards", "step", "writer"}
        checksums.json                          {"block": bytes, "files": {name: {"size", "crc32": [one a block]}}}
        huggingface/                            config, tokenizer, weights
    global_step_N/data.pt                       order and position of the data
    global_step_N.tmp/                          being written, or torn: never read
    global_step_N.old/                          what a save of the same step replaces, until it has

Only folders that carry `MARK` are ever deleted (see `publish`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retool import __version__
from retool.checkpoint.format.checksums import BLOCK, checksums_of
from retool.checkpoint.format.tracker import checkpoints
from retool.config.redact import logger
from retool.files import untrusted
from retool.files.durable import replace_text
from retool.files.untrusted import shown

CHECKSUMS = "checksums.json"
CONFIG = "fsdp_config.json"
DATA = "data.pt"
MARK = "unfinished.txt"  # first into a folder that may be deleted, and the last file to go
SMALL_BYTES = 1 << 20  # fsdp_config.json, and checksums.json of a small checkpoint
BYTES_OF_A_CHECKSUM = 16  # in checksums.json
log = logger("retool.checkpoint")


def shard_name(kind: str, world: int, rank: int) -> str:
    """`kind` is model, optim or extra_state."""
    return f"{kind}_world_size_{world}_rank_{rank}.pt"


def write_config(folder: Path, world: int, shards: int, step: int, files: dict[str, Any]) -> None:
    """fsdp_config.json and checksums.json."""
    config = {
        "FSDP_version": 2,
        "world_size": world,
        "shards": shards,
        "step": step,
        "writer": f"retool {__version__}",
    }
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    files = {**files, CONFIG: checksums_of(folder / CONFIG)}
    replace_text(folder / CHECKSUMS, json.dumps({"block": BLOCK, "files": files}) + "\n")


def read_small_json(path: Path, limit: int = SMALL_BYTES) -> Any:
    """A JSON file's content; ValueError names the file."""
    return untrusted.read_json(path, limit)


def world_size(folder: Path) -> int:
    """How many ranks wrote the shards of a folder, from fsdp_config.json or from the file names."""
    if (folder / CONFIG).exists():
        config = read_small_json(folder / CONFIG)
        world = config.get("world_size") if isinstance(config, dict) else None
        # Not isinstance: to Python, JSON's true is a whole number
        if type(world) is not int or world < 1:
            raise ValueError(f"{folder / CONFIG} has no world_size.")
        return world
    # Nine digits at most: a longer number is no world size, however long it takes to read
    shard = re.compile(r"model_world_size_(\d{1,9})_rank_\d+\.pt")
    matches = (shard.fullmatch(path.name) for path in folder.glob("model_world_size_*.pt"))
    sizes = {int(match[1]) for match in matches if match}
    if len(sizes) == 1:
        return sizes.pop()
    holds = f"shards of several world sizes: {sorted(sizes)}" if sizes else "no model shards"
    newest = next((path for _, path in checkpoints(folder)), None)
    hint = f" It is a run; its newest checkpoint is {newest}." if newest else ""
    raise ValueError(f"{folder} holds {holds}.{hint}")


def holds_shards(folder: Path, kind: str) -> bool:
    """Whether there are files of a kind (model, optim or extra_state), of any world size."""
    return any(folder.glob(f"{kind}_world_size_*_rank_*.pt"))


def holds_export(folder: Path) -> bool:
    """Whether there are weights in `huggingface/`."""
    return any((folder / "huggingface").glob("*.safetensors"))


def first_missing(folder: Path, kind: str, world: int) -> str | None:
    """The name of the first of `world` ranks' files that isn't there.

    The work is that of the files that are.
    """
    there = {path.name for path in folder.glob(f"{kind}_world_size_{world}_rank_*.pt")}
    names = (shard_name(kind, world, rank) for rank in range(world))
    return next((name for name in names if name not in there), None)


def recorded_files(folder: Path) -> dict[str, Any]:
    """What checksums.json says of each file; empty if there is none (not our checkpoint)."""
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    # No more is read than the checksums of files of these sizes can take
    parts = [part for part in (folder, folder / "huggingface") if part.is_dir()]
    described = sum(
        file.stat().st_size for part in parts for file in part.iterdir() if file.is_file()
    )
    content = read_small_json(path, SMALL_BYTES + described // BLOCK * BYTES_OF_A_CHECKSUM)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("block") != BLOCK:
        raise ValueError(f"{path} is not in the form that this version writes.")
    for name, entry in files.items():
        if not _is_inside(name):
            raise ValueError(
                f"{path} names {shown(name)}, which is no file of this checkpoint: it is damaged, or made up."
            )
        if not _is_entry(entry):
            raise ValueError(f"{path} says nothing sensible of {name}: it is damaged, or made up.")
    return files


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder.

    The one exception is data.pt, which is beside `actor/`.
    """
    if name == f"../{DATA}":
        return True
    path = Path(name)
    climbs_out = path.is_absolute() or ".." in path.parts
    return name == shown(name) and bool(path.parts) and not climbs_out


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size = entry.get("size")
    blocks = entry.get("crc32")
    if type(size) is not int or size < 0 or not isinstance(blocks, list):
        return False
    one_a_block = len(blocks) == -(-size // BLOCK)
    return one_a_block and all(type(checksum) is int for checksum in blocks)


def written_by_us(folder: Path) -> bool:
    """Whether retool wrote a checkpoint. Only then are its states besides the tensors known to be
    readable.
    """
    if (folder / CHECKSUMS).exists():
        return True
    config = read_small_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    return isinstance(config, dict) and str(config.get("writer", "")).startswith("retool ")


def faulty_files(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, without reading the shards: missing files, and files
    of another size.
    """
    if not folder.is_dir():
        return [f"{folder} is not there"]
    try:
        world = world_size(folder)
        files = recorded_files(folder)
        missing = None if files else first_missing(folder, "model", world)
    except (ValueError, OSError) as error:
        return [str(error)]
    if missing:
        return [f"{missing} is missing"]
    absent: list[str] = []
    of_another_size: list[str] = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            absent.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry["size"]:
            of_another_size.append(f"{name} has {size} bytes instead of {entry['size']}")
    return absent + of_another_size


def model_folder(folder: Path) -> Path:
    """Where a checkpoint's shards are: the folder itself, or `actor/` in it (reinforcement
    learning).
    """
    actor = folder / "actor"
    return actor if actor.is_dir() and not (folder / CONFIG).exists() else folder
