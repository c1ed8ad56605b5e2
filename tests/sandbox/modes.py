"""The five ways a machine lets programs be isolated, each made here by a launcher, so that one
machine shows what holds on all of them.

Root or an ordinary user; namespaces allowed or refused (default containers, AppArmor on Ubuntu
24.04); Landlock with or without scopes (Linux 6.12). Where the tests run as an ordinary user, there
are no modes of root's.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retool.sandbox import Limits, Sandbox

REFUSE = str(Path(__file__).with_name("refuse.py"))
LIMITS = Limits(wall_seconds=20, cpu_seconds=20, memory_mb=512, flood_mb=8, file_mb=32)
USER = 54321  # the ordinary user's uid and gid, where the tests run as root


@dataclass(frozen=True)
class Mode:
    """`tells` is the mode in words; `user`: as an ordinary user; `refused`: without namespaces;
    `unscoped`: Landlock as before 6.12.
    """

    name: str
    tells: str
    user: bool = False
    refused: bool = False
    unscoped: bool = False

    @property
    def uid(self) -> int:
        """Who starts the sandbox."""
        return USER if self.user and os.geteuid() == 0 else os.geteuid()

    @property
    def python(self) -> str:
        return unprivileged_python() if self.uid == USER else sys.executable

    @property
    def launcher(self) -> list[str]:
        """The command that the sandbox is started through."""
        become = (
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
            if self.uid == USER
            else []
        )
        refuse = [self.python, REFUSE, "--no-scopes"] if self.unscoped else [self.python, REFUSE]
        return [*become, *(refuse if self.refused else [])]

    def start(
        self,
        limits: Limits = LIMITS,
        workers: int = 2,
        isolation: Literal["strict", "best_effort"] = "best_effort",
    ) -> Sandbox:
        """A sandbox in this mode.

        Where root may make memory accounts here, a container couldn't: they count as out of reach.
        There are two fork servers, as on a machine of many processors: programs of either are held.
        """
        without = frozenset({"cgroup"}) if self.refused else frozenset()
        return Sandbox(
            limits,
            workers,
            isolation,
            servers=2,
            without=without,
            python=self.python,
            launcher=self.launcher,
        )


MODES = [
    Mode("R", "root"),
    Mode("Rr", "root, namespaces refused", refused=True),
    Mode("U", "user", user=True),
    Mode("Ur", "user, namespaces refused", user=True, refused=True),
    Mode(
        "Ur−",
        "user, namespaces refused, Landlock without scopes",
        user=True,
        refused=True,
        unscoped=True,
    ),
]


def modes_here() -> list[Mode]:
    """Those that can be made: root can be an ordinary user, not the other way round."""
    if os.geteuid() != 0:
        return [mode for mode in MODES if mode.user]
    return MODES if unprivileged_python() else [mode for mode in MODES if not mode.user]


@functools.cache
def unprivileged_python() -> str:
    """An interpreter that an ordinary user can start: this one, or the system's of the same
    version; "" for none.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # setpriv's own start still has privileges: what it starts has to start another.
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', '1'], check=True)"
    for python in (os.path.realpath(sys.executable), f"/usr/bin/{version}"):
        command = [
            "setpriv",
            f"--reuid={USER}",
            f"--regid={USER}",
            "--clear-groups",
            python,
            "-c",
            again,
        ]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return python
    return ""


@functools.cache
def library(python: str) -> str:
    """The folder of `python`'s standard library, which every program may read."""
    told = subprocess.run(
        [python, "-c", "import os; print(os.__file__)"], capture_output=True, text=True, check=True
    )
    return os.path.dirname(told.stdout.strip())
