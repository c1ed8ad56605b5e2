"""Folders that are written, replaced or deleted. A mark is put into them first, and only a folder
with the mark is ever removed.

[Note: what may be deleted] A run's folder may hold more than the run put there: links to
checkpoints on another disk, copies that a user made, what `convert` is writing. So a name alone
never allows a deletion. A folder may go when it is a real folder (no link) and holds `MARK`; the
mark is written first and removed last, so that whatever instant a process dies at, the rest can be
recognised. A deletion that fails is said and changes nothing: the next name is chosen so that
leftovers are in nobody's way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from pathlib import Path

from retool.checkpoint.format.folder import CHECKSUMS, MARK, model_folder
from retool.checkpoint.format.tracker import STEP, TRACKER, checkpoints, tracked
from retool.config.redact import logger
from retool.files.durable import fsync, replace_text
from retool.files.lock import in_use

UNFINISHED = re.compile(r"global_step_\d+\.(\d+\.)?(tmp|old)")
WORDS = (
    "This folder is being written or deleted, or a process died at that. It may be deleted; the next "
    "save does so.\n"
)
log = logger("retool.checkpoint")


def claim(final: Path, kind: str = "tmp") -> Path:
    """A new, marked folder beside `final`, which will get its name: global_step_5.tmp, or
    global_step_5.2.tmp if that is taken.
    """
    path = _free(final, kind)
    path.mkdir(parents=True)
    try:
        _mark(path)
    except OSError:
        # On a full disk the mark may be there without its words
        remove(path, ours=True)
        raise
    return path


def publish(temporary: Path, final: Path, ours: bool | None = None) -> None:
    """Give a claimed and fully written folder its name.

    What has that name steps aside first; it is deleted if it is ours.

    `ours`: whether it is, where the caller knows; else `is_ours`.
    """
    # No system call swaps two folders everywhere, so there are two renames, and readers know both
    # names.
    aside = None
    if os.path.lexists(final):
        aside = _free(final, "old")
        ours = (is_ours(final) if ours is None else ours) and not final.is_symlink()
        if ours:
            _try_to_mark(final)
        else:
            log.warning(
                "%s isn't a checkpoint that this program wrote: it is %s now.", final, aside.name
            )
        final.rename(aside)
        aside = aside if ours else None
    # Between the two renames nothing has the name: what stepped aside is found by readers (`.old`)
    temporary.rename(final)
    fsync(final.parent)
    (final / MARK).unlink(missing_ok=True)
    if aside is not None:
        remove(aside, ours=True)


def remove(folder: Path, ours: bool = False) -> None:
    """Delete a folder that carries the mark. One without it goes only if it is `ours`, or empty.

    What can't be deleted is said, and stays.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        if not ours and not (folder / MARK).is_file() and any(folder.iterdir()):
            return
        # The mark goes last: cut off here, the rest is still known to be waste
        for inside in sorted(folder.iterdir()):
            if inside.name == MARK:
                continue
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            else:
                inside.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        log.warning("%s could not be deleted: %s. The run goes on.", folder, error)


def clear_torn(root: Path) -> None:
    """Delete what unfinished saves of this folder have left behind.

    Nothing that fails here is raised.
    """
    for path in sorted(root.iterdir()):
        if STEP.fullmatch(path.name):
            _unmark(path)
            continue
        match = UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        name = path.with_name(path.name.partition(".")[0])
        if match[2] == "tmp" or name.is_dir():
            remove(path)
        elif not os.path.lexists(name) and (path / MARK).is_file():
            _restore(path, name)


def mend(final: Path) -> None:
    """Clean up what an unfinished conversion has left beside `final`.

    Nothing that fails here is raised, and nothing goes that carries no mark.
    """
    if not final.parent.is_dir():
        return
    leftovers = re.compile(rf"{re.escape(final.name)}\.(?:\d+\.)?(converting|old)")
    found = [
        (m[1], p) for p in sorted(final.parent.iterdir()) if (m := leftovers.fullmatch(p.name))
    ]
    for kind, path in found:
        if kind == "old" and not os.path.lexists(final) and (path / MARK).is_file():
            _restore(path, final)
    if final.is_dir():
        _unmark(final)
    for kind, path in found:
        # One that is being written is locked by the process that writes it.
        if (kind == "converting" or os.path.lexists(final)) and not in_use(path):
            remove(path)


def _unmark(folder: Path) -> None:
    """Take the mark out of a folder that has got its name: it is complete, and mustn't say
    otherwise.

    Its writer was cut off just before it did so itself, or before it deleted the folder.
    """
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            (folder / MARK).unlink()


def _restore(aside: Path, name: Path) -> None:
    """Give a checkpoint its name back: the save that was to replace it wasn't finished."""
    try:
        aside.rename(name)
        (name / MARK).unlink()
    except OSError as error:
        log.warning("%s could not be renamed: %s. The run goes on.", aside, error)


def track(root: Path, step: int) -> None:
    """Have the tracker name a step. Anything in its place that isn't a file is moved aside."""
    path = root / TRACKER
    if os.path.lexists(path) and not path.is_file():
        aside = _free(path, "old")
        log.warning("%s isn't a file: it is %s now.", path, aside.name)
        path.rename(aside)
    replace_text(path, f"{step}")


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint that this program wrote: a real folder with our checksums."""
    return not folder.is_symlink() and (model_folder(folder) / CHECKSUMS).is_file()


def prune(root: Path, keep: int | None, busy: frozenset[Path] = frozenset()) -> list[Path]:
    """Delete all but the newest `keep` checkpoints up to the tracked one. Returns those that were
    deleted.

    Those in `busy` stay, and whatever isn't ours: links, other programs' checkpoints. Nothing that
    fails here is raised.
    """
    named = tracked(root)
    if keep is None or keep < 1 or named is None:
        return []
    older = [path for step, path in checkpoints(root) if step <= named][keep:]
    gone: list[Path] = []
    for folder in older:
        if folder in busy or not is_ours(folder):
            continue
        _try_to_mark(folder)
        try:
            # First out of sight: half of it must never look like a checkpoint
            doomed = _free(folder, "tmp")
            folder.rename(doomed)
        except OSError as error:
            log.warning("%s could not be deleted: %s. The run goes on.", folder, error)
            continue
        gone.append(folder)
        remove(doomed, ours=True)
    return gone


def _free(final: Path, kind: str) -> Path:
    """A name beside `final` that nothing of any kind has."""
    names = itertools.chain(
        [f"{final.name}.{kind}"], (f"{final.name}.{n}.{kind}" for n in itertools.count(2))
    )
    return next(path for name in names if not os.path.lexists(path := final.with_name(name)))


def _mark(folder: Path) -> None:
    (folder / MARK).write_text(WORDS, encoding="utf-8")


def _try_to_mark(folder: Path) -> None:
    """Mark a folder of ours that is to be deleted.

    A disk too full for the mark is all the more reason to delete it.
    """
    with contextlib.suppress(OSError):
        _mark(folder)
