"""The published suite: what each program tries, and how its result must read.

A program prints ESCAPED where it got what it wanted; `<NAME>` is filled in with the host's address
of a thing. `cause` is a pattern that the text shown to the model must match. Everything is bounded:
at most 200 processes, 2 GB, 20 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

DENIED = r"PermissionError|FileNotFoundError|ProcessLookupError|NotADirectoryError|Read-only file system|Invalid cross-device"


@dataclass(frozen=True)
class Attack:
    name: str
    tries: str
    program: str
    cause: str
    status: tuple[str, ...] = ("error",)
    timeout: float | None = None
    memory_mb: int | None = None
    guarantee: str = (
        ""  # the one that forbids it: where it is unmet, the attack is expected to get through
    )


# A raw system call, past every check that Python makes: prints ESCAPED where the kernel said yes.
SYSCALL = """
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
x86 = platform.machine() == "x86_64"
def call(on_x86, on_arm, *arguments):
    answer = libc.syscall(ctypes.c_long(on_x86 if x86 else on_arm), *arguments)
    print("ESCAPED" if answer >= 0 else errno.errorcode[ctypes.get_errno()])
L = ctypes.c_long
"""
REFUSED = r"\A(EPERM|ENOSYS|EACCES)(\n(EPERM|ENOSYS|EACCES))*\Z"

PROCESSES = [
    Attack(
        "fork bomb",
        "200 processes that stay",
        """
import os, time
for i in range(200):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
print("ESCAPED")
""",
        "BlockingIOError|ProcessLimitError",
        ("error", "process_limit"),
    ),
    Attack(
        "fork bomb, doubling",
        "every process forks, to a depth of 7",
        """
import os, time
refused = 0
for i in range(7):
    try:
        os.fork()
    except BlockingIOError:
        refused += 1
print("refused", refused)
time.sleep(1)
""",
        "refused|ProcessLimitError",
        ("success", "process_limit"),
    ),
    Attack(
        "thread bomb",
        "200 threads",
        """
import threading, time
for i in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ESCAPED")
""",
        "can't start new thread|ProcessLimitError",
        ("error", "process_limit"),
    ),
    Attack(
        "daemonise",
        "a grandchild in a session of its own that outlives the call",
        """
import os, time
if os.fork() == 0:
    try:
        os.setsid()
    except PermissionError:
        pass
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
print("left behind")
""",
        "left behind",
        ("success",),
    ),
    Attack(
        "hold the pipes",
        "a child keeps stdout open after the end",
        """
import os, time
if os.fork() == 0:
    time.sleep(300)
print("gone")
""",
        "gone",
        ("success",),
    ),
    Attack(
        "ignore signals",
        "SIGTERM and the like are ignored, then it spins",
        """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    pass
""",
        "TimeoutError",
        ("timeout",),
        0.5,
    ),
    Attack(
        "busy loop",
        "spins",
        "while True:\n    pass",
        "TimeoutError: .*longer than 0.5 s",
        ("timeout",),
        0.5,
    ),
    Attack(
        "sleep",
        "waits",
        "print('before', flush=True)\nimport time\ntime.sleep(600)",
        "before\nTimeoutError",
        ("timeout",),
        1.0,
    ),
    Attack(
        "stop itself",
        "SIGSTOP",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(600)",
        "TimeoutError",
        ("timeout",),
        1.0,
    ),
    Attack("wait for stdin", "reads what nobody writes", "print(repr(input()))", "EOFError"),
    Attack("leave without ado", "os._exit", "import os\nos._exit(7)", "return code 7"),
    Attack(
        "close stdout",
        "both streams closed",
        "import os\nos.close(1)\nos.close(2)\nprint('unseen')",
        r"no output|return code",
        ("success", "error"),
    ),
    Attack(
        "close everything",
        "every descriptor closed",
        "import os\nos.closerange(0, 4096)",
        r"no output",
        ("success",),
    ),
]

RESOURCES = [
    Attack(
        "memory hog",
        "2 GB, bit by bit",
        """
hoard = []
for i in range(2000):
    hoard.append(bytearray(b"x") * (1 << 20))
print("ESCAPED")
""",
        "MemoryError",
        ("memory_limit",),
    ),
    Attack(
        "one big allocation",
        "8 GB at once, never touched",
        "bytearray(8 << 30)\nprint('ESCAPED')",
        "MemoryError",
        ("memory_limit",),
    ),
    Attack(
        "memory in many processes",
        "8 processes of 150 MB",
        """
import os, time
for i in range(8):
    if os.fork() == 0:
        hoard = bytearray(b"x") * (150 << 20)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.1)
time.sleep(10)
print("ESCAPED")
""",
        "MemoryError",
        ("memory_limit",),
    ),
    Attack(
        "memory in orphans",
        "4 processes of 150 MB whose parents have ended",
        """
