"""Runs a program and gives back what it printed: the demo's `code_interpreter`.

A process of its own with limits on time, memory, files and processes, and nothing of the caller's environment. That keeps
a clumsy program from doing harm; it is NOT a sandbox for hostile ones, and is used on the demo's own model only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

MAX_OUTPUT = 1000  # bytes of output that the model is shown

# The child limits itself before it reads the program, so that the parent needs no `preexec_fn` (unsafe beside threads). What
# it prints goes to a file: the limit on files is then one on output too, whatever the program prints.
LAUNCHER = """
import resource, sys
seconds, megabytes = map(int, sys.argv[1:])
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_FSIZE, 1 << 20),
    (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(limit, (value, value))
exec(compile(sys.stdin.read(), "<program>", "exec"), {"__name__": "__main__"})
"""


def run_code(code: str, timeout: float = 10.0, memory_mb: int = 512) -> str:
    """Run `code` with `python -I`; its output, cut at `MAX_OUTPUT` bytes, then the last line of an error if there was one.

    `timeout` is wall-clock seconds (and, rounded up, the limit of CPU seconds). A program that runs past it is killed with
    all its processes. Never raises for what the program does.
    """
    limits = [str(int(timeout) + 1), str(memory_mb)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", LAUNCHER, *limits], cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=output, stderr=errors,
        )  # fmt: skip
        try:
            child.communicate(code.encode("utf-8", "replace"), timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"Error: no result within {timeout:g} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever it started goes with it
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        said, complaint = (_start_and_end(file.fileno()) for file in (output, errors))
    if child.returncode == 0:
        return said[0]
    status = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
    return "\n".join(filter(None, [said[0], f"Error: {(complaint[1].splitlines() or [status])[-1]}"]))


def _start_and_end(file: int) -> tuple[str, str]:
    """The first and the last `MAX_OUTPUT` bytes of a file, stripped."""
    size = os.fstat(file).st_size
    pieces = os.pread(file, MAX_OUTPUT, 0), os.pread(file, MAX_OUTPUT, max(0, size - MAX_OUTPUT))
    return pieces[0].decode(errors="replace").strip(), pieces[1].decode(errors="replace").strip()
