"""A run's folder: which checkpoints it holds, and which of them the tracker names.

latest_checkpointed_iteration.txt       the step of the last complete checkpoint, in digits
global_step_1/ global_step_2/ …
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from retool.config.redact import logger
from retool.files import untrusted

TRACKER = "latest_checkpointed_iteration.txt"
# As many digits as always fit into 64 bits
STEP = re.compile(r"global_step_(\d{1,18})")
TRACKER_BYTES = 64

log = logger("retool.checkpoint")


def checkpoints(root: Path) -> Iterator[tuple[int, Path]]:
    """Every finished folder under `root`: (step, path), newest first."""
    found = (
        [(int(m[1]), p) for p in root.iterdir() if (m := STEP.fullmatch(p.name)) and p.is_dir()]
        if os.path.isdir(root)  # not Path.is_dir, which raises for a name that is too long
        else []
    )
    yield from sorted(found, reverse=True)


def set_aside(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints that were moved aside and whose name nothing else has taken: (step, path of
    global_step_N.old).

    A save or a conversion was cut off between the two renames by which it replaces one.
    """
    if not os.path.isdir(root):
        return []
    found: list[tuple[int, Path]] = []
    for path in root.glob("global_step_*.old"):
        match = STEP.fullmatch(path.stem)
        if match and path.is_dir() and not path.with_name(path.stem).is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def candidates(root: Path, say: bool = True) -> list[Path]:
    """The checkpoints to resume from, best first: the one that the tracker names, then the older
    ones. All, if it names none.

    Torn saves, and folders that the tracker doesn't know yet, are left out; `say`: with a warning.
    """
    passed_over: list[str] = []
    for torn in sorted(root.glob("global_step_*.tmp")) if os.path.isdir(root) else []:
        passed_over.append(f"{torn} is an unfinished save")
    named = tracked(root)
    found = list(checkpoints(root))
    if named is not None:
        passed_over += [
            f"{folder} is newer than what {TRACKER} names (step {named})"
            for step, folder in found
            if step > named
        ]
        # A folder that is newer than the tracker is from a save that was cut off between the two.
        found = [(step, folder) for step, folder in found if step <= named]
        found = [(step, aside) for step, aside in set_aside(root) if step == named] + found
    for what in passed_over if say else []:
        log.warning("%s: ignored.", what)
    return [folder for _, folder in found]


def tracked(root: Path) -> int | None:
    """The step that the tracker names. None if there is none, or, with a warning, if it can't be
    read.
    """
    path = root / TRACKER
    if not os.path.lexists(path):
        return None
    try:
        text = untrusted.read_bytes(path, TRACKER_BYTES).strip()
    except ValueError as error:  # a folder, a pipe, a long text, or a disk that doesn't answer
        log.warning(
            "%s does not hold a step (%s): looking for the newest complete checkpoint instead.",
            path,
            error,
        )
        return None
    if not text.isdigit():
        log.warning(
            "%s does not hold a step: looking for the newest complete checkpoint instead.", path
        )
        return None
    return int(text)
