"""What can be done where the kernel has no more of something: processes, open files, memory."""

from __future__ import annotations

import errno

OPEN_FILES = "raise their number (ulimit -n; for a container docker run --ulimit nofile=…)"
WAYS_OUT = {
    errno.EAGAIN: (
        "no more processes are allowed here: raise their number (ulimit -u; for a container "
        "docker run --pids-limit=…), end others, or let fewer programs run at once"
    ),
    errno.EMFILE: f"no more files may be open here: {OPEN_FILES}",
    errno.ENFILE: "no more files may be open on this machine: raise their number (sysctl fs.file-max)",
    errno.ENOMEM: "this machine has no more memory: let fewer programs run at once",
}


def told(error: BaseException) -> str:
    """The error in words, with the way out if something has run short."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in WAYS_OUT:
        text += f". To mend it: {WAYS_OUT[error.errno]}"
    return text
