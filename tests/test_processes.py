"""Processes in a program without a main guard: none runs its file again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
print("main", flush=True)
import math
from concurrent.futures import ProcessPoolExecutor
from retool.processes import ForkServer, Spawn

for context in (Spawn(), ForkServer()):
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        print(pool.submit(math.sqrt, 9).result(), flush=True)
"""


def test_the_main_file_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "main\n3.0\n3.0\n"
