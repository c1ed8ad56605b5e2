"""The warm fork server: an interpreter with the usual packages imported that turns into confined
children on request.

It holds no program and no output: those pass between the supervisor and the child alone, so a fork
inherits nothing of another call.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import importlib
import json
import os
import platform
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from . import isolate, kernel, landlock, layers, program, rootfs, shortage, uids, wire
from .children import Child, Children, Twin

MODULES = (
    "numpy",
    "numpy.random",
    "numpy.linalg",
    "numpy.fft",
    "sympy",
    "mpmath",
    "dill",
    "pickle",
    "math",
    "cmath",
    "fractions",
    "decimal",
    "itertools",
    "functools",
    "collections",
    "operator",
    "random",
    "re",
    "json",
    "datetime",
    "statistics",
    "heapq",
    "bisect",
    "string",
    "copy",
    "time",
    "typing",
    "dataclasses",
    "enum",
    "textwrap",
    "warnings",
    "calendar",
    "contextlib",
    "tokenize",
    "traceback",
    "linecache",
    "inspect",
    "struct",
    "hashlib",
    "base64",
    "csv",
    "pprint",
    "numbers",
    "queue",
    "threading",
    "codecs",
    "ast",
    "abc",
)
NOT_ISOLATED = 251  # the exit code of a child that could not be confined
HOST_NAME = "sandbox"


@dataclass(frozen=True)
class Setup:
    """What the supervisor tells its server at the start."""

    plan: layers.Plan
    scratch: str
    folder_mb: int


def main() -> Callable[[], NoReturn]:
    """Run on the control socket at descriptor 0, with the setup in the first argument.

    Returns in children only: what they are to do.

    They come back all the way here, so that a program finds no frame of the server's above its own.
    """
    fields = json.loads(sys.argv[1])
    sys.argv[:] = sys.orig_argv[:] = []
    setup = Setup(layers.Plan.from_json(fields["plan"]), fields["scratch"], fields["folder_mb"])
    os.umask(0o022)
    # one session for all programs: the kernel may share processors out by session first
    os.setsid()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    # The user namespace first: within it this process may make the others without being root.
    if setup.plan.outer_user:
        uids.enter_user_namespace(setup.plan.uids)
    if "network_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWNET)
    if "ipc_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
        socket.sethostname(HOST_NAME)
    else:
        _hide_host_name()
    if "pid_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWPID)
        # unshare(CLONE_NEWPID) leaves the caller where it is: only its children are in the new
        # namespace.
        inner = os.fork()
        if inner:
            _stand_by(inner)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    return _serve(setup)


def _hide_host_name() -> None:
    """Where no namespace gives programs a name of their own, the call that tells the host's is
    denied: Python has this answer instead.
    """
    facts = os.uname()
    hidden = os.uname_result(
        (facts.sysname, HOST_NAME, facts.release, facts.version, facts.machine)
    )
    os.uname = lambda: hidden
    socket.gethostname = lambda: HOST_NAME
    platform.uname()  # remembered there


def _stand_by(inner: int) -> NoReturn:
    """The process left outside the pid namespace only carries the inner one's end to the
    supervisor.
    """
    os.close(0)
    os._exit(1 if os.waitpid(inner, 0)[1] else 0)


def _serve(setup: Setup) -> Callable[[], NoReturn]:
    # Opened while /proc can still be seen
    statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    own_pids = -1
    if "pid_namespace" in setup.plan.present:
        own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    memory_map = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    session = _open_session()
    copies = rootfs.copy_hidden(setup.plan.hidden, setup.scratch)
    search_path = [copies.get(path, path) for path in rootfs.search_path()]
    rights = rootfs.rights(list(copies.values()))
    if "mount_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWNS)
        rootfs.enter(setup.scratch)
    sys.path[:] = search_path
    _move_packages(copies)
    # before the code gets warm: what the interpreter learns about it is kept with it
    program.forget_origin()
    _warm_up()
    with open(memory_map) as file:
        kernel.collapse_into_huge_pages(file.read())
    base = int(os.read(statm, 256).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    granted = landlock.open_paths(rights) if "landlock" in setup.plan.present else []
    with contextlib.suppress(OSError):
        # From now on; to get warm is the server's own work
        os.write(session, str(isolate.NICENESS).encode())
    common = isolate.prepare(setup.plan, granted, setup.folder_mb)
    return _make_children(common, own_pids, base)


def _make_children(common: isolate.Confinement, own_pids: int, base: int) -> Callable[[], NoReturn]:
    """Until the supervisor hangs up; returns in children only, as `main` does."""
    while True:
        if "pid_namespace" not in common.plan.present:
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
            # From now on it notices that its supervisor has gone. Killed, it couldn't end what
            # programs have started, and no namespace does.
            kernel.prctl(kernel.PR_SET_PDEATHSIG, 0)
        children = Children(common, socket.socket(fileno=0), own_pids)
        children.tell({"ready": True})
        try:
            children.loop()
        except Child as child:
            return _become_program(common, child.place, base)
        except Twin:
            if own_pids >= 0:
                os.close(own_pids)
                own_pids = _open_own_pids()


def _open_own_pids() -> int:
    """What stands for a twin's pid namespace, as /proc can't be seen any more.

    Where the kernel doesn't take it for that, before Linux 5.8, the twin ends: the first is enough.
    """
    try:
        own_pids = kernel.pidfd_open(os.getpid())
        kernel.setns(own_pids, kernel.CLONE_NEWPID)
    except OSError:
        os._exit(1)
    return own_pids


def _open_session() -> int:
    """Where this session's share of the processors is set, where the kernel shares them out by
    session; -1 elsewhere.
    """
    try:
        return os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _become_program(
    common: isolate.Confinement, place: isolate.Place, base: int
) -> Callable[[], NoReturn]:
    """In a child: confine it, wait for its program, and return what runs it."""
    try:
        descriptors = isolate.confine(common, place)
        control = socket.socket(fileno=isolate.CONTROL)
        control.sendmsg(
            [b"R"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        )
        for descriptor in descriptors:
            os.close(descriptor)
        job = wire.read_frame(control.detach())
        os.close(isolate.CONTROL)
        if job is not None:
            return functools.partial(program.run, job, base)
    except BaseException as error:  # before the program started: whatever it is, this isn't a cell
        stderr = place.stderr if _is_open(place.stderr) else 2
        os.write(stderr, shortage.told(error).encode())
        os._exit(NOT_ISOLATED)
    os._exit(0)


def _move_packages(copies: dict[str, str]) -> None:
    """Point packages that are already imported to the copies of their folders, where their other
    modules can be read.
    """
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            for old, new in copies.items():
                places[:] = [
                    new + place[len(old) :] if place.startswith(old + "/") else place
                    for place in places
                ]


def _warm_up() -> None:
    """Import what programs use, and load what sympy loads late; a package that isn't installed is
    left to the program to miss.
    """
    tempfile.tempdir = rootfs.WORK  # packages ask for it; the root can't be written to
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    if "sympy" in sys.modules:
        import sympy

        x = sympy.symbols("x")
        sympy.solve(x**2 - 3 * x + 2, x)
        sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
        sympy.factorint(360)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)  # every call starts from the same state
    program.warm_up()
    # No collection after this: it would write to every object's header, and each child would get
    # copies of all pages.
    gc.collect()
    gc.disable()
    gc.freeze()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
