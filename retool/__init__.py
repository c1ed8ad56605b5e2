"""retool trains language models to use tools: SFT and RL on the GPUs you have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retool.llm.llm import LLM
    from retool.llm.sampling import SamplingParams
    from retool.rl.api import rl
    from retool.run.result import Refused, Result
    from retool.sft.api import sft

__all__ = ["LLM", "Refused", "Result", "SamplingParams", "__version__", "rl", "sft"]
__version__ = "0.1.0"

# What the index calls it; `import retool` all the same
__distribution__ = "retool-train"

# Name → where it is: imported when it is first asked for, so that `import retool` stays fast
_LAZY = {
    "LLM": "retool.llm.llm",
    "Refused": "retool.run.result",
    "Result": "retool.run.result",
    "SamplingParams": "retool.llm.sampling",
}
# Packages that can be called
_CALLABLE = ("rl", "sft")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
