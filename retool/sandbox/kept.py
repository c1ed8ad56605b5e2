"""What a program leaves for the next one of its session, as one file: its variables, its files, and
how it has set the libraries that remember something.

Executes inside the cell, before and after the program. Nobody else reads the file: outside it is
bytes, that go into the next cell of the same session and into no other.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import settings, variables, work_folder
from .variables import megabytes

SNAPSHOT = ".session"
WHOLE = b"whole"  # what a snapshot ends with
RESTORING = b"restoring"  # what the snapshot says of a program that died before it began
MAX_SNAPSHOT_BYTES = 12 << 20  # variables and files together
MAX_NAMED = 8  # of the variables that can't be kept
SHOWN = "_"  # what a notebook calls the value that it showed last


@dataclass(frozen=True)
class Session:
    """What a program found: its environment variables as they were before, and what couldn't be kept
    from programs before it, name → what it was.
    """

    folder: str
    namespace: dict[str, Any]
    environment: Mapping[str, str]
    lost: dict[str, str]


def restore(folder: str, namespace: dict[str, Any]) -> Session:
    """Lay the files into the work folder, and the variables into the namespace.

    From now on the snapshot is empty, until `keep` writes it: a program that dies leaves nothing.
    """
    path = os.path.join(folder, SNAPSHOT)
    with open(path, "rb") as file:
        content = file.read()
    session = Session(folder, namespace, dict(os.environ), {})
    if content:
        with open(path, "wb") as file:
            file.write(RESTORING)
        try:
            _restore(content, session)
        except BaseException as error:  # whatever the program's own objects raise
            _say(f"[what was defined can't be restored: {type(error).__name__}: {error}]")
    with open(path, "wb"):  # where the folder is on the host, files stay
        pass
    with contextlib.suppress(OSError):
        os.unlink(path)
    return session


def _restore(content: bytes, session: Session) -> None:
    left = pickle.loads(content)
    work_folder.lay_out(session.folder, left["files"])
    settings.restore(left["settings"], session.folder)  # a deep structure needs its recursion limit
    found, broken = variables.load(left["variables"])
    if SHOWN in found:
        setattr(builtins, SHOWN, found.pop(SHOWN))
    session.namespace.update(found)
    session.lost.update({**left["lost"], **broken})
    for name, reason in broken.items():
        _say(f"[{name} can't be restored: {reason}]")


def keep(session: Session) -> None:
    """Write the snapshot. What can't be kept is told on stderr, which the program's reader sees."""
    # Every module has names with two underscores, and the next interpreter's own are the right ones
    own = {name: value for name, value in session.namespace.items() if not _is_pythons(name)}
    if hasattr(builtins, SHOWN):
        own.setdefault(SHOWN, getattr(builtins, SHOWN))
    # First, since it writes what open files still hold back
    stored, left_out = variables.dump(own, session.folder, MAX_SNAPSHOT_BYTES)
    files, files_left_out = work_folder.read(session.folder, SNAPSHOT, MAX_SNAPSHOT_BYTES)
    room = MAX_SNAPSHOT_BYTES - sum(len(file.content) for file in files)
    if len(stored.stream) > room:
        stored, left_out = variables.dump(own, session.folder, room)
    left_out.update(files_left_out)
    # What was only shown was given no name: nobody expects to have it again
    told = {
        name: was for name, was in left_out.items() if name in session.namespace or name != SHOWN
    }
    if told:
        _say(f"[not kept for the next call: {_listed(told)}]")
    lost = {name: was for name, was in session.lost.items() if name not in own}
    left = {
        "files": files,
        "settings": settings.read(session.folder, session.environment),
        "variables": stored,
        "lost": {**lost, **left_out},
    }
    _write_whole(os.path.join(session.folder, SNAPSHOT), left)


def _write_whole(path: str, left: Mapping[str, Any]) -> None:
    """With a mark behind it: there may be no room for all of it, or no time, and half of it would be
    taken for what this program left. Writing it aside needs a rename, which not every mode allows.
    """
    with open(path, "wb") as file:
        pickle.dump(left, file)
        file.write(WHOLE)


def why_missing(error: BaseException, lost: Mapping[str, str]) -> str:
    """What to say to a program that asks for a variable which couldn't be kept; "" to others."""
    if not isinstance(error, NameError):
        return ""
    name = str(error.name)
    if name not in lost:
        return ""
    return f"[{name} ({lost[name]}) was defined by an earlier call, and couldn't be kept]"


def _listed(left_out: Mapping[str, str]) -> str:
    told = [f"{name} ({was})" for name, was in left_out.items()]
    text = ", ".join(told[:MAX_NAMED])
    if len(told) > MAX_NAMED:
        text += f" and {len(told) - MAX_NAMED} more"
    if any(was.endswith(" MB") for was in left_out.values()):
        text += f"; a session keeps {megabytes(MAX_SNAPSHOT_BYTES)} at most"
    return text


def _say(text: str) -> None:
    """On the pipe itself: the program may have put something else in the place of `sys.stderr`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode("utf-8", "replace"))


def _is_pythons(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
