"""What a call may use and what it comes back with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["success", "error", "timeout", "memory_limit", "output_limit", "process_limit", "sandbox_error"]


@dataclass(frozen=True)
class Limits:
    """Limits of one call. Memory and processes count the whole call: every descendant, and files in the work folder.

    `wall_seconds` runs from the moment the program starts (waiting in the queue is free); `cpu_seconds` is per process.
    `output_kb` is what is kept of stdout (its beginning) and stderr (its end): the rest is read, counted and dropped, until `flood_mb` of
    it, when the program is killed. `file_mb` bounds a single file and the whole work folder alike. Beyond `processes`
    processes and threads, starting another fails.
    """

    wall_seconds: float = 30.0
    cpu_seconds: float = 30.0
    memory_mb: int = 1024
    output_kb: int = 64
    flood_mb: int = 64
    file_mb: int = 64
    processes: int = 32
    open_files: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"sandbox limit {name}={value} must be above 0.")


@dataclass(frozen=True)
class Result:
    """How a call ended. The parent decides `status` from the kernel's wait status, its own clock and its own counters.

    success         the program ended with return code 0
    error           it ended with another code or crashed (`return_code` is then minus the signal)
    timeout         wall or CPU time ran out
    memory_limit    the call's memory ran out
    output_limit    it flooded its output
    process_limit   it started too many processes where the kernel couldn't refuse them
    sandbox_error   the program isn't to blame: it didn't run, or the sandbox failed under it

    `stdout`/`stderr` hold what was kept, `stdout_bytes`/`stderr_bytes` count all that was written. `reason` is a sentence
    for every status but the first two. `execution_time` is wall seconds from start to end. `return_code` is None where
    the program didn't end by itself. `files` are those asked for by name that exist.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    return_code: int | None = None
    execution_time: float = 0.0
    reason: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "success"


def safe_name(name: str) -> str:
    """`name` as a relative path inside the work folder; `ValueError` for anything that could lead out of it."""
    parts = name.split("/")
    if not name or len(name) > 1024 or "\0" in name or any(part in ("", ".", "..") for part in parts) or name.startswith("/"):
        raise ValueError(f"file name {name!r} must be a relative path inside the work folder, without '.' or '..' parts.")
    return name
