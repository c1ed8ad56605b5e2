"""The published suite: what each program tries, and how its result must read.

A program prints ESCAPED where it got what it wanted; `<NAME>` is filled in with the host's address of a thing. `cause` is a pattern
that the text shown to the model must match. Everything is bounded: at most 200 processes, 2 GB, 20 seconds.
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
    Attack("fork bomb", "200 processes that stay", """
import os, time
for i in range(200):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
print("ESCAPED")
""", "BlockingIOError|ProcessLimitError", ("error", "process_limit")),
    Attack("fork bomb, doubling", "every process forks, to a depth of 7", """
import os, time
refused = 0
for i in range(7):
    try:
        os.fork()
    except BlockingIOError:
        refused += 1
print("refused", refused)
time.sleep(1)
""", "refused|ProcessLimitError", ("success", "process_limit")),
    Attack("thread bomb", "200 threads", """
import threading, time
for i in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ESCAPED")
""", "can't start new thread|ProcessLimitError", ("error", "process_limit")),
    Attack("daemonise", "a grandchild in a session of its own that outlives the call", """
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
""", "left behind", ("success",)),
    Attack("hold the pipes", "a child keeps stdout open after the end", """
import os, time
if os.fork() == 0:
    time.sleep(300)
print("gone")
""", "gone", ("success",)),
    Attack("ignore signals", "SIGTERM and the like are ignored, then it spins", """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    pass
""", "TimeoutError", ("timeout",), 1.0),
    Attack("busy loop", "spins", "while True:\n    pass", "TimeoutError: .*longer than 1 s", ("timeout",), 1.0),
    Attack("sleep", "waits", "print('before', flush=True)\nimport time\ntime.sleep(600)", "before\nTimeoutError", ("timeout",), 1.0),
    Attack("stop itself", "SIGSTOP", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(600)",
           "TimeoutError", ("timeout",), 1.0),
    Attack("wait for stdin", "reads what nobody writes", "print(repr(input()))", "EOFError"),
    Attack("leave without ado", "os._exit", "import os\nos._exit(7)", "return code 7"),
    Attack("close stdout", "both streams closed", "import os\nos.close(1)\nos.close(2)\nprint('unseen')", r"no output|return code", ("success", "error")),
    Attack("close everything", "every descriptor closed", "import os\nos.closerange(0, 4096)", r"no output", ("success",)),
]  # fmt: skip

RESOURCES = [
    Attack("memory hog", "2 GB, bit by bit", """
hoard = []
for i in range(2000):
    hoard.append(bytearray(b"x") * (1 << 20))
print("ESCAPED")
""", "MemoryError", ("memory_limit",)),
    Attack("one big allocation", "8 GB at once, never touched", "bytearray(8 << 30)\nprint('ESCAPED')", "MemoryError", ("memory_limit",)),
    Attack("memory in many processes", "8 processes of 150 MB", """
import os, time
for i in range(8):
    if os.fork() == 0:
        hoard = bytearray(b"x") * (150 << 20)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.1)
time.sleep(10)
print("ESCAPED")
""", "MemoryError", ("memory_limit",)),
    Attack("shared memory nobody maps", "anonymous shared pages, dropped from every account", """
import mmap
mmap.mmap(-1, 1 << 20)
print("ESCAPED")
""", DENIED),
    Attack("memory files", "memfd_create", "import os\nos.memfd_create('x')\nprint('ESCAPED')", DENIED),
    Attack("System V memory", "a segment that outlives its maker", SYSCALL + "call(29, 194, L(1234), L(1 << 20), L(0o1777))", REFUSED, ("success",)),
    Attack("disk fill", "200 files of 8 MB", """
for i in range(200):
    with open(f"fill{i}", "wb") as file:
        file.write(b"x" * (8 << 20))
print("ESCAPED")
""", "No space left|outgrew", ("error", "output_limit")),
    Attack("disk fill out of sight", "open files without a name", """
import os
kept = []
for i in range(100):
    kept.append(os.open(f"fill{i}", os.O_CREAT | os.O_WRONLY))
    os.write(kept[-1], b"x" * (8 << 20))
    os.unlink(f"fill{i}")
print("ESCAPED")
""", "No space left|PermissionError"),
    Attack("huge file", "1 GB in one file", """
