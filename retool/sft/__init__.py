"""Multi-turn supervised fine-tuning.

`python -m retool.sft` is the command, `retool.sft(…)` the same from Python: see `retool.sft.api`.
"""

from retool.run.callable_module import make_callable
from retool.sft.config import SFTConfig

__all__ = ["SFTConfig"]

make_callable(__name__)
