"""Which isolation this machine offers, and whether every guarantee has a mechanism.

Each layer is tried in a process of its own that then ends, because that's the only honest test: containers refuse by seccomp,
Ubuntu by AppArmor, old kernels by not knowing. What is found becomes a `Plan`, which the fork server follows to the letter.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import cgroups, kernel, landlock, rootfs, seccomp, syscalls

LAYERS = (
    "user_namespace", "mount_namespace", "pid_namespace", "network_namespace", "ipc_namespace", "landlock", "landlock_scopes",
    "seccomp", "separate_uid", "cgroup",
)  # fmt: skip

# Guarantee → what upholds it, strongest first; one is enough, all that are there are applied.
GUARANTEES: dict[str, tuple[str, ...]] = {
    "no network": ("network_namespace", "seccomp"),
    "no host files": ("mount_namespace", "landlock"),
    "no writes outside the work folder": ("mount_namespace", "landlock"),
    "no devices": ("mount_namespace", "landlock"),
    "no host processes or signals": ("pid_namespace", "separate_uid", "landlock_scopes", "seccomp"),
    "nothing outlives the call": ("pid_namespace", "seccomp"),
    "no kernel surface, no privileges": ("seccomp",),
    "limits hold": ("cgroup", "always: rlimits, and a supervisor that sums the call's processes"),
    "no secrets": ("always: exec'd server with an environment of its own, no inherited descriptors",),
    "no state between calls": ("mount_namespace", "always: a fork per call, its folder removed"),
}

HOW_TO_GET = {
    "network_namespace": "allow user namespaces (docker run --security-opt seccomp=unconfined, sysctl user.max_user_namespaces)",
    "mount_namespace": "allow user namespaces, or use Linux 5.13 or newer with Landlock enabled (lsm=landlock,…)",
    "pid_namespace": "allow user namespaces",
    "landlock": "use Linux 5.13 or newer with Landlock enabled (lsm=landlock,…), and a container runtime whose filter permits it",
    "seccomp": "use a kernel built with CONFIG_SECCOMP_FILTER",
}


@dataclass(frozen=True)
class Plan:
    """What the fork server applies. `present` are the layers in use; `missing` says why each other one isn't.

    `first_uid` is the host uid of slot 0 (slot n gets the n-th after it), 0 where programs keep the caller's. `landlock` is the
    ABI version in use. `outer_user`: the server first enters a user namespace of its own, to be allowed the rest.
    `exact_tasks`: RLIMIT_NPROC counts a call by itself. `keep_search`: Python lies where the unprivileged uid can't go, and Landlock
    alone decides what it reads there.
    """

    present: frozenset[str]
    missing: dict[str, str] = field(default_factory=dict)
    first_uid: int = 0
    slots: int = 64
    landlock: int = 0
    outer_user: bool = False
    keep_search: bool = False
    cgroup: str = ""
    exact_tasks: bool = True

    @property
    def uids(self) -> range:
        """The host uids of programs; empty where they keep the caller's."""
        return range(self.first_uid, self.first_uid + self.slots if self.first_uid else 0)

    def mechanisms(self, guarantee: str) -> list[str]:
        """What upholds `guarantee` here."""
        return [name for name in GUARANTEES[guarantee] if name in self.present or name.startswith("always: ")]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "present": sorted(self.present)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Plan:
        return Plan(**{**fields, "present": frozenset(fields["present"])})

    def unmet(self) -> dict[str, str]:
        """Guarantees without any mechanism, each with the reasons and the way out."""
        faults = {}
        for guarantee, names in GUARANTEES.items():
            if not self.mechanisms(guarantee):
                reasons = "; ".join(f"{name}: {self.missing.get(name, 'absent')}" for name in names)
                faults[guarantee] = f"{reasons}. To get it: {' / '.join(HOW_TO_GET[name] for name in names if name in HOW_TO_GET)}."
        return faults


def attempt(action: Callable[[], None]) -> str:
    """Run `action` in a child that then ends; "" or what the kernel said."""
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


def enter_user_namespace(uids: range) -> None:
    """Become root of a new user namespace, so that the other namespaces may be made.

    An ordinary user can map itself only. Root without CAP_SYS_ADMIN (a container's) maps `uids` too, for the programs; that must be
    written from outside, by a process that stayed there.
    """
    uid, gid, target = os.geteuid(), os.getegid(), os.getpid()
    if not uids:
        kernel.unshare(kernel.CLONE_NEWUSER)
        _write_maps("self", f"0 {uid} 1", f"0 {gid} 1", deny_groups=True)
        return
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 1
        try:
            os.read(reader, 1)
            programs = f"{uids.start} {uids.start} {len(uids)}"
            _write_maps(str(target), f"0 {uid} 1\n{programs}", f"0 {gid} 1\n{programs}", deny_groups=False)
            code = 0
        finally:
            os._exit(code)
    os.close(reader)
    kernel.unshare(kernel.CLONE_NEWUSER)
    os.write(writer, b"1")
    os.close(writer)
    if os.waitpid(helper, 0)[1]:
        raise OSError("mapping the programs' uids into the user namespace is refused (CAP_SETUID and CAP_SETFCAP do it)")


