"""The code interpreter: programs that a model wrote, run where they can't do harm.

Importing this loads no torch and starts nothing.

`Sandbox` runs them on this machine; `SandboxFusion` (in `fusion_client`) asks a SandboxFusion
server. Both answer `await run(code, stdin="", timeout=…)` with a `Result`.
"""

from __future__ import annotations

from .embedded import Sandbox
from .result import Limits, Result

__all__ = ["Limits", "Result", "Sandbox"]