with open("huge", "wb") as file:
    for i in range(128):
        file.write(b"x" * (8 << 20))
print("ESCAPED")
""", "File too large|No space left|outgrew", ("error", "output_limit")),
    Attack("many files", "40,000 empty ones", """
import time
for i in range(40000):
    open(f"f{i}", "w").close()
time.sleep(1)
print("ESCAPED")
""", "No space left|outgrew", ("error", "output_limit")),
    Attack("deep folders", "2,000 folders in each other, for the broom to choke on", """
import os
for i in range(2000):
    os.mkdir("d")
    os.chdir("d")
print("dug")
""", "dug|outgrew", ("success", "output_limit")),
    Attack("locked folders", "folders and files nobody may enter", """
import os
os.makedirs("a/b")
open("a/b/c", "w").close()
os.chmod("a/b/c", 0)
os.chmod("a/b", 0)
os.chmod("a", 0)
""", "no output", ("success",)),
    Attack("open files", "1,000 of them", "kept = [open('f', 'w') for i in range(1000)]\nprint('ESCAPED')", "Too many open files"),
    Attack("raise the limits", "its own rlimits, upwards", """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (4096, 4096))
print("ESCAPED")
""", "not allowed to raise maximum limit"),
    Attack("endless output", "prints for ever", "while True:\n    print('x' * 1000)", "more bytes of output.*\nOutputLimitError", ("output_limit",)),
    Attack("much output", "1 MB, then an ordinary end", "print('x' * (1 << 20))", r"\[983041 more bytes of output\]", ("success",)),
    Attack("binary output", "every byte there is", "import os\nos.write(1, bytes(range(256)) * 4)", "\ufffd", ("success",)),
]  # fmt: skip

NETWORK = [
    Attack("TCP", "a listener on loopback", "import socket\nsocket.create_connection(('127.0.0.1', <TCP>), 2)\nprint('ESCAPED')", DENIED),
    Attack("UDP", "a datagram to loopback", """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", <UDP>))
print("ESCAPED")
""", DENIED),
    Attack("DNS", "a name", "import socket\nsocket.getaddrinfo('localhost.example', 80)\nprint('ESCAPED')", "gaierror|PermissionError"),
    Attack("unix socket", "a listener in the file system", """
import socket
socket.socket(socket.AF_UNIX).connect(<UNIX>)
print("ESCAPED")
""", DENIED),
    Attack("abstract socket", "a listener without a file", """
import socket
socket.socket(socket.AF_UNIX).connect(<ABSTRACT>)
print("ESCAPED")
""", DENIED),
    Attack("redirected pair", "half of a datagram pair, pointed at a listener", """
import socket
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.connect(<UNIX>)
print("ESCAPED")
""", DENIED),
    Attack("stolen pair", "half of a stream pair, pointed at a listener", """
import socket
one, other = socket.socketpair()
one.connect(<UNIX>)
print("ESCAPED")
""", DENIED),
    Attack("listen", "a server", "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')", DENIED),
    Attack("odd families", "packet, netlink, vsock, alg, raw", SYSCALL + """
for family, kind in ((17, 3), (16, 3), (40, 1), (38, 5), (2, 3), (10, 1)):
    call(41, 198, L(family), L(kind), L(0))
""", REFUSED, ("success",)),
    Attack("io_uring", "sockets without socket(2)", SYSCALL + "call(425, 425, L(8), ctypes.create_string_buffer(120))", REFUSED, ("success",)),
]  # fmt: skip

FILES = [
    Attack("read a host file", "the test's secret", "print('ESCAPED', open(<SECRET>).read())", DENIED),
    Attack("read the accounts", "/etc/passwd and /etc/shadow", """
for name in ("/etc/passwd", "/etc/shadow", "/etc/hostname"):
    try:
        print("ESCAPED", open(name).read())
    except OSError as error:
        print(type(error).__name__)
""", r"\A(PermissionError|FileNotFoundError)", ("success",)),
    Attack("list host folders", "/, /root, /home, /tmp", """
import os
for name in ("/root", "/home", "/var", "/sys", "/proc", "/run", <FOLDER>):
    try:
        print("ESCAPED", os.listdir(name))
    except OSError as error:
        print(type(error).__name__)
""", r"\A((PermissionError|FileNotFoundError)\n?)+\Z", ("success",)),
    Attack("/proc of others", "the test's environment, memory and files", """