def _write_maps(process: str, uid_map: str, gid_map: str, deny_groups: bool) -> None:
    texts = {"setgroups": "deny"} if deny_groups else {}
    for name, text in {**texts, "uid_map": uid_map, "gid_map": gid_map}.items():
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


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
    """A pid namespace for the server, and one for each of two children in it."""
    kernel.unshare(kernel.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        for _ in range(2):
            kernel.unshare(kernel.CLONE_NEWPID)
            child = os.fork()
            if child == 0:
                os._exit(0 if os.getpid() == 1 else 1)
            kernel.setns(own, kernel.CLONE_NEWPID)
            if os.waitpid(child, 0)[1]:
                os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise OSError("a pid namespace for each call is refused inside the server's own")


def _try_seccomp() -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(seccomp.build(seccomp.Filter(), syscalls.machine()))


def _try_landlock() -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict(landlock.abi(), landlock.open_paths({"/": landlock.READ}), scope=True)


def _free_uids(count: int) -> int:
    """The first of `count` consecutive uids that no account has."""
    taken = {account.pw_uid for account in pwd.getpwall()}
    first = 61200
    while not taken.isdisjoint(range(first, first + count)):
        first += count
    return first


def _unreachable(uid: int) -> bool:
    """Whether `uid` can't read Python's own files."""

    def read() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        for path in rootfs.search_path():
            if os.path.isdir(path):
                os.listdir(path)
            else:
                os.stat(path)

    return bool(attempt(read))


def find(without: frozenset[str] = frozenset(), slots: int = 64) -> Plan:
    """Try every layer but those in `without` (a test's way to leave layers out) and say what is there."""
    if unknown := without - set(LAYERS):
        raise ValueError(f"unknown isolation layers {sorted(unknown)}; there are {', '.join(LAYERS)}.")
    missing = dict.fromkeys(without, "left out on request")
    privileged = os.geteuid() == 0 and bool(kernel.effective_capabilities() >> kernel.CAP_SYS_ADMIN & 1)
    outer = not privileged and "user_namespace" not in missing
    first_uid = _free_uids(slots) if os.geteuid() == 0 and "separate_uid" not in missing else 0
    uids = range(first_uid, first_uid + slots if first_uid else 0)

    def test(name: str, action: Callable[[], None]) -> None:
        if name not in missing and (said := attempt(action)):
            missing[name] = said

    test("user_namespace", lambda: enter_user_namespace(uids if outer else range(0)))
    for name, action in {
        "mount_namespace": _try_mounts,
        "pid_namespace": _try_pids,
        "network_namespace": lambda: kernel.unshare(kernel.CLONE_NEWNET),
        "ipc_namespace": lambda: kernel.unshare(kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS),
    }.items():
        if not privileged and "user_namespace" in missing:
            missing.setdefault(name, f"user namespaces are refused ({missing['user_namespace']})")
        else:
            test(name, _inside(outer, uids, action))
    test("seccomp", _try_seccomp)
    test("landlock", _try_landlock)
    version = 0 if "landlock" in missing else landlock.abi()
    if "landlock_scopes" not in missing and not landlock.scopes_signals(version):
        missing["landlock_scopes"] = f"Landlock ABI {version} can't scope signals (Linux 6.12 can)"
    if "separate_uid" not in missing and not first_uid:
        missing["separate_uid"] = "not started as root: programs keep the caller's uid"
    if "separate_uid" not in missing:
        test("separate_uid", lambda: os.setresuid(first_uid, first_uid, first_uid))
    group = "" if "cgroup" in missing else cgroups.find()
    if "cgroup" not in missing and not group:
        missing["cgroup"] = "no memory controller that this process may write to: memory is summed by the supervisor"
    present = frozenset(LAYERS) - missing.keys()
    uid = first_uid if "separate_uid" in present else 0
    hidden = bool(uid) and "mount_namespace" not in present and _unreachable(uid)
    exact = bool(uid) or ("user_namespace" in present and os.geteuid() != 0 and _counts_per_namespace())
    return Plan(
        present, missing, first_uid=uid, slots=slots, landlock=version, outer_user=outer and "user_namespace" in present,
        keep_search=hidden and "landlock" in present, cgroup=group, exact_tasks=exact,
    )  # fmt: skip


def _counts_per_namespace() -> bool:
    """Since Linux 5.14 a user namespace has a process count of its own; before, a limit would count all of the user's processes."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (5, 14)
