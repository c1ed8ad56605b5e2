"""Which checkpoint is complete: before a run judged by its files, while it is loaded by their
content.

[Note: when content is compared] Reading a checkpoint twice would double the time of a resume. So
before a run only what is cheap is looked at (files, sizes, small files, both ends of the first
rank's shards), and everything that is loaded is compared with its checksums as it is read, each
rank its own part. Where that finds damage, all ranks go on to the next older checkpoint together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.format.checksums import BLOCK
from retool.checkpoint.format.folder import faulty_files, model_folder, recorded_files
from retool.checkpoint.format.tracker import candidates
from retool.checkpoint.read import Loaded, Unusable, load
from retool.config.redact import logger
from retool.parallel.mesh import Mesh

FIRST_RANK = "_rank_0.pt"
log = logger("retool.checkpoint")


def latest(root: Path, fallback: bool = True) -> Path | None:
    """The newest checkpoint of `candidates` whose files are complete. None if there is none.

    One that is passed over is said in a warning. Without `fallback` it is the newest, whole or not.
    """
    for folder in candidates(root):
        wrong = problems(folder) if fallback else []
        if not wrong:
            return folder
        log.warning("%s is not complete (%s): ignored.", folder, "; ".join(wrong[:3]))
    return None


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, as far as a little reading tells: its files, their sizes,
    small files, and the ends of large ones.
    """
    where = model_folder(folder)
    try:
        return faulty_files(where) or [
            f"{name} is damaged"
            for name, entry in recorded_files(where).items()
            if _differs(where / name, entry)
        ]
    except (
        ValueError,
        OSError,
        TypeError,
        KeyError,
    ) as error:  # a list of checksums may hold anything
        return [f"{where} can't be read ({error})"]


def _differs(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a small file, or the beginning or end of the first rank's shards, isn't what was
    written.
    """
    blocks = entry["crc32"]
    if not blocks or (len(blocks) > 1 and not path.name.endswith(FIRST_RANK)):
        return False
    with path.open("rb") as file:
        for index in {0, len(blocks) - 1}:
            file.seek(index * BLOCK)
            if zlib.crc32(file.read(BLOCK)) != blocks[index]:
                return True
    return False


def load_whole(
    folders: Sequence[Path], state: ModelState, mesh: Mesh, seed: int
) -> tuple[Path, Loaded]:
    """Load the first of `folders` (the same on every rank, best first) that is complete on all
    ranks.

    Collective.

    Which were passed over, and why, is said in warnings. ValueError where none is whole, or one
    can't be gone on from though it is.
    """
    reasons: list[str] = []
    for folder in folders:
        try:
            return folder, load(folder, state, mesh, seed)
        except Unusable:
            # Not damaged: an older one would be just as unusable, and skipping it would hide why.
            raise
        except ValueError as error:
            reasons.append(str(error))
        if len(folders) > 1:
            log.warning("%s is damaged and skipped: %s", folder, reasons[-1])
    if len(folders) == 1:
        raise ValueError(reasons[0])
    raise ValueError(
        f"none of the {len(folders)} checkpoints in {folders[0].parent} can be loaded. {' '.join(reasons)}"
    )