for pid in (<TEST>, <VICTIM>, <SUPERVISOR>, <SERVER>, 1):
    for name in ("environ", "maps", "cmdline", "root/etc/passwd", "cwd/.", "mem"):
        try:
            print("ESCAPED", open(f"/proc/{pid}/{name}", "rb").read(10))
        except OSError as error:
            print(type(error).__name__)
""", "PermissionError|FileNotFoundError", ("success",)),
    Attack("write to a host file", "the test's secret", "open(<SECRET>, 'w').write('ESCAPED')\nprint('ESCAPED')", DENIED),
    Attack("truncate a host file", "without opening it", "import os\nos.truncate(<SECRET>, 0)\nprint('ESCAPED')", DENIED),
    Attack("create beside it", "a file in the test's folder", "import os\nopen(os.path.join(<FOLDER>, 'new'), 'w')\nprint('ESCAPED')", DENIED),
    Attack("remove a host file", "the test's secret", "import os\nos.unlink(<SECRET>)\nprint('ESCAPED')", DENIED),
    Attack("rename out", "a file of its own into the test's folder", """
import os
open("mine", "w").close()
os.rename("mine", os.path.join(<FOLDER>, "mine"))
print("ESCAPED")
""", DENIED),
    Attack("hard link", "the secret under a name of its own", "import os\nos.link(<SECRET>, 'mine')\nprint('ESCAPED', open('mine').read())", DENIED),
    Attack("symbolic link", "the secret through a link", "import os\nos.symlink(<SECRET>, 'mine')\nprint('ESCAPED', open('mine').read())", DENIED),
    Attack("dot dot", "up and out", """
import os
here = os.open(".", os.O_RDONLY)
for i in range(40):
    here = os.open("..", os.O_RDONLY, dir_fd=here)
    print("ESCAPED" if "root" in os.listdir(here) and "bin" in os.listdir(here) else "nothing")
""", DENIED),
    Attack("poison Python", "a module for the next call to import", """
import os
for folder in (<LIBRARY>, *__import__("sys").path):
    try:
        open(os.path.join(folder, "poison.py"), "w")
        print("ESCAPED" if folder != os.getcwd() else "own folder")
    except OSError as error:
        print(type(error).__name__)
""", r"\A((PermissionError|OSError|FileNotFoundError|own folder|NotADirectoryError)\n?)+\Z", ("success",)),
    Attack("neighbours", "the folders of other calls", "import os\nprint('ESCAPED', os.listdir(<SCRATCH>))", DENIED),
    Attack("devices", "disks, memory, terminals, GPUs", """
import glob, os
for name in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/tty", "/dev/ptmx", "/dev/fuse", "/dev/kvm", "/dev/nvidia0", "/dev/nvidiactl",
             "/dev/nvidia-uvm", "/dev/dri/renderD128", "/dev/shm/x"):
    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            os.open(name, mode)
            print("ESCAPED", name)
        except OSError as error:
            print(type(error).__name__)
""", r"\A((PermissionError|FileNotFoundError|OSError)\n?)+\Z", ("success",)),
    Attack("make a device", "mknod", "import os, stat\nos.mknod('disk', 0o666 | stat.S_IFBLK, os.makedev(254, 0))\nprint('ESCAPED')", DENIED),
    Attack("file handles", "open_by_handle_at, past every path", SYSCALL + """
call(303, 264, L(-100), b"/", ctypes.create_string_buffer(b"\\x80" + bytes(140)), ctypes.create_string_buffer(8), L(0))
call(304, 265, L(-100), ctypes.create_string_buffer(140), L(0))
""", REFUSED, ("success",)),
]  # fmt: skip

OTHERS = [
    Attack("kill", "parent, fork server, supervisor, test, victim", """
import os
for pid in (<SERVER>, <SUPERVISOR>, <TEST>, <VICTIM>, os.getppid()):
    if pid > 1:
        try:
            os.kill(pid, 9)
            print("ESCAPED")
        except OSError as error:
            print(type(error).__name__)
print("done")
""", r"\A((PermissionError|ProcessLookupError)\n)*done", ("success",)),
    Attack("kill everybody", "kill -1, and every small pid", """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (-1, *range(2, 400)):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError:
            pass
