"""Do the files of a checkpoint belong together? Checksums say so.

Without them, the steps that the files themselves tell are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retool.checkpoint.format.folder import (
    CHECKSUMS,
    CONFIG,
    read_small_json,
    recorded_files,
    shard_name,
    written_by_us,
)
from retool.checkpoint.format.state_dicts import SAVED_AT
from retool.checkpoint.format.stored_tensors import Attributed
from retool.checkpoint.format.torch_file import WAY_OUT
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_steps
from retool.checkpoint.shards.states import extra_state
from retool.config.redact import logger

NOTHING_VOUCHES = (
    f"it has no {CHECKSUMS}, so nothing vouches for its files belonging together: "
    "each file's own checksums are right, and the steps that the ranks' files tell agree"
)
log = logger("retool.checkpoint")


def require_one_step(where: Path) -> None:
    """ValueError if files of a checkpoint were written at different steps.

    Compared are the training step in our files (extra_state, model) with fsdp_config.json's, and of
    each parameter the number of AdamW's updates with rank 0's. Other programs' model files tell no
    step.
    """
    expected: tuple[Path, int] | None = None
    for path, step in _training_steps(where):
        expected = expected or (path, step)
        if step != expected[1]:
            raise _mixed(path, step, *expected)
    if not any(where.glob("optim_world_size_*_rank_0.pt")):
        return
    optim = Shards(where, "optim")
    first = optimizer_steps(optim, 0)
    for rank in range(1, optim.world):
        for index, step in optimizer_steps(optim, rank).items():
            # Rank 0's file may say nothing of this parameter: then there is nothing to compare with
            if step != first.get(index, step):
                raise _mixed(
                    optim.file(rank).path,
                    step,
                    optim.file(0).path,
                    first[index],
                    f"update {{}} of parameter {index}",
                )


def require_one_step_unless_vouched(where: Path) -> None:
    """`require_one_step`, with a warning, for checkpoints without checksums.

    With them, each byte is checked when it is read.
    """
    if recorded_files(where):
        return
    require_one_step(where)
    log.warning("%s: %s.", where, NOTHING_VOUCHES)


def _mixed(path: Path, step: int, other: Path, expected: int, what: str = "step {}") -> ValueError:
    return ValueError(
        f"{path} is of {what.format(step)}, {other} of {what.format(expected)}: files of two checkpoints "
        f"are mixed. {WAY_OUT}"
    )


def _training_steps(where: Path) -> Iterator[tuple[Path, int]]:
    """(file, training step that it tells), of each file that tells one."""
    if not written_by_us(where) or not any(where.glob("model_world_size_*_rank_*.pt")):
        return
    for path, step in _said_steps(where):
        if isinstance(step, int):
            yield path, step


def _said_steps(where: Path) -> Iterator[tuple[Path, Any]]:
    """(file, whatever stands where the step should)."""
    config = read_small_json(where / CONFIG)
    if isinstance(config, dict):
        yield where / CONFIG, config.get("step")
    model = Shards(where, "model")
    for rank in range(model.world):
        content = model.file(rank).content
        if isinstance(content, Attributed):
            yield model.file(rank).path, content.attributes.get(SAVED_AT)
        extra = extra_state(where, rank) or {}
        yield where / shard_name("extra_state", model.world, rank), extra.get("step")
