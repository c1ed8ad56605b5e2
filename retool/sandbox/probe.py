"""Which isolation this machine offers.

Each layer is tried in a process of its own that then ends, because that's the only honest test:
containers refuse by seccomp, Ubuntu by AppArmor, old kernels by not knowing. What is found becomes
a `Plan`, which the fork server follows to the letter.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

from . import cgroups, kernel, landlock, rootfs, seccomp, syscalls
from .layers import LAYERS, Plan
from .uids import enter_user_namespace, free_uids


def attempt(action: Callable[[], None]) -> str:
    """Run `action` in a child that then ends; "" or what the kernel said."""
    # A child's namespaces and filters go with it: what it tried changes nothing here.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            message = ""
        except BaseException as error:  # whatever it is, the parent has to hear of it
            message = str(error) or type(error).__name__
        os.write(writer, message.encode()[:4000])
        os._exit(0)
    os.close(writer)
    said = b""
    while part := os.read(reader, 4096):
        said += part
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    return said.decode() or ("" if status == 0 else f"ended with wait status {status}")


def _inside(outer: bool, uids: range, action: Callable[[], None]) -> Callable[[], None]:
    """`action` where the server would do it: in its own user namespace, if it needs one."""

    def run() -> None:
        if outer:
            enter_user_namespace(uids)
        action()

    return run


def _try_mounts() -> None:
    """Build the programs' root and mount a folder in it, exactly as the server will."""
    scratch = "/tmp" if os.access("/tmp", os.X_OK) else "/"
    kernel.unshare(kernel.CLONE_NEWNS)
    rootfs.enter(scratch)
    kernel.unshare(kernel.CLONE_NEWNS)
    rootfs.private_folder(1, 0)
    os.close(os.open(rootfs.WORK + "/probe", os.O_CREAT | os.O_WRONLY, 0o600))


def _try_pids() -> None:
    """A pid namespace for the server, and one for each of two children in it, whose first process
    only waits.
    """
    kernel.unshare(kernel.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        for _ in range(2):
            kernel.unshare(kernel.CLONE_NEWPID)
            stack = kernel.Stack()
            init = kernel.clone_waiting(stack.top)
            child = os.fork()
            if child == 0:
                os._exit(0 if os.getpid() == 2 else 1)
            kernel.setns(own, kernel.CLONE_NEWPID)
            if os.waitpid(child, 0)[1]:
                os._exit(1)
            os.kill(init, signal.SIGKILL)
            os.waitpid(init, 0)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise OSError("a pid namespace for each call is refused inside the server's own")


def _try_names() -> None:
    """Namespaces for System V's memory and for the host's name, which becomes another there."""
    kernel.unshare(kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
    socket.sethostname("sandbox")


def _try_seccomp() -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(seccomp.build(seccomp.Filter(), syscalls.machine()))


def _try_listener() -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(seccomp.build(seccomp.Filter(), syscalls.machine()), listen=True)


def _try_landlock(scope: bool) -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict(landlock.abi(), landlock.open_paths({"/": landlock.READ}), scope)


def _hidden_from(uid: int) -> list[str]:
    """The folders of Python's search path that `uid` can't read, such as those below /root."""

    folders = rootfs.search_path()

    def read() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        hidden = [path for path in folders if not os.access(path, os.R_OK | os.X_OK)]
        if hidden:
            raise OSError("\n".join(hidden))

    said = attempt(read)
    return said.split("\n") if said else []


NAMESPACES: dict[str, Callable[[], None]] = {
    "mount_namespace": _try_mounts,
    "pid_namespace": _try_pids,
    "network_namespace": lambda: kernel.unshare(kernel.CLONE_NEWNET),
    "ipc_namespace": _try_names,
}
NO_CGROUP = (
    "no memory controller that this process may write to: memory is summed by the supervisor"
)


def find(without: frozenset[str] = frozenset(), slots: int = 64) -> Plan:
    """Try every layer but those in `without` (a test's way to leave layers out) and say what is
    there.
    """
    if unknown := without - set(LAYERS):
        raise ValueError(
            f"unknown isolation layers {sorted(unknown)}; there are {', '.join(LAYERS)}."
        )
    missing = dict.fromkeys(without, "left out on request")
    may_mount = bool(kernel.effective_capabilities() >> kernel.CAP_SYS_ADMIN & 1)
    privileged = os.geteuid() == 0 and may_mount
    # Whoever has no privileges gets them in a user namespace of the server's own
    outer = not privileged and "user_namespace" not in missing
    first_uid = free_uids(slots) if os.geteuid() == 0 and "separate_uid" not in missing else 0
    uids = range(first_uid, first_uid + slots if first_uid else 0)

    def test(name: str, action: Callable[[], None]) -> None:
        said = "" if name in missing else attempt(action)
        if said:
            missing[name] = said

    test("user_namespace", lambda: enter_user_namespace(uids if outer else range(0)))
    for name, action in NAMESPACES.items():
        if not privileged and "user_namespace" in missing:
            missing.setdefault(name, f"user namespaces are refused ({missing['user_namespace']})")
        else:
            test(name, _inside(outer, uids, action))
    test("seccomp", _try_seccomp)
    if "seccomp" in missing:
        missing.setdefault("listener", "without seccomp there is nothing to listen to")
    test("listener", _try_listener)
    test("landlock", lambda: _try_landlock(scope=False))
    version = 0 if "landlock" in missing else landlock.abi()
    if not landlock.scopes_signals(version):
        why = f"Landlock ABI {version} can't scope signals (Linux 6.12 can)"
        missing.setdefault("landlock_scopes", why)
    test("landlock_scopes", lambda: _try_landlock(scope=True))
    if not first_uid:
        missing.setdefault("separate_uid", "not started as root: programs keep the caller's uid")
    test("separate_uid", lambda: os.setresuid(first_uid, first_uid, first_uid))
    group = "" if "cgroup" in missing else cgroups.find()
    if not group:
        missing.setdefault("cgroup", NO_CGROUP)

    present = frozenset(LAYERS) - missing.keys()
    uid = first_uid if "separate_uid" in present else 0
    own_namespace = "user_namespace" in present and os.geteuid() != 0
    return Plan(
        present,
        missing,
        first_uid=uid,
        slots=slots,
        landlock=version,
        outer_user=outer and "user_namespace" in present,
        # Where programs have a root of their own they see no other folders
        hidden=_hidden_from(uid) if uid and "mount_namespace" not in present else [],
        cgroup=group,
        # The kernel counts processes by user: exact where a program's user is nobody else's
        exact_tasks=bool(uid) or (own_namespace and _counts_per_namespace()),
    )


def _counts_per_namespace() -> bool:
    """Since Linux 5.14 a user namespace has a process count of its own; before, a limit would count
    all of the user's processes.
    """
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (5, 14)