print("still here")
""", "still here", ("success",)),
    Attack("stop the server", "SIGSTOP to the parent", """
import os, signal
try:
    os.kill(os.getppid() or 1, signal.SIGSTOP)
except OSError as error:
    print(type(error).__name__)
""", "no output|PermissionError|ProcessLookupError", ("success",)),
    Attack("ptrace", "attach to the victim, the server, anybody", SYSCALL + """
for pid in (<VICTIM>, <SERVER>, os.getppid(), 1):
    call(101, 117, L(16), L(pid), L(0), L(0))
""", REFUSED, ("success",)),
    Attack("foreign memory", "process_vm_readv", SYSCALL + """
for pid in (<VICTIM>, <SERVER>):
    call(310, 270, L(pid), ctypes.create_string_buffer(16), L(1), ctypes.create_string_buffer(16), L(1), L(0))
""", REFUSED, ("success",)),
    Attack("steal a descriptor", "pidfd_getfd", SYSCALL + """
descriptor = libc.syscall(L(434), L(<SUPERVISOR>), L(0))
call(438, 438, L(max(descriptor, 0)), L(0), L(0))
""", r"\A(EPERM|ENOSYS)", ("success",)),
    Attack("nice to itself only", "real-time priority", "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\nprint('ESCAPED')", DENIED),
]  # fmt: skip

PRIVILEGES = [
    Attack("become root", "setuid, setgid, setgroups", """
import os
for name, argument in (("setuid", 0), ("setgid", 0), ("seteuid", 0), ("setgroups", [0])):
    try:
        getattr(os, name)(argument)
        print("ESCAPED")
    except OSError as error:
        print(type(error).__name__)
""", r"\A((PermissionError|OSError)\n?)+\Z", ("success",)),
    Attack("mount", "a fresh /proc, and the disk", SYSCALL + """
call(165, 40, b"proc", b".", b"proc", L(0), L(0))
call(165, 40, b"/", b".", b"", L(4096), L(0))
call(428, 428, L(-100), b"/", L(1))
call(430, 430, b"tmpfs", L(0))
""", REFUSED, ("success",)),
    Attack("unmount", "the work folder, the root", SYSCALL + "call(166, 39, b'/box', L(2))\ncall(166, 39, b'/', L(2))", REFUSED, ("success",)),
    Attack("new namespaces", "unshare each kind", SYSCALL + """
for kind in (0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x2000000):
    call(272, 97, L(kind))
""", REFUSED, ("success",)),
    Attack("clone into namespaces", "clone and clone3 with a new user namespace", SYSCALL + """
call(56, 220, L(0x10000000 | 17), L(0), L(0), L(0), L(0))
call(435, 435, ctypes.create_string_buffer((0x10000000).to_bytes(8, "little") + bytes(80)), L(88))
""", REFUSED, ("success",)),
    Attack("other root", "chroot and pivot_root", SYSCALL + "call(161, 51, b'.')\ncall(155, 41, b'.', b'.')", REFUSED, ("success",)),
    Attack("kernel surface", "bpf, perf, userfaultfd, keyctl, add_key, personality, fanotify", SYSCALL + """
call(321, 280, L(0), ctypes.create_string_buffer(128), L(128))
call(298, 241, ctypes.create_string_buffer(128), L(0), L(-1), L(-1), L(0))
call(323, 282, L(0))
call(250, 219, L(0), L(-3), L(0))
call(248, 217, b"user", b"name", b"x", L(1), L(-2))
call(135, 92, L(0x0040000))
call(300, 262, L(0), L(0))
""", REFUSED, ("success",)),
    Attack("unknown calls", "numbers nobody has reviewed", SYSCALL + """
for number in (463, 468, 500, 1000, 0x40000000 + 41):
    call(number, number, L(0), L(0), L(0))
""", r"\A(ENOSYS\n?)+\Z", ("success",)),
    Attack("machine", "reboot, host name, clock, modules, swap", SYSCALL + """
call(170, 161, b"owned", L(5))
call(227, 112, L(0), ctypes.create_string_buffer(16))
call(175, 105, b"", L(0), b"")
call(167, 224, b"x", L(0))
call(169, 142, L(0), L(0), L(0), L(0))
""", REFUSED, ("success",)),
    Attack("undo the filter", "seccomp and Landlock again, with less", SYSCALL + """
