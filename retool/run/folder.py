"""What every training run does around its steps: seeds, its folder, one line for all ranks, how it
ends.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from retool.checkpoint.format.tracker import TRACKER, checkpoints
from retool.config import to_dict
from retool.config.redact import redact
from retool.metrics import printable
from retool.parallel.lost import LINGER, follow, lost_peer
from retool.parallel.mesh import Mesh

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


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch with (seed, rank); with `deterministic`, only kernels that give
    the same bits again.
    """
    random.seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    torch.manual_seed(seed * 1_000_003 + rank)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def say(mesh: Mesh, text: str) -> None:
    """One line, from rank 0, for the whole run."""
    if mesh.rank == 0:
        print(printable(text), flush=True)


def make_run_folder(folder: str | Path, config: Any, mesh: Mesh, anew: bool = False) -> Path:
    """Make a run's folder and write the resolved configuration (a dataclass) into it, secrets
    redacted.

    `anew`: what another run saved there is set aside first, so that checkpoints of two never mix.
    """
    path = Path(folder)
    if mesh.rank == 0:
        path.mkdir(parents=True, exist_ok=True)
        if anew and any(checkpoints(path)):
            say(
                mesh, f"a run from the start: what was in {path} is in {set_aside(path).name}/ now."
            )
        (path / "config.yaml").write_text(yaml.safe_dump(redact(to_dict(config)), sort_keys=False))
    return path


def set_aside(folder: Path) -> Path:
    """Move everything that a run writes from `folder` into a new folder in it, previous_1,
    previous_2 …, which is returned.
    """
    target = next(
        path for n in itertools.count(1) if not (path := folder / f"previous_{n}").exists()
    )
    target.mkdir()
    for name in WRITTEN:  # the tracker first: it never names a checkpoint that is elsewhere
        for path in sorted(folder.glob(name)):
            path.rename(target / path.name)
    return target


def say_ended(mesh: Mesh, step: int, steps: int, folder: Path) -> None:
    """The last line: everything is done, or the run was asked to stop before."""
    if step < steps:
        say(
            mesh,
            f"asked to stop at step {step:,} of {steps:,}: {folder}. The same command goes on from there.",
        )
    else:
        say(mesh, f"finished at step {step:,} of {steps:,}: {folder}")


def tell_launcher(text: str) -> None:
    """Have torchrun close its own report, the last thing on the screen, with these words, where it
    asks for such.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": redact(text), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def exit_status(train: Callable[[], None], rank: int) -> int:
    """Run a command's training: 0 when it is done, 1 when the user has something to mend, another
    when a peer was lost.
    """
    try:
        train()
    except ValueError as error:  # the user's to mend: the sentence is enough
        if rank > 0:  # all ranks may have it: rank 0's then ends the others while they wait
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(LINGER)
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        return follow(rank)
    return 0
