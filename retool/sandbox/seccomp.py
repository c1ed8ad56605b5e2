"""The system-call filter: a classic BPF program built here, so that no library has to be there.

Everything denied answers EPERM (ENOSYS where libc then takes an older way), so that a program sees
an ordinary error. A call of a foreign architecture kills the process. The filter lists what is
denied; numbers newer than `syscalls.LAST_REVIEWED` don't exist for programs. Source: Linux
`Documentation/userspace-api/seccomp_filter.rst`.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import kernel
from .kernel import PR_SET_THP_DISABLE
from .syscalls import AUDIT_ARCH, LAST_REVIEWED, TABLES, machine

# Instructions of classic BPF
_LOAD = 0x20
_JUMP = 0x05
_JEQ = 0x15
_JGE = 0x35
_JSET = 0x45
_AND = 0x54
_RET = 0x06
# Verdicts
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
_ASK = 0x7FC00000
_DENY = _ERRNO | errno.EPERM
_MISSING = _ERRNO | errno.ENOSYS
# Where a call's number and its architecture stand
_NR = 0
_ARCH = 4

PRIVILEGED = frozenset(
    "mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick "
    "mount_setattr statmount listmount unshare setns swapon swapoff reboot kexec_load "
    "kexec_file_load init_module finit_module delete_module create_module query_module "
    "get_kernel_syms acct quotactl quotactl_fd settimeofday clock_settime clock_adjtime adjtimex "
    "sethostname setdomainname syslog "
    "vhangup iopl ioperm nfsservctl lookup_dcookie uselib ustat sysfs _sysctl mknod mknodat".split()
)
SURFACE = frozenset(
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register io_setup "
    "keyctl add_key request_key fanotify_init fanotify_mark name_to_handle_at open_by_handle_at "
    "personality modify_ldt remap_file_pages vmsplice mbind set_mempolicy get_mempolicy "
    "set_mempolicy_home_node migrate_pages move_pages seccomp landlock_create_ruleset "
    "landlock_add_rule landlock_restrict_self lsm_get_self_attr lsm_set_self_attr lsm_list_modules "
    "getpmsg putpmsg afs_syscall "
    "tuxcall security vserver".split()
)
OTHERS = frozenset(
    "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd".split()
)
# Memory that no process's own account shows, or that outlives the call.
HIDDEN_MEMORY = frozenset(
    "memfd_create memfd_secret shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd "
    "msgrcv msgctl mq_open "
    "mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr".split()
)
NETWORK = frozenset("socket bind connect listen accept accept4 setsockopt".split())
# What the call leaves for others to see or to wait for, or tells of the machine and of other calls,
# on files that it may read.
TRACES = frozenset("inotify_init inotify_init1 inotify_add_watch flock sysinfo capget".split())
# Programs run at the lowest priority, in one session with its own share of the processors: nobody
# leaves either.
PRIORITY = frozenset("sched_setscheduler sched_setparam sched_setattr ioprio_set setsid".split())
# Landlock knows no right to change these; a read-only mount does.
METADATA = frozenset(
    "chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat utime utimes futimesat utimensat setxattr "
    "lsetxattr fsetxattr "
    "removexattr lremovexattr fremovexattr".split()
)
# Calls that ask or change something of a process, by where its number stands: it may only be 0, or
# the process's own.
OWN_PROCESS = {
    "prlimit64": 0,
    "sched_getparam": 0,
    "sched_getscheduler": 0,
    "sched_rr_get_interval": 0,
    "sched_setaffinity": 0,
    "sched_getaffinity": 0,
    "sched_getattr": 0,
    "getpgid": 0,
    "getsid": 0,
    "get_robust_list": 0,
    "rt_sigqueueinfo": 0,
}
SIGNALS = ("kill", "tkill", "tgkill")
_F_SETOWN = 8
_F_SETSIG = 10
_F_SETOWN_EX = 15
_F_SETLEASE = 1024
_F_NOTIFY = 1026
_F_SETPIPE_SZ = 1031
# Is it a terminal, how large, how much is there to read, don't block, close on exec: all that
# programs need of ioctl.
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PR_SCHED_CORE = 62
_O_TMPFILE = 0o20000000
_MAP_SHARED = 0x01
_MAP_ANONYMOUS = 0x20
_AF_UNIX = 1
_SOCK_STREAM = 1
_PRIO_USER = 2
NEW_NAMESPACES = 0x7E020000  # mnt, cgroup, uts, ipc, user, pid, net


@dataclass(frozen=True)
class Filter:
    """What the filter adds to the calls that are always denied.

    `network`: no sockets but connected pairs. `own_process`: no signal, limit, priority or question
    goes to a process but the caller, for where no pid namespace hides the others. `one_group`:
    nobody leaves the call's process group, so that killing it gets them all. `keep_files`: no files
    without a name, which a supervisor that measures the work folder couldn't see. `keep_metadata`:
    no change of modes, owners, dates and attributes, which Landlock doesn't cover. `nameless`: the
    host's name isn't told. `count_pairs`: the buffers of socket pairs are in no account.
    `listener`: whoever holds it is asked about socket pairs that count, and about signals to other
    processes, which may be the call's own; without it both are denied.
    """

    network: bool = True
    own_process: bool = False
    one_group: bool = False
    keep_files: bool = False
    keep_metadata: bool = False
    nameless: bool = False
    count_pairs: bool = False
    listener: bool = False

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask a listener about."""
        return self.listener and (self.own_process or self.count_pairs)


