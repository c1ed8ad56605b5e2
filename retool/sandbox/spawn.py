"""Starting the sandbox's own processes: exec'd, never forked from the caller, with an environment
that has nothing of the caller's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .rootfs import PRELOADED

_PACKAGE = Path(__file__).resolve().parent

# This very package, wherever another one of its name may lie on the path of the interpreter.
_BOOT = """
import importlib.util, json, sys
sys.path[:] = sys.path[1:] + json.loads(sys.argv.pop(1))
folder = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location("sandbox", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["sandbox"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from sandbox import {module}
sys.modules["__main__"].__dict__.pop("__file__", None)
del folder, spec, package
begin = {module}.main()
begin()
"""


def environment() -> dict[str, str]:
    """All that the server and the programs find in their environment."""
    fixed = {  # one thread: OpenBLAS would start its own, and a fork of threads is a gamble
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/",
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "MALLOC_ARENA_MAX": "2",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        # Some Pythons don't start without it; it names folders, no secrets
        fixed["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return fixed


def import_path() -> list[str]:
    """Folders a bare interpreter wouldn't search: those the preloaded packages come from."""
    folders = []
    for name in PRELOADED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            # By its real name: below /tmp a program sees its own folder instead
            folders.append(str(Path(spec.origin).resolve().parents[1]))
    return list(dict.fromkeys(folders))


def start(
    module: str,
    setup: object,
    control: socket.socket,
    python: str = sys.executable,
    launcher: Sequence[str] = (),
    path: Sequence[str] = (),
    inherited: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Exec `module`'s main with `control` as descriptor 0 and `setup` as its JSON argument.

    `launcher` is a command to start it through; the descriptors `inherited` stay open under their
    numbers. stderr is the caller's, so that a failure of the server itself is seen.
    """
    search = json.dumps(list(path) or import_path())
    command = [
        *launcher,
        python,
        "-s",
        "-c",
        _BOOT.format(module=module),
        search,
        str(_PACKAGE),
        json.dumps(setup),
    ]
    return subprocess.Popen(
        command,
        stdin=control.fileno(),
        stdout=subprocess.DEVNULL,
        env=environment(),
        cwd="/",
        pass_fds=tuple(inherited),
    )
