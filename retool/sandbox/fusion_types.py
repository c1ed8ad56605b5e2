"""SandboxFusion's messages, and what they mean in ours.

Source: SandboxFusion's `POST /run_code`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from .result import Result, Status, safe_name

_OURS = frozenset(get_args(Status))
KILLED = 137  # a shell's code for a process that SIGKILL ended


@dataclass(frozen=True)
class RunRequest:
    """One program with what it needs.

    `timeout` in seconds; `memory_mb` None: the server's own limit.
    """

    code: str
    stdin: str = ""
    timeout: float = 10.0
    memory_mb: int | None = None
    files: Mapping[str, bytes] | None = None
    fetch: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "language": "python",
            "compile_timeout": self.timeout,
            "run_timeout": self.timeout,
            "memory_limit_MB": -1 if self.memory_mb is None else self.memory_mb,
            "stdin": self.stdin,
            "files": {
                name: base64.b64encode(content).decode("ascii")
                for name, content in (self.files or {}).items()
            },
            "fetch_files": list(self.fetch),
        }

    @staticmethod
    def from_json(body: Any) -> RunRequest:
        """Checked field by field; `ValueError` says which is wrong."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object.")
        code = body.get("code")
        stdin = body.get("stdin") or ""
        if not isinstance(code, str) or not isinstance(stdin, str):
            raise ValueError("code must be a string, and so must stdin where it is given.")
        if body.get("language", "python") not in ("python", "python3"):
            raise ValueError(
                f"language={body.get('language')!r} isn't served here: only python is."
            )
        timeout = body.get("run_timeout", 10)
        memory = body.get("memory_limit_MB", -1)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"run_timeout={timeout!r} must be a number of seconds above 0.")
        if isinstance(memory, bool) or not isinstance(memory, int):
            raise ValueError(
                f"memory_limit_MB={memory!r} must be a whole number of megabytes, or -1."
            )
        names = body.get("fetch_files") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("fetch_files must be a list of file names.")
        files = _decode_files(body.get("files") or {})
        return RunRequest(
            code,
            stdin,
            float(timeout),
            memory if memory > 0 else None,
            files,
            [safe_name(name) for name in names],
        )


def _decode_files(files: Any) -> dict[str, bytes]:
    if not isinstance(files, dict):
        raise ValueError("files must map file names to base64 text.")
    decoded = {}
    for name, content in files.items():
        try:
            decoded[safe_name(name)] = base64.b64decode(content or "", validate=True)
        except (binascii.Error, TypeError) as error:
            raise ValueError(f"files[{name!r}] isn't base64 text: {error}.") from None
    return decoded


def result_to_json(result: Result) -> dict[str, Any]:
    """SandboxFusion's answer.

    Its clients know three outcomes of a run; `message` carries ours beside them.
    """
    message = f"{result.status}: {result.reason}" if result.reason else ""
    files = {
        name: base64.b64encode(content).decode("ascii") for name, content in result.files.items()
    }
    answer: dict[str, Any] = {
        "message": message,
        "compile_result": None,
        "run_result": None,
        "executor_pod_name": None,
        "files": files,
    }
    if result.status == "sandbox_error":
        return {**answer, "status": "SandboxError"}
    return_code = result.return_code
    if return_code is None and result.status != "timeout":
        return_code = KILLED
    run = {
        "status": "TimeLimitExceeded" if result.status == "timeout" else "Finished",
        "execution_time": result.execution_time,
        "return_code": return_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
    }
    return {**answer, "status": "Success" if result.ok else "Failed", "run_result": run}


def result_from_json(body: Any) -> Result:
    """A server's answer in our terms; `ValueError` where it isn't one."""
    try:
        run = body["run_result"]
        message = body.get("message") or ""
        files = {
            name: base64.b64decode(content) for name, content in (body.get("files") or {}).items()
        }
        if body["status"] == "SandboxError" or run is None:
            compiled = (body.get("compile_result") or {}).get("stderr") or ""
            return Result(
                "sandbox_error",
                stderr=compiled,
                reason=_after_status(message) or "the server reports a sandbox error",
            )
        code = run.get("return_code")
        seconds = float(run.get("execution_time") or 0.0)
        stdout = str(run.get("stdout") or "")
        stderr = str(run.get("stderr") or "")
        status = _status(run["status"], code, message)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(
            f"not a SandboxFusion answer ({type(error).__name__}: {error}): {str(body)[:200]}"
        ) from None
    unsaid = {
        "timeout": "the program ran out of time",
        "sandbox_error": "the server reports an error",
    }
    reason = _after_status(message) or unsaid.get(status, "")
    own_end = status in ("success", "error")
    return Result(
        status,
        stdout,
        stderr,
        code if own_end else None,
        seconds,
        reason,
        len(stdout.encode("utf-8", "replace")),
        len(stderr.encode("utf-8", "replace")),
        files,
    )


def _status(run_status: str, code: int | None, message: str) -> Status:
    named = message.partition(":")[0]
    if run_status == "TimeLimitExceeded":
        return "timeout"
    if run_status != "Finished":
        return "sandbox_error"
    if named in _OURS:
        return named  # type: ignore[return-value]
    return "success" if code == 0 else "error"


def _after_status(message: str) -> str:
    head, _, tail = message.partition(": ")
    return tail if head in _OURS else message
