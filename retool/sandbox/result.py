"""What a call may use and what it comes back with."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .kept import RESTORING, SNAPSHOT, WHOLE
from .program import STDIN

Status = Literal[
    "success", "error", "timeout", "memory_limit", "output_limit", "process_limit", "sandbox_error"
]

IN_SECONDS = ("wall_seconds", "cpu_seconds")
LARGEST = 1_000_000_000  # of any limit: the kernel takes no endless ones
LONGEST_NAME = 255  # bytes, of a file or folder: the kernel's


@dataclass(frozen=True)
class Limits:
    """Limits of one call.

    Memory and processes count the whole call: every descendant, and files in the work folder.

    `wall_seconds` runs from the moment the program starts (waiting in the queue is free);
    `cpu_seconds` is per process. `output_kb` is what is kept of stdout (its beginning) and stderr
    (its end): the rest is read, counted and dropped, until `flood_mb` of it, when the program is
    killed. `file_mb` bounds a single file and the whole work folder alike. Beyond `processes`
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
            kind = (int, float) if name in IN_SECONDS else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= LARGEST:
                what = "a number of seconds" if name in IN_SECONDS else "a whole number"
                raise ValueError(
                    f"sandbox limit {name}={value!r} must be {what} above 0, and {LARGEST:,} at most."
                )


@dataclass(frozen=True)
class Result:
    """How a call ended. The parent decides `status` from the kernel's wait status, its own clock
    and its own counters.

    success         the program ended with return code 0
    error           it ended with another code or crashed (`return_code` is then minus the signal)
    timeout         wall or CPU time ran out
    memory_limit    the call's memory ran out
    output_limit    it flooded its output
    process_limit   it started too many processes where the kernel couldn't refuse them
    sandbox_error   infrastructure: the program isn't to blame. It didn't run, or the sandbox failed
                    under it, and so it did again when it was tried anew. Never the program's own
                    doing, so never to be scored or trained as if it were

    `stdout`/`stderr` hold what was kept, `stdout_bytes`/`stderr_bytes` count all that was written.
    `reason` is a sentence for every status but the first two. `execution_time` is the time from the
    program's start to its end, on which alone its limits bear. `queue_seconds` is the rest from the
    call to its result: waiting for a worker, and for a supervisor that doesn't keep up.
    `return_code` is None where the program didn't end by itself. `files` are those asked for by name
    that exist.
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
    queue_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As the supervisor sends it."""
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return {**vars(self), "files": files}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Result:
        """What `to_json` made of a result; ValueError where another version's did."""
        known = {field.name for field in fields(Result)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"its results have {', '.join(unknown)}, which isn't known here")
        if missing := sorted(known - set(values)):
            raise ValueError(f"its results have no {', '.join(missing)}")
        files = {name: base64.b64decode(content) for name, content in values["files"].items()}
        return Result(**{**values, "files": files})

    @property
    def ok(self) -> bool:
        return self.status == "success"

    @property
    def session(self) -> bytes:
        """What the next program of its session is given; b"" where it left nothing whole, or died."""
        left = self.files.get(SNAPSHOT, b"")
        return left if left.endswith(WHOLE) else b""

    @property
    def died_restoring(self) -> bool:
        """Whether it died of what the program before it had left."""
        return self.files.get(SNAPSHOT) == RESTORING

    @property
    def infrastructure(self) -> bool:
        """Whether the sandbox failed, not the program."""
        return self.status == "sandbox_error"


def safe_name(name: str) -> str:
    """`name` as a relative path inside the work folder; `ValueError` for anything that could lead
    out of it.
    """
    parts = name.split("/")
    if (
        not name
        or len(name) > 1024
        or "\0" in name
        or any(part in ("", ".", "..") for part in parts)
        or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts)
        or name.startswith("/")
    ):
        raise ValueError(
            f"file name {name!r} must be a relative path inside the work folder, "
            f"without '.' or '..' parts, and none longer than {LONGEST_NAME} bytes."
        )
    return name


def safe_files(files: Mapping[str, bytes], stdin: str, room_mb: int) -> dict[str, bytes]:
    """`files` as they can be laid into a work folder beside `stdin`; ValueError where they can't."""
    for name in files:
        parts = safe_name(name).split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts))]
        if taken := [folder for folder in above if folder in files]:
            raise ValueError(f"file {name!r} can't lie in {taken[0]!r}, which is a file, too.")
    if stdin and STDIN in files:
        raise ValueError(f"file name {STDIN!r} is taken where there is stdin: use another one.")
    sizes = [len(content) for content in files.values()]
    sizes.append(len(stdin.encode("utf-8", "surrogateescape")))
    if sum(sizes) > room_mb << 20:
        raise ValueError(
            f"files and stdin have {sum(sizes) / (1 << 20):.1f} MB; a work folder has {room_mb} "
            "(Limits.file_mb)."
        )
    return dict(files)
