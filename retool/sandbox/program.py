"""Runs one program like a notebook cell: the value of its last expression is printed.

Executes inside the cell.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import gc
import io
import linecache
import os
import random
import resource
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TextIO

from . import kept, reductions, settings, variables, work_folder

FILE = "main.py"
STDIN = ".stdin"  # where it lies in the work folder until the program has it
# The return code that stands for an uncaught MemoryError; the parent reports it as memory_limit
OUT_OF_MEMORY = 250
# The modules whose functions programs can reach
OF_PROGRAMS = [
    __name__,
    *(m.__name__ for m in (kept, reductions, settings, variables, work_folder)),
]
_FUTURE_FLAGS = 0x1FF0000 | 0x1000000  # of a code object: which __future__ imports it has
_SPARE_BYTES = 64 << 20  # of address space, freed to print the traceback of a MemoryError


def run(job: dict[str, Any], base_address_space: int) -> NoReturn:
    """Set the limits, lay out the folder, execute `job["code"]` and end the process with its return
    code.
    """
    _lay_out(job)
    _limit(job, base_address_space)
    sys.argv = [FILE]
    folder = os.getcwd()
    sys.path.insert(0, folder)
    tempfile.tempdir = folder  # it would look for a folder in which it may remove files
    # One by one: `update` costs a call 67 page faults more, of 945
    for name in ("HOME", "TMPDIR", "PWD"):
        os.environ[name] = folder
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _writer(1), _writer(2)
    sys.__stdin__ = sys.stdin
    sys.__stdout__ = sys.stdout
    sys.__stderr__ = sys.stderr
    random.seed(0)
    gc.enable()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if not job.get("session"):
        os._exit(_finish(_execute(job["code"], module.__dict__, {})))
    session = kept.restore(folder, module.__dict__)
    code = _finish(_execute(job["code"], module.__dict__, session.lost))
    if code != OUT_OF_MEMORY:
        with contextlib.suppress(BaseException):  # the program's own, whatever it is
            kept.keep(session)
    os._exit(code)


def warm_up() -> None:
    """Walk the paths that every call takes, so that a fork finds them loaded."""
    _run_as_cell("from __future__ import annotations\ntotal = sum(i for i in range(3))\nNone", {})
    try:
        _run_as_cell("1 / 0", {})
    except ZeroDivisionError as error:
        traceback.format_exception(type(error), error, error.__traceback__)


def forget_origin() -> None:
    """Leave nothing in this package's modules and functions that says where it lies on the host:
    programs can look at them.
    """
    here = __name__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name == here or name.startswith(here + "."):
            for fact in ("__file__", "__cached__", "__spec__", "__loader__", "__path__"):
                vars(module).pop(fact, None)
        for function in _functions_of(module) if name in OF_PROGRAMS else ():
            function.__code__ = _elsewhere(function.__code__)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Those that a module and its classes define."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for part in vars(value).values() if isinstance(value, type) else [value]:
            if isinstance(part, types.FunctionType):
                yield part


def _elsewhere(code: types.CodeType) -> types.CodeType:
    """The code as if it came from no file."""
    constants = tuple(
        _elsewhere(part) if isinstance(part, types.CodeType) else part for part in code.co_consts
    )
    return code.replace(co_filename="<sandbox>", co_consts=constants)


def _lay_out(job: dict[str, Any]) -> None:
    for name, content in job.get("files", {}).items():
        if "/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "xb") as file:
            file.write(base64.b64decode(content))
    if job.get("stdin"):
        with open(STDIN, "xb") as file:
            file.write(job["stdin"].encode("utf-8", "surrogateescape"))
        source = os.open(STDIN, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where the folder is on the host, files stay
            os.unlink(STDIN)
        os.dup2(source, 0)
        os.close(source)


def _limit(job: dict[str, Any], base: int) -> None:
    cpu = max(1, int(job["cpu_seconds"] + 0.999))
    # A little less than the whole call's limit, so that a lone process meets an ordinary
    # MemoryError before it is killed.
    space = base + job["memory_bytes"] - min(_SPARE_BYTES, job["memory_bytes"] // 8)
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu),
        resource.RLIMIT_AS: (space, space + _SPARE_BYTES),
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (job["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_SIGPENDING: (64, 64),
        resource.RLIMIT_NICE: (0, 0),
        resource.RLIMIT_RTPRIO: (0, 0),
    }
    if job["processes"]:
        limits[resource.RLIMIT_NPROC] = (job["processes"],) * 2
    for kind, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft = min(soft, ceiling)
            hard = min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _writer(fd: int) -> TextIO:
    """Unbuffered, as `python -u` is: what was printed before a kill has left the process."""
    raw = io.FileIO(fd, "w", closefd=False)
    return io.TextIOWrapper(
        raw, encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True
    )


def _execute(code: str, namespace: dict[str, Any], lost: Mapping[str, str]) -> int:
    """The return code, after printing what Python would have printed about an exception; of a
    variable that is among those `lost`, why it isn't there.
    """
    linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
    try:
        _run_as_cell(code, namespace)
    except SystemExit as request:
        return _exit_code(request.code)
    except MemoryError as error:
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _print_traceback(error)
        return OUT_OF_MEMORY
    except BaseException as error:  # the program's own, whatever it is
        _print_traceback(error)
        if why := kept.why_missing(error, lost):
            print(why, file=sys.stderr)
        return 1
    return 0


def _run_as_cell(code: str, namespace: dict[str, Any]) -> None:
    tree = ast.parse(code, FILE)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, FILE, "exec", dont_inherit=True)
    exec(body, namespace)
    if last is not None:
        flags = body.co_flags & _FUTURE_FLAGS  # its __future__ imports hold for the last line too
        shown = compile(ast.Interactive([last]), FILE, "single", flags=flags, dont_inherit=True)
        exec(shown, namespace)


def _exit_code(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    with contextlib.suppress(Exception):
        print(value, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """Without the sandbox's own frames; a program may have broken stderr or the exception itself,
    which is its own loss.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != FILE:
        trace = trace.tb_next
    with contextlib.suppress(BaseException):
        lines = traceback.format_exception(type(error), error, trace)
        print("".join(lines), end="", file=sys.stderr)


def _finish(code: int) -> int:
    """What Python does at its end, short of tearing the interpreter down."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:  # the program's own, whatever it is
        _print_traceback(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return code
