"""From a fresh fork of the warm server to a process that holds nothing but its work folder and
three pipes.

The order is forced: mounts need privileges, privileges go before the filter, and the filter forbids
every step that came before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass

from . import cgroups, kernel, landlock, rootfs, seccomp, syscalls
from .layers import Plan

# a tenth of the weight of the host's own processes where they want the same processor; there is no
# way back up
NICENESS = 10
NOBODY = 0x7A7A7A7A  # stands in a filter for the pid of the child that it will be made out to
CONTROL = 3  # the descriptor on which the program text arrives; closed before the program starts


@dataclass(frozen=True)
class Place:
    """Where one child lives: its slot, its folder (on the host, where there is no private mount),
    its pipes, and `account`, through which it joins the memory account of its slot, if it has one.
    """

    slot: int
    folder: str
    control: int
    stdout: int
    stderr: int
    account: int = -1


def filter_for(plan: Plan) -> seccomp.Filter:
    """The filter takes over what no namespace and no kernel account does here."""
    no_pids = "pid_namespace" not in plan.present
    own_folder = "mount_namespace" in plan.present
    return seccomp.Filter(
        own_process=no_pids,
        one_group=no_pids,
        keep_files=not own_folder,
        keep_metadata=not own_folder,
        nameless="ipc_namespace" not in plan.present,
        count_pairs="cgroup" not in plan.present,
        listener="listener" in plan.present,
    )


@dataclass(frozen=True)
class Confinement:
    """What is the same for every child, made once: `granted` are the Landlock rules of the paths
    that every program may read, `filter` is the system-call program, made out to the process
    `NOBODY`; `listen`: it asks a listener. `folder_mb` bounds the work folder.
    """

    plan: Plan
    granted: list[tuple[int, int]]
    folder_mb: int
    filter: bytes
    listen: bool


def prepare(plan: Plan, granted: list[tuple[int, int]], folder_mb: int) -> Confinement:
    """The parts of `confine` that needn't be repeated."""
    wanted = filter_for(plan)
    program = (
        seccomp.build(wanted, syscalls.machine(), NOBODY) if "seccomp" in plan.present else b""
    )
    return Confinement(plan, granted, folder_mb, program, wanted.asks)


def confine(common: Confinement, place: Place) -> list[int]:
    """Give up everything that the plan takes away. Returns descriptors for the supervisor: of the
    work folder, the current one from now on, and of the filter's listener where it has one.
    """
    plan = common.plan
    # Not a session of its own: the kernel may give each an equal share of the processors
    os.setpgid(0, 0)
    if place.account >= 0:
        # Each by itself: the kernel may let who moves a process wait, the supervisor for all
        cgroups.join(place.account)
    uid = plan.first_uid + place.slot if plan.first_uid else 0
    _own_folder(plan, place, uid, common.folder_mb)
    _give_up_privileges(plan, uid)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    # Other processes of this uid can neither trace it nor read its memory
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if "cgroup" not in plan.present:
        with contextlib.suppress(OSError):  # unknown to the kernel: it has no such pages
            # So that page faults bound the memory in `accounting.usage`
            kernel.prctl(kernel.PR_SET_THP_DISABLE, 1)
    if "pid_namespace" not in plan.present:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    folder = os.open(place.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(folder)
    if "landlock" in plan.present:
        everything = landlock.file_rights(plan.landlock) & ~landlock.IOCTL_DEV
        if "mount_namespace" not in plan.present:
            # A folder on the host is measured by looking at it: an open file whose name is gone
            # would escape that.
            everything &= ~landlock.REMOVE_FILE
        landlock.restrict(
            plan.landlock,
            [*common.granted, (folder, everything)],
            "landlock_scopes" in plan.present,
        )
    folder = _keep_descriptors(place, folder)
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    if not common.filter:
        return [folder]
    listener = seccomp.install(
        seccomp.name_owner(common.filter, NOBODY, os.getpid()), common.listen
    )
    return [folder, listener] if common.listen else [folder]


def _own_folder(plan: Plan, place: Place, uid: int, folder_mb: int) -> None:
    if "ipc_namespace" in plan.present:
        kernel.unshare(kernel.CLONE_NEWIPC)
    if "mount_namespace" in plan.present:
        kernel.unshare(kernel.CLONE_NEWNS)
        rootfs.private_folder(folder_mb, uid)
    else:
        os.mkdir(place.folder, 0o700)
        if uid:
            os.chown(place.folder, uid, uid)


def _give_up_privileges(plan: Plan, uid: int) -> None:
    if "user_namespace" not in plan.present:
        # needs the privileges that go next; a new user namespace starts with a full set again
        kernel.drop_bounding_set()
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if "user_namespace" in plan.present:
        # Nothing is mapped into it: no uid to become. It also starts a process count of its own for
        # RLIMIT_NPROC.
        kernel.unshare(kernel.CLONE_NEWUSER)
        kernel.drop_bounding_set()
    kernel.set_capabilities()


def _keep_descriptors(place: Place, folder: int) -> int:
    """0 is empty, 1 and 2 are the pipes, 3 the control socket, 4 the work folder; the rest is
    closed.
    """
    wanted = (os.open("/dev/null", os.O_RDONLY), place.stdout, place.stderr, place.control, folder)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(wanted)) for fd in wanted]
    for index, fd in enumerate(high):
        os.dup2(fd, index)
    kernel.close_from(len(high))
    os.set_inheritable(CONTROL, False)
    return CONTROL + 1