def _op(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; a test goes on `if_true` or `if_false` instructions further down."""
    return struct.pack("HBBI", code, if_true, if_false, operand & 0xFFFFFFFF)


def _low(argument: int) -> bytes:
    """Load the low half of an argument (little-endian machines)."""
    return _op(_LOAD, 16 + 8 * argument)


_DENIED = _op(_RET, _DENY)
_ALLOWED = _op(_RET, _ALLOW)


def _one_of(argument: int, values: Sequence[int], found: int, other: int) -> list[bytes]:
    """The verdict `found` where the argument is one of the values, `other` elsewhere."""
    last = len(values) - 1
    tests = [
        _op(_JEQ, value, last - index, 0 if index < last else 1)
        for index, value in enumerate(values)
    ]
    return [_low(argument), *tests, _op(_RET, found), _op(_RET, other)]


def _denied(wanted: Filter) -> frozenset[str]:
    """The calls that are denied whatever their arguments."""
    names = PRIVILEGED | SURFACE | OTHERS | HIDDEN_MEMORY | TRACES | PRIORITY
    if wanted.network:
        names |= NETWORK
    if wanted.one_group:
        names |= {"setpgid"}
    if wanted.keep_metadata:
        names |= METADATA
    if wanted.nameless:
        names |= {"uname"}
    if wanted.own_process:
        names |= {"pidfd_open", "pidfd_send_signal", "rt_tgsigqueueinfo", "ioprio_get"}
    return names


def _rules(wanted: Filter, architecture: str, pid: int) -> dict[int, list[bytes]]:
    """What happens at each call that isn't simply allowed: instructions that start with the number
    loaded and end in a return.
    """
    table = TABLES[architecture]
    rules = {table[name]: [_DENIED] for name in _denied(wanted) if name in table}
    # Its flags lie in memory, out of a filter's sight
    rules[table["clone3"]] = [_op(_RET, _MISSING)]
    rules[table["clone"]] = [_low(0), _op(_JSET, NEW_NAMESPACES, 0, 1), _DENIED, _ALLOWED]
    # Shared anonymous memory stays allocated when no process maps it any more: files in the work
    # folder, which count, do instead.
    shared = _MAP_SHARED | _MAP_ANONYMOUS
    rules[table["mmap"]] = [
        _low(3),
        _op(_AND, shared),
        _op(_JEQ, shared, 0, 1),
        _DENIED,
        _ALLOWED,
    ]
    rules[table["prctl"]] = _one_of(0, (PR_SET_THP_DISABLE, _PR_SCHED_CORE), _DENY, _ALLOW)
    # Signals to whoever the program names as a descriptor's owner; notes about files; memory in
    # pipes.
    commands = (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY, _F_SETPIPE_SZ)
    rules[table["fcntl"]] = _one_of(1, commands, _DENY, _ALLOW)
    rules[table["ioctl"]] = _one_of(1, _IOCTLS, _ALLOW, _DENY)
    ask = _ASK if wanted.listener else _DENY
    if wanted.network:
        rules[table["socketpair"]] = _stream_pair(ask if wanted.count_pairs else _ALLOW)
    if wanted.keep_files:
        rules[table["openat2"]] = [_op(_RET, _MISSING)]
        for name, flags in (("open", 1), ("openat", 2)):
            if name in table:
                rules[table[name]] = [
                    _low(flags),
                    _op(_JSET, _O_TMPFILE, 0, 1),
                    _DENIED,
                    _ALLOWED,
                ]
    if wanted.own_process:
        rules |= _own_process_rules(table, pid, ask)
    return rules


def _stream_pair(verdict: int) -> list[bytes]:
    """Of `socketpair`: `verdict` for a connected stream pair, which can't be pointed at anybody else
    and which asyncio and multiprocessing need; anything else is denied.
    """
    return [
        _low(0),
        _op(_JEQ, _AF_UNIX, 0, 4),
        _low(1),
        _op(_AND, 0xF),  # the kind, without flags
        _op(_JEQ, _SOCK_STREAM, 0, 1),
        _op(_RET, verdict),
        _DENIED,
    ]


def _own_process_rules(table: Mapping[str, int], pid: int, ask: int) -> dict[int, list[bytes]]:
    """Questions, changes and signals: to the process itself; signals to another get `ask`."""
    rules = {
        table[name]: _one_of(argument, (0, pid), _ALLOW, _DENY)
        for name, argument in OWN_PROCESS.items()
    }
    rules |= {table[name]: _one_of(0, (0, pid, -pid), _ALLOW, ask) for name in SIGNALS}
    for name in ("getpriority", "setpriority"):
        # Of a process or a group, its own; all processes of a user are others' too.
        rules[table[name]] = [
            _low(0),
            _op(_JEQ, _PRIO_USER, 0, 1),
            _DENIED,
            *_one_of(1, (0, pid), _ALLOW, _DENY),
        ]
    return rules


def _search(segments: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """A binary search over (first number, instructions): a dozen comparisons instead of hundreds.

    The kernel also runs every number through the filter once at installation, which a long chain
    would make the dearest step.
    """
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    below = _search(segments[:middle])
    above = _search(segments[middle:])
    if len(below) < 256:
        return [_op(_JGE, segments[middle][0], len(below), 0), *below, *above]
    # A test reaches 255 instructions, a jump all
    return [
        _op(_JGE, segments[middle][0], 0, 1),
        _op(_JUMP, len(below)),
        *below,
        *above,
    ]


def build(wanted: Filter, architecture: str, pid: int = 0) -> bytes:
    """The filter's instructions, for `architecture`.

    `pid` is the process's own, where `own_process` asks for it.
    """
    rules = _rules(wanted, architecture, pid)
    allow = [_op(_RET, _ALLOW)]
    segments: list[tuple[int, list[bytes]]] = []
    for number in range(LAST_REVIEWED + 1):
        block = rules.get(number, allow)
        if not segments or segments[-1][1] != block:
            segments.append((number, block))
    # x32 numbers carry bit 30 and end here too
    segments.append((LAST_REVIEWED + 1, [_op(_RET, _MISSING)]))
    head = [
        _op(_LOAD, _ARCH),
        _op(_JEQ, AUDIT_ARCH[architecture], 1, 0),
        _op(_RET, _KILL),
        _op(_LOAD, _NR),
    ]
    return b"".join([*head, *_search(segments)])


def name_owner(program: bytes, placeholder: int, pid: int) -> bytes:
    """The instructions built for process `placeholder`, for process `pid`: a filter is built once
    and named for each child.
    """
    for sign in (1, -1):
        program = program.replace(
            struct.pack("I", sign * placeholder & 0xFFFFFFFF),
            struct.pack("I", sign * pid & 0xFFFFFFFF),
        )
    return program


def install(program: bytes, listen: bool = False) -> int:
    """Filter this thread, and all that it starts, for good. Needs `no_new_privs`. `listen`: returns
    a descriptor on which another process hears of the calls that the filter wants to ask about,
    else -1.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)), 16
    )
    if not listen:
        kernel.prctl(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        return -1
    number = ctypes.c_long(TABLES[machine()]["seccomp"])
    set_filter = ctypes.c_uint(1)
    new_listener = ctypes.c_ulong(8)
    return kernel.check(
        kernel.libc.syscall(number, set_filter, new_listener, header), "seccomp with a listener"
    )