call(317, 277, L(1), L(0), L(0))
call(444, 444, L(0), L(0), L(1))
""", REFUSED, ("success",)),
    Attack("capabilities", "what it holds, by the kernel's word", """
import ctypes
libc = ctypes.CDLL(None)
data = ctypes.create_string_buffer(24)
libc.capget(b"\\x22\\x05\\x08\\x20" + bytes(4), data)
bounding = [number for number in range(41) if libc.prctl(23, number, 0, 0, 0) == 1]
print("ESCAPED" if any(data.raw) or bounding else "none", libc.prctl(39, 0, 0, 0, 0))
""", "none 1", ("success",)),
]  # fmt: skip

SECRETS = [
    Attack("environment", "tokens in os.environ", """
import os
print("ESCAPED" if any("canary" in value for value in os.environ.values()) else sorted(os.environ))
""", "HOME", ("success",)),
    Attack("environment of C", "the block the process was started with", """
import ctypes
block = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
names = []
while block[len(names)] is not None:
    names.append(block[len(names)])
print("ESCAPED" if any(b"canary" in name or b"WANDB" in name for name in names) else "clean")
""", "clean", ("success",)),
    Attack("descriptors", "whatever was left open", """
import os
found = []
for number in range(3, 4096):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print("ESCAPED" if found else "none", found)
""", r"none \[\]", ("success",)),
    Attack("terminal", "a controlling terminal to type into", "import os\nos.open('/dev/tty', os.O_RDWR)\nprint('ESCAPED')", "OSError|Error"),
    Attack("walk the heap", "programs of other calls, left in the parent's memory", """
import gc
marker = "retool-" + "canary"
print("ESCAPED" if any(marker in item for item in gc.get_objects() if isinstance(item, (str, list, dict)) and item is not marker) else "clean")
""", "clean", ("success",)),
    Attack("stack frames", "what the runner's frames hold", """
import sys
frame, names = sys._getframe(), []
while frame is not None:
    names += [str(value)[:2000] for value in frame.f_locals.values()]
    frame = frame.f_back
marker = "retool-" + "canary-token"
print("ESCAPED" if any(marker in name for name in names) else "clean")
""", "clean", ("success",)),
]  # fmt: skip

CRASHES = [
    Attack("segfault", "reads address 0", "import ctypes\nctypes.string_at(0)", "SIGSEGV"),
    Attack("abort", "abort()", "import ctypes\nctypes.CDLL(None).abort()", "SIGABRT|SIGSEGV|SIGILL"),
    Attack("deep recursion", "the C stack", """
import sys
sys.setrecursionlimit(10**9)
def f(n):
    return list(map(f, [n + 1]))
f(0)
""", "SIGSEGV|RecursionError|MemoryError", ("error", "memory_limit")),
    Attack("illegal instruction", "kills itself by SIGILL", "import ctypes, os, signal\nsignal.raise_signal(signal.SIGILL)\nos._exit(4)",
           "SIGILL|return code 4"),
    Attack("not UTF-8", "lone surrogates in the source", "x = '\udcff'\nprint(len(x))", "SyntaxError|UnicodeEncodeError|1", ("error", "success")),
    Attack("null bytes", "in the source", "print(1)\0", "ValueError|SyntaxError"),
    Attack("syntax error", "no program at all", "def f(:", "SyntaxError"),
    Attack("10 MB of program", "one long text", "x = '" + "y" * (10 << 20) + "'\nprint(len(x))", "10485760", ("success",)),
    Attack("nested expression", "100,000 parentheses", "(" * 100000 + ")" * 100000, "SyntaxError|MemoryError|RecursionError|SIGSEGV", ("error", "memory_limit")),
    Attack("exception that won't print", "__str__ raises", """
class Bad(Exception):
    def __str__(self):
        raise SystemExit
raise Bad
""", "Bad|return code 1"),
    Attack("forged result", "bytes on every descriptor", """
import os
for number in range(3, 64):
    try:
        os.write(number, b'{"exited": 1, "code": 0}')
        print("ESCAPED")
    except OSError:
        pass
os._exit(3)
""", "return code 3"),
]  # fmt: skip

ATTACKS = [*PROCESSES, *RESOURCES, *NETWORK, *FILES, *OTHERS, *PRIVILEGES, *SECRETS, *CRASHES]
