"""What every training run does around its steps: seeds, its folder, one line for all ranks, how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from retool.checkpoint.folder import TRACKER, steps
from retool.config import to_dict
from retool.metrics import printable
from retool.parallel.lost import LINGER, follow, lost_peer
from retool.parallel.mesh import Mesh
from retool.redact import redact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}  # as configurations name them
WRITTEN = (TRACKER, "global_step_*", "metrics.jsonl", "config.yaml", "report", "tensorboard", "swanlab", "*_run_id.txt")


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch with (seed, rank); with `deterministic`, only kernels that give the same bits again."""
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
    """Make a run's folder and write the resolved configuration (a dataclass) into it, secrets redacted.

    `anew`: what another run saved there is set aside first, so that checkpoints of two never mix.
    """
    path = Path(folder)
    if mesh.rank == 0:
        path.mkdir(parents=True, exist_ok=True)
        if anew and any(steps(path)):
            say(mesh, f"a run from the start: what was in {path} is in {set_aside(path).name}/ now.")
        (path / "config.yaml").write_text(yaml.safe_dump(redact(to_dict(config)), sort_keys=False))
    return path


def set_aside(folder: Path) -> Path:
    """Move everything that a run writes from `folder` into a new folder in it, previous_1, previous_2 …, which is returned."""
    target = next(path for n in itertools.count(1) if not (path := folder / f"previous_{n}").exists())
    target.mkdir()
    for name in WRITTEN:  # the tracker first: it never names a checkpoint that is elsewhere
        for path in sorted(folder.glob(name)):
            path.rename(target / path.name)
    return target


def say_ended(mesh: Mesh, step: int, steps: int, folder: Path) -> None:
    """The last line: everything is done, or the run was asked to stop before."""
    if step < steps:
        say(mesh, f"asked to stop at step {step:,} of {steps:,}: {folder}. The same command goes on from there.")
    else:
        say(mesh, f"finished at step {step:,} of {steps:,}: {folder}")


def tell_launcher(text: str) -> None:
    """Have torchrun close its own report, the last thing on the screen, with these words, where it asks for such."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": redact(text), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


@contextmanager
def sole_user(folder: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Keep every other run out of `folder`, which is made, for as long as this lasts or the process lives.

    The run before may just be ending, so it is given `patience_s`. ValueError where it has the folder still. Disks that
    know no such locks (flock of a directory) are used without.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError("another run is writing there.") from None
                time.sleep(0.2)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            # Not another run's, which may have been made in the place of this one.
            if new and os.path.samestat(os.stat(folder), os.fstat(handle)) and not any(folder.iterdir()):
                folder.rmdir()
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a run has `folder` to itself at this moment. Nothing is made or kept."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def exit_status(train: Callable[[], None], rank: int) -> int:
    """Run a command's training: 0 when it is done, 1 when the user has something to mend, another when a peer was lost."""
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
