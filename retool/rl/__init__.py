"""Reinforcement learning with tools: rollouts, rewards, losses and the code interpreter.

`python -m retool.rl` is the command, `retool.rl(…)` the same from Python: see `retool.rl.api`.
"""

from typing import TYPE_CHECKING

from retool.run.callable_module import make_callable

if TYPE_CHECKING:
    from retool.rl.config import RLConfig

__all__ = ["RLConfig"]


def __getattr__(name: str) -> object:
    # Late, as processes that judge import this room and need no configuration
    if name == "RLConfig":
        from retool.rl.config import RLConfig

        return RLConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__)
