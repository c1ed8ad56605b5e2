"""Triton's kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def interpreted(module: str) -> None:
    """Run `compare()` of a test module in a process where Triton interprets its kernels."""
    # Read when triton is imported
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", f"from {module} import compare; compare()"]
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interpret(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run the kernels of a module, in this process, for as long as the test
    runs.
    """
    import triton.experimental.gluon  # asks what Triton's own functions are when it is imported
    import triton.language
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # Of Triton's own functions some are kernels too
    for owner in (module, triton.language, standard):
        for name, kernel in list(vars(owner).items()):
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(owner, name, InterpretedFunction(kernel.fn))
