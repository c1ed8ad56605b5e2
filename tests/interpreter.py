"""Triton's kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
