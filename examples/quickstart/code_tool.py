"""Runs a program and gives back what it printed: the demo's `code_interpreter`.

A process of its own with limits on time, memory, files and processes, and nothing of the caller's environment. That keeps
a clumsy program from doing harm; it is NOT a sandbox for hostile ones, and is used on the demo's own model only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

MAX_OUTPUT = 1000  # characters

# The child limits itself before it reads the program, so that the parent needs no `preexec_fn` (unsafe beside threads).
LAUNCHER = """
import resource, sys
seconds, megabytes = map(int, sys.argv[1:])
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(limit, (value, value))
exec(compile(sys.stdin.read(), "<program>", "exec"), {"__name__": "__main__"})
"""


def run_code(code: str, timeout: float = 10.0, memory_mb: int = 512) -> str:
    """Run `code` with `python -I`; its output, cut at `MAX_OUTPUT` characters, then the last line of an error if there was one.

    `timeout` is wall-clock seconds (and, rounded up, the limit of CPU seconds). A program that runs past it is killed with
    all its processes. Never raises for what the program does.
    """
    limits = [str(int(timeout) + 1), str(memory_mb)]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", LAUNCHER, *limits], cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        try:
            output, errors = child.communicate(code, timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return f"Error: no result within {timeout:g} seconds"
    output = output[:MAX_OUTPUT].strip()
    if child.returncode == 0:
        return output
    lines = errors.strip().splitlines()
    return "\n".join(filter(None, [output, f"Error: {lines[-1] if lines else f'killed by signal {-child.returncode}'}"]))
