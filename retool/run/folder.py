"""A run's folder: made, or cleared for a run from the start. And lines that one rank prints for
all.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml

from retool.checkpoint.format.tracker import TRACKER, checkpoints
from retool.config import to_dict
from retool.config.redact import redact
from retool.files.durable import replace_text
from retool.metrics import printable
from retool.parallel.mesh import Mesh

# Everything that a run writes there. The tracker comes first: set aside in this order, it never
# names a checkpoint that is elsewhere.
WRITTEN = (
    TRACKER,
    "global_step_*",
    "metrics.jsonl",
    "config.yaml",
    "report",
    "tensorboard",
    "swanlab",
    "*_run_id.txt",
)


def say(mesh: Mesh, text: str) -> None:
    """One line, from rank 0, for the whole run."""
    if mesh.rank == 0:
        print(printable(text), flush=True)


def make_run_folder(folder: str | Path, config: Any, mesh: Mesh, anew: bool = False) -> Path:
    """Make a run's folder and write the configuration (a dataclass) into it, without secrets.

    `anew`: what another run saved there is set aside first, so that checkpoints of two never mix.
    """
    path = Path(folder)
    if mesh.rank > 0:
        return path
    path.mkdir(parents=True, exist_ok=True)
    if anew and any(checkpoints(path)):
        aside = set_aside(path)
        say(mesh, f"a run from the start: what was in {path} is in {aside.name}/ now.")
    text = yaml.safe_dump(redact(to_dict(config)), sort_keys=False)
    replace_text(path / "config.yaml", text, lasting=False)  # the one there may be another user's
    return path


def set_aside(folder: Path) -> Path:
    """Move what a run wrote in `folder` into a new one in it, which is returned.

    It is called previous_1, previous_2 …
    """
    numbered = (folder / f"previous_{number}" for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    target.mkdir()
    for pattern in WRITTEN:
        for path in sorted(folder.glob(pattern)):
            path.rename(target / path.name)
    return target
