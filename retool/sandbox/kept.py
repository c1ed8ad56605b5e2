"""What a program leaves for the next one of its session: its variables and its files, as one file.

Executes inside the cell, before and after the program. Nobody else reads the file: outside it is
bytes, that go into the next cell of the same session and into no other.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import sys
from typing import Any

SNAPSHOT = ".session"
MAX_SNAPSHOT_BYTES = 12 << 20  # variables and files together
MAX_NAMED = 8  # of the variables that can't be kept


def restore(folder: str, namespace: dict[str, Any]) -> None:
    """Lay the files into the work folder, and the variables into the namespace.

    From now on the snapshot is empty, until `keep` writes it: a program that dies leaves nothing.
    """
    path = os.path.join(folder, SNAPSHOT)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb"):
        pass
    if not content:
        return
    try:
        _restore(content, folder, namespace)
    except BaseException as error:  # whatever the program's own objects raise
        _say(f"[what was defined can't be restored: {type(error).__name__}: {error}]")


def _restore(content: bytes, folder: str, namespace: dict[str, Any]) -> None:
    import dill

    files, variables = pickle.loads(content)
    for name, data in files.items():
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(data)
    found, state, of_numpy = dill.loads(variables)
    namespace.update(found)
    random.setstate(state)
    if of_numpy is not None and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(of_numpy)


def keep(folder: str, namespace: dict[str, Any]) -> None:
    """Write the snapshot. What can't be kept is told on stdout, which the program's reader sees."""
    # Every module has names with two underscores, and the next interpreter's own are the right ones
    own = {name: value for name, value in namespace.items() if not _is_pythons(name)}
    variables, left_out = _dumped(own)
    if left_out:
        more = f" and {len(left_out) - MAX_NAMED} more" if len(left_out) > MAX_NAMED else ""
        _say(f"[not kept for the next call: {', '.join(left_out[:MAX_NAMED])}{more}]")
    content = pickle.dumps((_files(folder), variables))
    if len(content) > MAX_SNAPSHOT_BYTES:
        megabytes = len(content) / (1 << 20)
        most = MAX_SNAPSHOT_BYTES >> 20
        _say(f"[variables and files take {megabytes:.0f} MB; a session keeps {most} MB at most]")
        return
    with open(os.path.join(folder, SNAPSHOT), "wb") as file:
        file.write(content)


def _say(text: str) -> None:
    """On the pipe itself: the program may have put something else in the place of `sys.stdout`."""
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode("utf-8", "replace"))


def _is_pythons(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _dumped(variables: dict[str, Any]) -> tuple[bytes, list[str]]:
    """The variables as bytes, all at once, so that what they share stays shared; and what had to be
    left out.
    """
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        return _bytes_of((variables, random.getstate(), of_numpy)), []
    except BaseException:  # whatever the program's own objects raise
        # Only now one by one: most programs leave what can be kept, and that is one pass over it
        kept = {name: value for name, value in variables.items() if _can_be_kept(value)}
    left_out = [
        f"{name} ({type(value).__name__})" for name, value in variables.items() if name not in kept
    ]
    try:
        return _bytes_of((kept, random.getstate(), of_numpy)), left_out
    except BaseException as error:
        return _bytes_of(({}, random.getstate(), of_numpy)), [f"anything ({error})"]


def _can_be_kept(value: Any) -> bool:
    try:
        _bytes_of(value)
    except BaseException:
        return False
    return True


def _bytes_of(value: Any) -> bytes:
    import dill

    target = io.BytesIO()
    # Files that are open aren't the same in another process
    dill.dump(value, target, fmode=dill.HANDLE_FMODE)
    return target.getvalue()


def _files(folder: str) -> dict[str, bytes]:
    """Regular files of the work folder by their names, as many as there is room for."""
    found: dict[str, bytes] = {}
    room = MAX_SNAPSHOT_BYTES
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            inner = os.path.relpath(path, folder)
            if inner == SNAPSHOT or os.path.islink(path) or not os.path.isfile(path):
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                # A byte more than there is room for: that tells a file which fills it from one that
                # is larger
                found[inner] = file.read(room + 1)
                room -= len(found[inner])
            if room < 0:  # too much by now: it is told, and nothing is kept
                return found
    return found
