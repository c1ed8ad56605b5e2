"""What a program sees of the file system: Python, its libraries, three harmless devices, and the
work folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence

from . import kernel, landlock

WORK = "/box"
PRELOADED = ("numpy", "sympy", "mpmath", "dill")
DEVICES = {
    "/dev/null": landlock.READ_FILE | landlock.WRITE_FILE,
    "/dev/urandom": landlock.READ_FILE,
    "/dev/random": landlock.READ_FILE,
}
_SYSTEM = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_NOT_COPIED = (
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "ensurepip",
    "turtledemo",
    "lib2to3",
    "config-*",
    "lib-dynload",
)


def search_path() -> list[str]:
    """`sys.path` for programs: the standard library, installed packages, and where the preloaded
    ones came from.
    """
    wanted = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    wanted += site.getsitepackages()
    for name in PRELOADED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            wanted.append(os.path.dirname(os.path.dirname(spec.origin)))
    # Of the base installation; in a virtual environment sysconfig names the wrong platstdlib
    library = os.path.dirname(os.__file__)
    wanted += [
        library,
        os.path.join(library, "lib-dynload"),
        sysconfig.get_config_var("DESTSHARED") or library,
    ]
    real = {os.path.realpath(path) for path in wanted if os.path.isdir(path)}
    in_order = dict.fromkeys([*sys.path, *wanted])
    return [path for path in in_order if path and os.path.realpath(path) in real]


def _prefixes() -> list[str]:
    """What an interpreter has below its own folder, and the one that a virtual environment was made
    with below its.
    """
    return [
        os.path.join(prefix, name)
        for prefix in (sys.base_prefix, sys.prefix)
        for name in ("lib", "lib64", "pyvenv.cfg")
    ]


def readable_paths(more: Sequence[str] = ()) -> list[str]:
    """Existing real paths that programs may read, `more` among them, none inside another."""
    candidates = [*_SYSTEM, *_prefixes(), *search_path(), *more, sys.executable]
    kept: list[str] = []
    for path in sorted({os.path.realpath(path) for path in candidates if os.path.exists(path)}):
        # Sorted: a folder comes before what is in it.
        if not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def links() -> dict[str, str]:
    """Symbolic links that make the real paths reachable by the names that libc and Python use."""
    named = [path for path in (*_SYSTEM, *_prefixes(), sys.executable) if os.path.exists(path)]
    found = {path: os.path.realpath(path) for path in named if path != os.path.realpath(path)}
    temporary = dict.fromkeys(("/tmp", "/var/tmp", "/dev/shm"), WORK)
    return {**found, **temporary}  # these last: an interpreter may lie below one of them


def rights(more: Sequence[str] = ()) -> dict[str, int]:
    """The Landlock rule of every path outside the work folder."""
    return {**dict.fromkeys(readable_paths(more), landlock.READ), **DEVICES}


def copy_hidden(folders: Sequence[str], target: str) -> dict[str, str]:
    """Copy what programs need of Python's folders that they can't read; returns where each went.

    The standard library goes whole but for its tests; of installed packages, those that are
    preloaded.
    """
    copies = {}
    for index, folder in enumerate(folders):
        copies[folder] = copy = f"{target}/python{index}"
        if os.path.exists(copy):
            continue
        has_standard_library = os.path.exists(os.path.join(folder, "os.py"))
        if has_standard_library or os.path.basename(folder) == "lib-dynload":
            left_out = shutil.ignore_patterns(*_NOT_COPIED)
            shutil.copytree(folder, copy, symlinks=True, ignore=left_out)
        else:
            os.makedirs(copy)
            _copy_preloaded(folder, copy)
    return copies


def _copy_preloaded(folder: str, copy: str) -> None:
    """The preloaded packages of an installation, and the libraries that they bring along."""
    for name in [*PRELOADED, *(f"{package}.libs" for package in PRELOADED)]:
        source = os.path.join(folder, name)
        if os.path.isdir(source):
            tests = shutil.ignore_patterns("tests")
            shutil.copytree(source, os.path.join(copy, name), ignore=tests)


def enter(scratch: str) -> None:
    """Swap this mount namespace's root for one that holds only what programs may see; nothing leads
    back.

    `scratch` is an empty folder to build it on. The caller is alone in a new mount namespace and
    may mount.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", scratch, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path in readable_paths():
        _bind(path, scratch + path)
        kernel.make_read_only(scratch + path)
    for path in DEVICES:
        _bind(path, scratch + path)
        # They can be written to; their dates and modes can't be changed
        kernel.make_read_only(scratch + path, devices=True)
    os.mkdir(scratch + WORK, 0o755)
    for path, target in links().items():
        if not os.path.lexists(scratch + path):
            os.makedirs(os.path.dirname(scratch + path), exist_ok=True)
            os.symlink(target, scratch + path)
    # pivot_root swaps roots and needs a place for the old one, which is then let go.
    os.mkdir(scratch + "/.old")
    kernel.pivot_root(scratch, scratch + "/.old")
    os.chdir("/")
    kernel.unmount("/.old")
    os.rmdir("/.old")
    closed = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | closed)


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)


def private_folder(size_mb: int, owner: int) -> None:
    """Mount a fresh work folder that only this mount namespace sees; it goes with the namespace."""
    options = f"size={size_mb}m,nr_inodes=16384,mode=700,uid={owner},gid={owner}"
    kernel.mount("tmpfs", WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)


def sweep(path: str) -> subprocess.Popen[bytes] | None:
    """Remove a folder that a program had to itself, whatever it did to the permissions and however
    deep it went.

    An empty one goes at once; else a process of its own is returned that does it, so that nobody
    waits.
    """
    with contextlib.suppress(OSError):
        os.rmdir(path)
    if not os.path.lexists(path):
        return None
    return subprocess.Popen(
        ["sh", "-c", 'chmod -R u+rwx -- "$0"; rm -rf -- "$0"', path],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class Brooms:
    """Processes that remove folders."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def sweep(self, path: str) -> None:
        """Remove a folder, at once or by and by."""
        broom = sweep(path)
        if broom is not None:
            self._started.append(broom)

    def busy(self) -> bool:
        """Whether folders are still being removed; to be asked again until they aren't."""
        self._started = [broom for broom in self._started if broom.poll() is None]
        return bool(self._started)

    def wait(self) -> None:
        for broom in self._started:
            broom.wait()