import os, time
for i in range(4):
    if os.fork() == 0:
        if os.fork() == 0:
            hoard = bytearray(b"x") * (150 << 20)
            time.sleep(60)
        os._exit(0)
    os.wait()
time.sleep(10)
print("ESCAPED")
""",
        "MemoryError",
        ("memory_limit",),
    ),
    Attack(
        "shared memory nobody maps",
        "anonymous shared pages, dropped from every account",
        """
import mmap
mmap.mmap(-1, 1 << 20)
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "memory files", "memfd_create", "import os\nos.memfd_create('x')\nprint('ESCAPED')", DENIED
    ),
    Attack(
        "System V memory",
        "a segment that outlives its maker",
        SYSCALL + "call(29, 194, L(1234), L(1 << 20), L(0o1777))",
        REFUSED,
        ("success",),
    ),
    Attack(
        "disk fill",
        "200 files of 8 MB",
        """
for i in range(200):
    with open(f"fill{i}", "wb") as file:
        file.write(b"x" * (8 << 20))
print("ESCAPED")
""",
        "No space left|outgrew",
        ("error", "output_limit"),
    ),
    Attack(
        "disk fill out of sight",
        "open files without a name",
        """
import os
kept = []
for i in range(100):
    kept.append(os.open(f"fill{i}", os.O_CREAT | os.O_WRONLY))
    os.write(kept[-1], b"x" * (8 << 20))
    os.unlink(f"fill{i}")
print("ESCAPED")
""",
        "No space left|PermissionError",
    ),
    Attack(
        "huge file",
        "1 GB in one file",
        """
with open("huge", "wb") as file:
    for i in range(128):
        file.write(b"x" * (8 << 20))
print("ESCAPED")
""",
        "File too large|No space left|outgrew",
        ("error", "output_limit"),
    ),
    Attack(
        "many files",
        "40,000 empty ones",
        """
import time
for i in range(40000):
    open(f"f{i}", "w").close()
time.sleep(1)
print("ESCAPED")
""",
        "No space left|outgrew",
        ("error", "output_limit"),
    ),
    Attack(
        "deep folders",
        "2,000 folders in each other, for the broom to choke on",
        """
import os
for i in range(2000):
    os.mkdir("d")
    os.chdir("d")
print("dug")
""",
        "dug|outgrew",
        ("success", "output_limit"),
    ),
    Attack(
        "locked folders",
        "folders and files nobody may enter",
        """
import os
os.makedirs("a/b")
open("a/b/c", "w").close()
os.chmod("a/b/c", 0)
os.chmod("a/b", 0)
os.chmod("a", 0)
""",
        "no output|PermissionError",
        ("success", "error"),
    ),
    Attack(
        "open files",
        "1,000 of them",
        "kept = [open('f', 'w') for i in range(1000)]\nprint('ESCAPED')",
        "Too many open files",
    ),
    Attack(
        "raise the limits",
        "its own rlimits, upwards",
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
print("ESCAPED")
""",
        "not allowed to raise maximum limit",
    ),
    Attack(
        "endless output",
        "prints for ever",
        "while True:\n    print('x' * 1000)",
        "more bytes of output.*\nOutputLimitError",
        ("output_limit",),
    ),
    Attack(
        "much output",
        "1 MB, then an ordinary end",
        "print('x' * (1 << 20))",
        r"\[983041 more bytes of output\]",
        ("success",),
    ),
    Attack(
        "binary output",
        "every byte there is",
        "import os\nos.write(1, bytes(range(256)) * 4)",
        "\ufffd",
        ("success",),
    ),
]

NETWORK = [
    Attack(
        "TCP",
        "a listener on loopback",
        "import socket\nsocket.create_connection(('127.0.0.1', <TCP>), 2)\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "UDP",
        "a datagram to loopback",
        """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", <UDP>))
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "DNS",
        "a name",
        "import socket\nsocket.getaddrinfo('localhost.example', 80)\nprint('ESCAPED')",
        "gaierror|PermissionError",
    ),
    Attack(
        "unix socket",
        "a listener in the file system",
        """
import socket
socket.socket(socket.AF_UNIX).connect(<UNIX>)
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "abstract socket",
        "a listener without a file",
        """
import socket
socket.socket(socket.AF_UNIX).connect(<ABSTRACT>)
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "redirected pair",
        "half of a datagram pair, pointed at a listener",
        """
import socket
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.connect(<UNIX>)
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "stolen pair",
        "half of a stream pair, pointed at a listener",
        """
import socket
one, other = socket.socketpair()
one.connect(<UNIX>)
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "listen",
        "a server",
        "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "odd families",
        "packet, netlink, vsock, alg, raw",
        SYSCALL
        + """
for family, kind in ((17, 3), (16, 3), (40, 1), (38, 5), (2, 3), (10, 1)):
    call(41, 198, L(family), L(kind), L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "io_uring",
        "sockets without socket(2)",
        SYSCALL + "call(425, 425, L(8), ctypes.create_string_buffer(120))",
        REFUSED,
        ("success",),
    ),
]

FILES = [
    Attack(
        "read a host file", "the test's secret", "print('ESCAPED', open(<SECRET>).read())", DENIED
    ),
    Attack(
        "read the accounts",
        "/etc/passwd and /etc/shadow",
        """
for name in ("/etc/passwd", "/etc/shadow", "/etc/hostname"):
    try:
        print("ESCAPED", open(name).read())
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A(PermissionError|FileNotFoundError)",
        ("success",),
    ),
    Attack(
        "list host folders",
        "/, /root, /home, /tmp",
        """
import os
for name in ("/root", "/home", "/var", "/sys", "/proc", "/run", <FOLDER>):
    try:
        print("ESCAPED", os.listdir(name))
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A((PermissionError|FileNotFoundError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "/proc of others",
        "the test's environment, memory and files",
        """
for pid in (<TEST>, <VICTIM>, <SUPERVISOR>, <SERVER>, 1):
    for name in ("environ", "maps", "cmdline", "root/etc/passwd", "cwd/.", "mem"):
        try:
            print("ESCAPED", open(f"/proc/{pid}/{name}", "rb").read(10))
        except OSError as error:
            print(type(error).__name__)
""",
        "PermissionError|FileNotFoundError",
        ("success",),
    ),
    Attack(
        "write to a host file",
        "the test's secret",
        "open(<SECRET>, 'w').write('ESCAPED')\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "truncate a host file",
        "without opening it",
        "import os\nos.truncate(<SECRET>, 0)\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "create beside it",
        "a file in the test's folder",
        "import os\nopen(os.path.join(<FOLDER>, 'new'), 'w')\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "remove a host file",
        "the test's secret",
        "import os\nos.unlink(<SECRET>)\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "rename out",
        "a file of its own into the test's folder",
        """
import os
open("mine", "w").close()
os.rename("mine", os.path.join(<FOLDER>, "mine"))
print("ESCAPED")
""",
        DENIED,
    ),
    Attack(
        "hard link",
        "the secret under a name of its own",
        "import os\nos.link(<SECRET>, 'mine')\nprint('ESCAPED', open('mine').read())",
        DENIED,
    ),
    Attack(
        "symbolic link",
        "the secret through a link",
        "import os\nos.symlink(<SECRET>, 'mine')\nprint('ESCAPED', open('mine').read())",
        DENIED,
    ),
    Attack(
        "dot dot",
        "up and out",
        """
import os
here = os.open(".", os.O_RDONLY)
for i in range(40):
    here = os.open("..", os.O_RDONLY, dir_fd=here)
    print("ESCAPED" if "root" in os.listdir(here) and "bin" in os.listdir(here) else "nothing")
""",
        DENIED,
    ),
    Attack(
        "poison Python",
        "a module for the next call to import",
        """
import os
for folder in (<LIBRARY>, *__import__("sys").path):
    try:
        open(os.path.join(folder, "poison.py"), "w")
        print("ESCAPED" if folder != os.getcwd() else "own folder")
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A((PermissionError|OSError|FileNotFoundError|own folder|NotADirectoryError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "neighbours",
        "the folders of other calls",
        "import os\nprint('ESCAPED', os.listdir(<SCRATCH>))",
        DENIED,
    ),
    Attack(
        "devices",
        "disks, memory, terminals, GPUs",
        """
import glob, os
for name in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/tty", "/dev/ptmx", "/dev/fuse", "/dev/kvm", "/dev/nvidia0", "/dev/nvidiactl",
             "/dev/nvidia-uvm", "/dev/dri/renderD128", "/dev/shm/x"):
    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            os.open(name, mode)
            print("ESCAPED", name)
        except OSError as error:
            print(type(error).__name__)
""",
        r"\A((PermissionError|FileNotFoundError|OSError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "make a device",
        "mknod",
        "import os, stat\nos.mknod('disk', 0o666 | stat.S_IFBLK, os.makedev(254, 0))\nprint('ESCAPED')",
        DENIED,
    ),
    Attack(
        "file handles",
        "open_by_handle_at, past every path",
        SYSCALL
        + """
call(303, 264, L(-100), b"/", ctypes.create_string_buffer(b"\\x80" + bytes(140)), ctypes.create_string_buffer(8), L(0))
call(304, 265, L(-100), ctypes.create_string_buffer(140), L(0))
""",
        REFUSED,
        ("success",),
    ),
]

OTHERS = [
    Attack(
        "kill",
        "parent, fork server, supervisor, test, victim",
        """
import os
for pid in (<SERVER>, <SUPERVISOR>, <TEST>, <VICTIM>, os.getppid()):
    if pid > 1:
        try:
            os.kill(pid, 9)
            print("ESCAPED")
        except OSError as error:
            print(type(error).__name__)
print("done")
""",
        r"\A((PermissionError|ProcessLookupError)\n)*done",
        ("success",),
    ),
    Attack(
        "kill everybody",
        "kill -1, and every small pid",
        """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (-1, *range(2, 400)):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError:
            pass
print("still here")
""",
        "still here",
        ("success",),
    ),
    Attack(
        "stop the server",
        "SIGSTOP to the parent",
        """
import os, signal
try:
    os.kill(os.getppid() or 1, signal.SIGSTOP)
except OSError as error:
    print(type(error).__name__)
""",
        "no output|PermissionError|ProcessLookupError",
        ("success",),
    ),
    Attack(
        "ptrace",
        "attach to the victim, the server, anybody",
        SYSCALL
        + """
for pid in (<VICTIM>, <SERVER>, os.getppid(), 1):
    call(101, 117, L(16), L(pid), L(0), L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "foreign memory",
        "process_vm_readv",
        SYSCALL
        + """
for pid in (<VICTIM>, <SERVER>):
    call(310, 270, L(pid), ctypes.create_string_buffer(16), L(1), ctypes.create_string_buffer(16), L(1), L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "steal a descriptor",
        "pidfd_getfd",
        SYSCALL
        + """
descriptor = libc.syscall(L(434), L(<SUPERVISOR>), L(0))
call(438, 438, L(max(descriptor, 0)), L(0), L(0))
""",
        r"\A(EPERM|ENOSYS)",
        ("success",),
    ),
    Attack(
        "nice to itself only",
        "real-time priority",
        "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\nprint('ESCAPED')",
        DENIED,
    ),
]

PRIVILEGES = [
    Attack(
        "become root",
        "setuid, setgid, setgroups",
        """
import os
for name, argument in (("setuid", 0), ("setgid", 0), ("seteuid", 0), ("setgroups", [0])):
    try:
        getattr(os, name)(argument)
        print("ESCAPED")
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A((PermissionError|OSError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "mount",
        "a fresh /proc, and the disk",
        SYSCALL
        + """
call(165, 40, b"proc", b".", b"proc", L(0), L(0))
call(165, 40, b"/", b".", b"", L(4096), L(0))
call(428, 428, L(-100), b"/", L(1))
call(430, 430, b"tmpfs", L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "unmount",
        "the work folder, the root",
        SYSCALL + "call(166, 39, b'/box', L(2))\ncall(166, 39, b'/', L(2))",
        REFUSED,
        ("success",),
    ),
    Attack(
        "new namespaces",
        "unshare each kind",
        SYSCALL
        + """
for kind in (0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x2000000):
    call(272, 97, L(kind))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "clone into namespaces",
        "clone and clone3 with a new user namespace",
        SYSCALL
        + """
call(56, 220, L(0x10000000 | 17), L(0), L(0), L(0), L(0))
call(435, 435, ctypes.create_string_buffer((0x10000000).to_bytes(8, "little") + bytes(80)), L(88))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "other root",
        "chroot and pivot_root",
        SYSCALL + "call(161, 51, b'.')\ncall(155, 41, b'.', b'.')",
        REFUSED,
        ("success",),
    ),
    Attack(
        "kernel surface",
        "bpf, perf, userfaultfd, keyctl, add_key, personality, fanotify",
        SYSCALL
        + """
call(321, 280, L(0), ctypes.create_string_buffer(128), L(128))
call(298, 241, ctypes.create_string_buffer(128), L(0), L(-1), L(-1), L(0))
call(323, 282, L(0))
call(250, 219, L(0), L(-3), L(0))
call(248, 217, b"user", b"name", b"x", L(1), L(-2))
call(135, 92, L(0x0040000))
call(300, 262, L(0), L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "unknown calls",
        "numbers nobody has reviewed",
        SYSCALL
        + """
for number in (463, 468, 500, 1000, 0x40000000 + 41):
    call(number, number, L(0), L(0), L(0))
""",
        r"\A(ENOSYS\n?)+\Z",
        ("success",),
    ),
    Attack(
        "machine",
        "reboot, host name, clock, modules, swap",
        SYSCALL
        + """
call(170, 161, b"owned", L(5))
call(227, 112, L(0), ctypes.create_string_buffer(16))
call(175, 105, b"", L(0), b"")
call(167, 224, b"x", L(0))
call(169, 142, L(0), L(0), L(0), L(0))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "undo the filter",
        "seccomp and Landlock again, with less",
        SYSCALL
        + """
call(317, 277, L(1), L(0), L(0))
call(444, 444, L(0), L(0), L(1))
""",
        REFUSED,
        ("success",),
    ),
    Attack(
        "capabilities",
        "what it holds, by the kernel's word",
        """
import ctypes
libc = ctypes.CDLL(None)
data = ctypes.create_string_buffer(24)
libc.capget(b"\\x22\\x05\\x08\\x20" + bytes(4), data)
bounding = [number for number in range(41) if libc.prctl(23, number, 0, 0, 0) == 1]
restrained = libc.prctl(39, 0, 0, 0, 0)  # nothing that it executes can gain what the bounding set would let it
print("ESCAPED" if any(data.raw) or (bounding and not restrained) else "none", restrained)
""",
        "none 1",
        ("success",),
    ),
]

SECRETS = [
    Attack(
        "environment",
        "tokens in os.environ",
        """
import os
print("ESCAPED" if any("canary" in value for value in os.environ.values()) else sorted(os.environ))
""",
        "HOME",
        ("success",),
    ),
    Attack(
        "environment of C",
        "the block the process was started with",
        """
import ctypes
block = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
names = []
while block[len(names)] is not None:
    names.append(block[len(names)])
print("ESCAPED" if any(b"canary" in name or b"WANDB" in name for name in names) else "clean")
""",
        "clean",
        ("success",),
    ),
    Attack(
        "descriptors",
        "whatever was left open",
        """
import os
found = []
for number in range(3, 4096):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print("ESCAPED" if found else "none", found)
""",
        r"none \[\]",
        ("success",),
    ),
    Attack(
        "terminal",
        "a controlling terminal to type into",
        "import os\nos.open('/dev/tty', os.O_RDWR)\nprint('ESCAPED')",
        "OSError|Error",
    ),
    Attack(
        "walk the heap",
        "programs of other calls, left in the parent's memory",
        """
import gc
marker = "retool-" + "canary"
print("ESCAPED" if any(marker in item for item in gc.get_objects() if isinstance(item, (str, list, dict)) and item is not marker) else "clean")
""",
        "clean",
        ("success",),
    ),
    Attack(
        "stack frames",
        "what the runner's frames hold",
        """
import sys
frame, names = sys._getframe(), []
while frame is not None:
    names += [str(value)[:2000] for value in frame.f_locals.values()]
    frame = frame.f_back
marker = "retool-" + "canary-token"
print("ESCAPED" if any(marker in name for name in names) else "clean")
""",
        "clean",
        ("success",),
    ),
]

CRASHES = [
    Attack("segfault", "reads address 0", "import ctypes\nctypes.string_at(0)", "SIGSEGV"),
    Attack(
        "abort", "abort()", "import ctypes\nctypes.CDLL(None).abort()", "SIGABRT|SIGSEGV|SIGILL"
    ),
    Attack(
        "deep recursion",
        "the C stack",
        """
import sys
sys.setrecursionlimit(10**9)
def f(n):
    return list(map(f, [n + 1]))
f(0)
""",
        "SIGSEGV|RecursionError|MemoryError",
        ("error", "memory_limit"),
    ),
    Attack(
        "illegal instruction",
        "kills itself by SIGILL",
        "import ctypes, os, signal\nsignal.raise_signal(signal.SIGILL)\nos._exit(4)",
        "SIGILL|return code 4",
    ),
    Attack(
        "not UTF-8",
        "lone surrogates in the source",
        "x = '\udcff'\nprint(len(x))",
        "SyntaxError|UnicodeEncodeError|1",
        ("error", "success"),
    ),
    Attack("null bytes", "in the source", "print(1)\0", "ValueError|SyntaxError"),
    Attack("syntax error", "no program at all", "def f(:", "SyntaxError"),
    Attack(
        "10 MB of program",
        "one long text",
        "x = '" + "y" * (10 << 20) + "'\nprint(len(x))",
        "10485760",
        ("success",),
    ),
    Attack(
        "nested expression",
        "100,000 parentheses",
        "(" * 100000 + ")" * 100000,
        "SyntaxError|MemoryError|RecursionError|SIGSEGV",
        ("error", "memory_limit"),
    ),
    Attack(
        "exception that won't print",
        "__str__ raises",
        """
class Bad(Exception):
    def __str__(self):
        raise SystemExit
raise Bad
""",
        "Bad|return code 1",
    ),
    Attack(
        "forged result",
        "bytes on every descriptor",
        """
import os
for number in range(3, 64):
    try:
        os.write(number, b'{"exited": 1, "code": 0}')
        print("ESCAPED")
    except OSError:
        pass
os._exit(3)
""",
        "return code 3",
    ),
]

# Numbers on x86_64 and on aarch64, and what is asked about a process: each answers otherwise for
# one that is there than for none.
SIGHTS = """
QUESTIONS = {
    "kill": (62, 129, "pid", 0), "getpgid": (121, 155, "pid"), "getsid": (124, 156, "pid"), "getpriority": (140, 141, 0, "pid"),
    "sched_getscheduler": (145, 120, "pid"), "sched_getparam": (143, 121, "pid", "room"),
    "sched_getaffinity": (204, 123, "pid", 128, "room"), "sched_rr_get_interval": (148, 127, "pid", "room"),
    "sched_getattr": (315, 275, "pid", "room", 48, 0), "ioprio_get": (252, 31, 1, "pid"), "prlimit64": (302, 261, "pid", 7, 0, "room"),
    "get_robust_list": (274, 100, "pid", "room", "room"), "pidfd_open": (434, 434, "pid", 0), "tgkill": (234, 131, "pid", "pid", 0),
    "rt_sigqueueinfo": (129, 138, "pid", 0, "room"), "capget": (125, 90, "header", "room"), "PR_SCHED_CORE": (157, 167, 62, 0, "pid", 0, "room"),
    "setpgid": (109, 154, "pid", 0), "sched_setaffinity": (203, 122, "pid", 0, "room"), "process_madvise": (440, 440, -1, 0, 0, 0, 0),
}
def ask(question, pid):
    numbers, room = question[:2], ctypes.create_string_buffer(128)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, pid), 8)
    meanings = {"pid": L(pid), "room": room, "header": header}
    arguments = [meanings[part] if isinstance(part, str) else L(part) for part in question[2:]]
    answer = libc.syscall(L(numbers[0] if x86 else numbers[1]), *arguments)
    return "there" if answer >= 0 else errno.errorcode[ctypes.get_errno()]
"""

# A file of Python's own that the program may read: where Python lies below /root, it's a copy.
LIBRARY = """
import os, sys
library = next(path for path in (folder + "/os.py" for folder in sys.path) if os.access(path, os.R_OK))
"""

MEDDLING = [
    Attack(
        "limit another process",
        "its CPU time and open files, by prlimit64: the first kills it",
        """
import resource
for kind, most in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CPU, 1)):
    try:
        resource.prlimit(<VICTIM>, kind, (most, most))
        print("ESCAPED")
    except (OSError, ValueError) as error:
        print(type(error).__name__)
""",
        r"\A((PermissionError|ProcessLookupError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "slow another process",
        "niceness, I/O priority, policy and processors of the victim, or of all that its user runs",
        SYSCALL
        + """
import struct
call(141, 140, L(0), L(<VICTIM>), L(19))
call(251, 30, L(1), L(<VICTIM>), L(3 << 13))
call(203, 122, L(<VICTIM>), L(8), struct.pack("Q", 1))
call(144, 119, L(<VICTIM>), L(5), bytes(4))
call(142, 118, L(<VICTIM>), bytes(4))
call(314, 274, L(<VICTIM>), struct.pack("IIQiIQQQ", 48, 5, 0, 0, 0, 0, 0, 0), L(0))
for number, *arguments in ((141, L(2), L(0), L(19)), (251, L(3), L(0), L(3 << 13)), (251, L(3), L(os.getuid()), L(3 << 13))):
    libc.syscall(L(number if x86 else {141: 140, 251: 30}[number]), *arguments)  # all of a user's: whom it met is seen outside
""",
        r"\A((EPERM|ENOSYS|EACCES|ESRCH)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "signals by the kernel's hand",
        "a pipe that sends SIGKILL to its owner, who shall be the victim",
        """
import fcntl, os, struct, socket
sources = [os.pipe()]
try:
    one, other = socket.socketpair()
    sources.append((one.fileno(), other.fileno()))
except OSError:
    pass
for reader, writer in sources:
    for steps in (((8, <VICTIM>), (10, 9)), ((10, 9), (15, struct.pack("ii", 1, <VICTIM>))), ((10, 9), (0x8901, struct.pack("i", <VICTIM>)))):
        for step, argument in steps:
            try:
                (fcntl.ioctl if step > 255 else fcntl.fcntl)(reader, step, argument)
            except OSError as error:
                print(type(error).__name__)
        try:
            fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_ASYNC)
        except OSError as error:
            print(type(error).__name__)
        os.write(writer, b"x")
print("sent")
""",
        "sent",
        ("success",),
    ),
    Attack(
        "see processes",
        "twenty calls that answer otherwise for a process that is there",
        SYSCALL
        + "import struct"
        + SIGHTS
        + """
for name, question in QUESTIONS.items():
    nobody = ask(question, 4194000)
    for pid in (<VICTIM>, <SUPERVISOR>, <SERVER>):
        if pid > 2 and ask(question, pid) != nobody:
            print("ESCAPED", name, ask(question, pid), nobody)
print("seen")
""",
        r"\Aseen\Z",
        ("success",),
    ),
    Attack(
        "see processes in /proc",
        "by asking whether /proc/PID is there",
        """
import os
print("ESCAPED" if os.path.exists("/proc/<VICTIM>") or os.access("/proc/<SUPERVISOR>", 0) else "nothing there")
""",
        "nothing there",
        ("success",),
        guarantee="no host file names",
    ),
    Attack(
        "raise its own priority",
        "back to that of everybody else",
        """
import os
before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
for step in (
    lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)), lambda: os.setpriority(os.PRIO_PROCESS, 0, -5), lambda: os.nice(-1),
    lambda: os.setsid(),
):
    try:
        step()
    except OSError as error:
        print(type(error).__name__)
after = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
print("ESCAPED" if after != before or after[1] < 10 else "as low as before")
""",
        r"\A(PermissionError\n)+as low as before",
        ("success",),
    ),
]

METADATA = [
    Attack(
        "lock a folder",
        "chmod 0, by every call that does it",
        LIBRARY
        + SYSCALL
        + """
for path in (<SECRET>.encode(), <FOLDER>.encode()):
    if x86:
        call(90, 0, path, L(0))
    call(268, 53, L(-100), path, L(0))
    call(452, 452, L(-100), path, L(0), L(0))
for name in (library, os.path.dirname(library)):
    descriptor = os.open(name, os.O_RDONLY)
    call(91, 52, L(descriptor), L(0))
""",
        r"\A((EPERM|ENOSYS|EACCES|EROFS|ENOENT)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "give files away",
        "chown, by every call that does it",
        LIBRARY
        + SYSCALL
        + """
for path in (<SECRET>.encode(), <FOLDER>.encode()):
    if x86:
        call(92, 0, path, L(os.getuid()), L(os.getgid()))
        call(94, 0, path, L(os.getuid()), L(os.getgid()))
    call(260, 54, L(-100), path, L(os.getuid()), L(os.getgid()), L(0))
descriptor = os.open(library, os.O_RDONLY)
call(93, 55, L(descriptor), L(os.getuid()), L(os.getgid()))
""",
        r"\A((EPERM|ENOSYS|EACCES|EROFS|ENOENT)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "change dates",
        "of the secret, the folder, a library and the null device, by every call that does it",
        LIBRARY
        + SYSCALL
        + """
for path in (<SECRET>.encode(), <FOLDER>.encode(), b"/dev/null"):
    if x86:
        call(132, 0, path, L(0))
        call(235, 0, path, L(0))
        call(261, 0, L(-100), path, L(0))
    call(280, 88, L(-100), path, L(0), L(0))
descriptor = os.open(library, os.O_RDONLY)
call(280, 88, L(descriptor), L(0), L(0), L(0))
""",
        r"\A((EPERM|ENOSYS|EACCES|EROFS|ENOENT)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "notes on files",
        "extended attributes, which the next call could read",
        LIBRARY
        + SYSCALL
        + """
for path in (<SECRET>.encode(), <FOLDER>.encode()):
    call(188, 5, path, b"user.note", b"x", L(1), L(0))
    call(189, 6, path, b"user.note", b"x", L(1), L(0))
    call(197, 14, path, b"user.note")
    call(198, 15, path, b"user.note")
    call(463, 463, L(-100), path, L(0), b"user.note", ctypes.create_string_buffer(16), L(16))
descriptor = os.open(library, os.O_RDONLY)
call(190, 7, L(descriptor), b"user.note", b"x", L(1), L(0))
call(199, 16, L(descriptor), b"user.note")
""",
        r"\A((EPERM|ENOSYS|EACCES|EROFS|ENOENT)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "file flags",
        "chattr on a library, by ioctl",
        LIBRARY
        + """
import fcntl, os, struct
for name in (library, os.path.dirname(library)):
    descriptor = os.open(name, os.O_RDONLY)
    for command, argument in ((0x40086602, struct.pack("Q", 0x40)), (0x401C5820, bytes(28)), (0x40087602, struct.pack("Q", 1)), (0x80086601, bytes(8))):
        try:
            fcntl.ioctl(descriptor, command, argument)
            print("ESCAPED")
        except OSError as error:
            print(type(error).__name__)
""",
        r"\A((PermissionError|OSError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "watch files",
        "inotify on the test's folder and on the library",
        SYSCALL
        + """
call(294, 26, L(0))
call(253, 26, L(0))
call(254, 27, L(0), <FOLDER>.encode(), L(0xFFF))
""",
        r"\A((EPERM|ENOSYS|EBADF|EINVAL)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "watch folders the old way",
        "dnotify and leases on the library",
        LIBRARY
        + """
import fcntl, os
for name, command, argument in ((os.path.dirname(library), fcntl.F_NOTIFY, 0x3F), (library, fcntl.F_SETLEASE, fcntl.F_RDLCK)):
    try:
        fcntl.fcntl(os.open(name, os.O_RDONLY), command, argument)
        print("ESCAPED")
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A((PermissionError|OSError|BlockingIOError)\n?)+\Z",
        ("success",),
    ),
    Attack(
        "lock a library",
        "flock, which would block the next call",
        LIBRARY
        + """
import fcntl, os
for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
    try:
        fcntl.flock(os.open(library, os.O_RDONLY), kind | fcntl.LOCK_NB)
        print("ESCAPED")
    except OSError as error:
        print(type(error).__name__)
""",
        r"\A(PermissionError\n?)+\Z",
        ("success",),
    ),
    Attack(
        "names of host files",
        "whether a file is there, how large and how old",
        """
import os
for step in (
    lambda: os.stat(<SECRET>), lambda: os.lstat(<FOLDER>), lambda: os.access(<SECRET>, os.F_OK) or 1 / 0, lambda: os.statvfs(<FOLDER>),
    lambda: os.listxattr(<SECRET>), lambda: os.open(<SECRET>, os.O_PATH), lambda: os.chdir(<FOLDER>),
):
    try:
        print("ESCAPED", step())
    except (OSError, ArithmeticError) as error:
        print(type(error).__name__)
""",
        r"\A((FileNotFoundError|ZeroDivisionError)\n?)+\Z",
        ("success",),
        guarantee="no host file names",
    ),
    Attack(
        "names of host files, by refusal",
        "that opening is denied tells that the file is there",
        """
for name in (<SECRET>, <SECRET> + ".missing"):
    try:
        open(name)
    except OSError as error:
        print("ESCAPED" if isinstance(error, PermissionError) else "nothing", type(error).__name__)
""",
        r"\A(nothing FileNotFoundError\n?)+\Z",
        ("success",),
        guarantee="no host file names",
    ),
]

BUFFERS = [
    Attack(
        "socket buffers",
        "memory in socket pairs that no process's account shows",
        """
import os, socket, time
for i in range(4):
    if os.fork() == 0:
        kept = []
        while len(kept) < 120:
            kept.append(socket.socketpair())
            for end in kept[-1]:
                end.setblocking(False)
                try:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
                except OSError:
                    pass
                try:
                    while True:
                        end.send(bytes(1 << 16))
                except BlockingIOError:
                    pass
        time.sleep(20)
time.sleep(3)
print("ESCAPED")
""",
        "MemoryError",
        ("memory_limit",),
        memory_mb=64,
    ),
    Attack(
        "passed descriptors",
        "socket pairs in flight inside each other",
        """
import array, socket
carrier = socket.socketpair()
for i in range(200):
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
        try:
            while True:
                end.send(bytes(1 << 14))
        except BlockingIOError:
            pass
    pair[1].recv(1 << 15)
    carrier, old = pair, carrier
    try:
        carrier[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [end.fileno() for end in old]))])
    except OSError as error:
        print(error)
    for end in old:
        end.close()
import time
time.sleep(1)
print("ESCAPED")
""",
        "MemoryError|PermissionError",
        ("memory_limit", "error"),
        memory_mb=32,
    ),
    Attack(
        "larger pipes",
        "a megabyte each",
        """
import fcntl, os
reader, writer = os.pipe()
fcntl.fcntl(writer, 1031, 1 << 20)
print("ESCAPED")
""",
        "PermissionError",
    ),
]

FACTS = [
    Attack(
        "the machine's name and load",
        "uname, sysinfo, load averages",
        SYSCALL
        + """
import socket
room = ctypes.create_string_buffer(400)
libc.uname(room)
try:
    name = socket.gethostname()
except OSError:
    name = ""
host = <HOSTNAME>
print("ESCAPED name" if host in (os.uname().nodename, name) or host.encode() in room.raw.split(b"\\0") else "nameless")
call(99, 179, ctypes.create_string_buffer(400))
try:
    print("ESCAPED load", os.getloadavg())
except OSError:
    print("loadless")
""",
        r"nameless\n(EPERM|ENOSYS)\nloadless",
        ("success",),
    ),
    Attack(
        "paths in frames",
        "where the sandbox lies on the host, in the frames that called the program",
        """
import sys
frame, found = sys._getframe(), []
while frame is not None:
    found += [frame.f_code.co_filename, *map(str, frame.f_locals.values())]
    found += [str(value) for name, value in frame.f_globals.items() if name != "__builtins__"]
    frame = frame.f_back
found += sys.argv + getattr(sys, "orig_argv", []) + [str(module) for module in sys.modules.values()]
place = <BACKWARDS>[::-1]  # the program's own text is in those frames, too
print("ESCAPED" if any(place in text or "hidden=" + "[" in text or "first" + "_uid" in text for text in found) else "none")
""",
        "none",
        ("success",),
    ),
]

ATTACKS = [
    *PROCESSES,
    *RESOURCES,
    *NETWORK,
    *FILES,
    *OTHERS,
    *PRIVILEGES,
    *SECRETS,
    *CRASHES,
    *MEDDLING,
    *METADATA,
    *BUFFERS,
    *FACTS,
]
