"""`python -m tests.hosts.inside PID WORDS`: `python WORDS` on the machine whose process that is."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import warm
from tests.hosts.network import Host

if __name__ == "__main__":
    pid, *words = sys.argv[1:]
    Host("", "", int(pid), 0, Path()).enter()
    warm._interpret(words)
