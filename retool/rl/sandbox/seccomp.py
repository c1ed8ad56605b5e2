"""The system-call filter: a classic BPF program built here, so that no library has to be there.

Everything denied answers EPERM (ENOSYS where libc then takes an older way), so that a program sees an ordinary error. A call of a
foreign architecture kills the process. The filter lists what is denied; numbers newer than `syscalls.LAST_REVIEWED` don't exist for
programs. Source: Linux `Documentation/userspace-api/seccomp_filter.rst`.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass

from . import kernel
from .kernel import PR_SET_THP_DISABLE
from .syscalls import AUDIT_ARCH, LAST_REVIEWED, TABLES

_LOAD, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH = 0, 4
_DENY, _MISSING = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS

PRIVILEGED = frozenset(
    "mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr statmount listmount unshare "
    "setns swapon swapoff reboot kexec_load kexec_file_load init_module finit_module delete_module create_module query_module "
    "get_kernel_syms acct quotactl quotactl_fd settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname syslog "
    "vhangup iopl ioperm nfsservctl lookup_dcookie uselib ustat sysfs _sysctl mknod mknodat".split()
)
SURFACE = frozenset(
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register io_setup keyctl add_key request_key "
    "fanotify_init fanotify_mark name_to_handle_at open_by_handle_at personality modify_ldt remap_file_pages vmsplice mbind "
    "set_mempolicy get_mempolicy set_mempolicy_home_node migrate_pages move_pages seccomp landlock_create_ruleset "
    "landlock_add_rule landlock_restrict_self lsm_get_self_attr lsm_set_self_attr lsm_list_modules getpmsg putpmsg afs_syscall "
    "tuxcall security vserver".split()
)
OTHERS = frozenset("ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd".split())
# Memory that no process's own account shows, or that outlives the call.
HIDDEN_MEMORY = frozenset(
    "memfd_create memfd_secret shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open "
    "mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr".split()
)
NETWORK = frozenset("socket bind connect listen accept accept4".split())
_O_TMPFILE = 0o20000000
NEW_NAMESPACES = 0x7E020000  # mnt, cgroup, uts, ipc, user, pid, net


@dataclass(frozen=True)
class Filter:
    """What the filter adds to the calls that are always denied.

    `network`: no sockets but connected pairs. `own_signals`: signals only to the process itself or its group, for where no pid
    namespace or Landlock scope keeps them in. `one_group`: nobody leaves the call's process group, so that killing it gets them all.
    `keep_files`: no files without a name, which a supervisor that measures the work folder couldn't see.
    """

    network: bool = True
    own_signals: bool = False
    one_group: bool = False
    keep_files: bool = False


def _op(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("HBBI", code, jt, jf, k & 0xFFFFFFFF)


def _low(argument: int) -> bytes:
    """Load the low half of an argument (little-endian machines)."""
    return _op(_LOAD, 16 + 8 * argument)


def _rules(wanted: Filter, machine: str, pid: int) -> dict[int, list[bytes]]:
    """What happens at each call that isn't simply allowed: instructions that start with the number loaded and end in a return."""
    table = TABLES[machine]
    names = PRIVILEGED | SURFACE | OTHERS | HIDDEN_MEMORY
    names |= NETWORK if wanted.network else frozenset()
    names |= frozenset({"setsid", "setpgid"}) if wanted.one_group else frozenset()
    names |= frozenset({"pidfd_send_signal", "rt_tgsigqueueinfo"}) if wanted.own_signals else frozenset()
    deny, allow = _op(_RET, _DENY), _op(_RET, _ALLOW)
    rules = {table[name]: [deny] for name in names if name in table}
    rules[table["clone3"]] = [_op(_RET, _MISSING)]  # its flags lie in memory, out of a filter's sight
    rules[table["clone"]] = [_low(0), _op(_JSET, NEW_NAMESPACES, 0, 1), deny, allow]
    # Shared anonymous memory stays allocated when no process maps it any more: files in the work folder, which count, do instead.
    rules[table["mmap"]] = [_low(3), _op(_AND, 0x21), _op(_JEQ, 0x21, 0, 1), deny, allow]
    rules[table["prctl"]] = [_low(0), _op(_JEQ, PR_SET_THP_DISABLE, 0, 1), deny, allow]
    if wanted.network:
        # A connected stream pair can't be pointed at anybody else; asyncio and multiprocessing need one.
        rules[table["socketpair"]] = [_low(0), _op(_JEQ, 1, 0, 4), _low(1), _op(_AND, 0xF), _op(_JEQ, 1, 0, 1), allow, deny]
    if wanted.keep_files:
        rules[table["openat2"]] = [_op(_RET, _MISSING)]
        for name, flags in (("open", 1), ("openat", 2)):
            if name in table:
                rules[table[name]] = [_low(flags), _op(_JSET, _O_TMPFILE, 0, 1), deny, allow]
    if wanted.own_signals:
        for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo"):
            rules[table[name]] = [_low(0), _op(_JEQ, pid, 1, 0), _op(_JEQ, 0, 0, 1), allow, deny]
    return rules


def _search(segments: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """A binary search over (first number, instructions): a dozen comparisons instead of hundreds.

    The kernel also runs every number through the filter once at installation, which a long chain would make the dearest step.
    """
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    below, above = _search(segments[:middle]), _search(segments[middle:])
    assert len(below) < 256, "a jump reaches 255 instructions"
    return [_op(_JGE, segments[middle][0], len(below), 0), *below, *above]


def build(wanted: Filter, machine: str, pid: int = 0) -> bytes:
    """The filter's instructions, for `machine`. `pid` is the process's own, where `own_signals` asks for it."""
    rules = _rules(wanted, machine, pid)
    allow = [_op(_RET, _ALLOW)]
    segments: list[tuple[int, list[bytes]]] = []
    for number in range(LAST_REVIEWED + 1):
        block = rules.get(number, allow)
        if not segments or segments[-1][1] != block:
            segments.append((number, block))
    segments.append((LAST_REVIEWED + 1, [_op(_RET, _MISSING)]))  # x32 numbers carry bit 30 and end here too
    head = [_op(_LOAD, _ARCH), _op(_JEQ, AUDIT_ARCH[machine], 1, 0), _op(_RET, _KILL), _op(_LOAD, _NR)]
    return b"".join([*head, *_search(segments)])


def install(program: bytes) -> None:
    """Filter this thread, and all that it starts, for good. Needs `no_new_privs`."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)), 16)
    kernel.prctl(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
