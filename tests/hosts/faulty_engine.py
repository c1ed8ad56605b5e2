"""`python -m tests.hosts.faulty_engine FILE WORDS`: an RL run whose second engine fails from when FILE
is there on; every answer of its model calls the code interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from retool.engine.engine import Engine
from retool.rl.__main__ import main
from tests.reliability.commands import RL

ERROR = "CUDA error: uncorrectable ECC error encountered"


def break_engine(when: Path) -> None:
    real = Engine.step

    def step(self: Engine) -> Any:
        if os.environ["RANK"] == "1" and when.exists():
            raise RuntimeError(ERROR)
        return real(self)

    Engine.step = step


if __name__ == "__main__":
    RL.began()
    break_engine(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
