"""What every command asks before it starts: the machine, the run's folder, and what to note.

Each check returns every fault it finds and raises none. A command's own preflight
(`retool.sft.preflight`, `retool.rl.preflight.checks`) calls `check_run` and `notes_of`, and adds
what its configuration and data say.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from retool.checkpoint.format.tracker import STEP, TRACKER, checkpoints
from retool.config import Fault
from retool.config.options import resume_notes
from retool.files.lock import in_use
from retool.model.borrowed.config import BorrowedConfig
from retool.perf import GIB
from retool.preflight.borrowed import check_borrowed
from retool.preflight.machine import (
    DEFAULT_PORT,
    check_compiler,
    check_host_memory,
    check_output,
    check_port,
    check_rounds,
    check_store,
    free_bytes,
    gpu_notes,
    may_look_into,
    port_is_free,
    unused_gpus,
)
from retool.preflight.plan import (
    RunReport,
    checkpoint_bytes,
    host_bytes,
    kept_checkpoints,
    setting_of,
)
from retool.preflight.world import (
    Box,
    check_attention,
    check_device,
    check_experts,
    check_mesh,
)

R = TypeVar("R", bound=RunReport)
GONE_ON_WITH = ("metrics.jsonl", TRACKER)  # what a resumed run reads of the one before


def check_run(report: R, box: Box, environment: Mapping[str, str]) -> R:
    """The report with every fault of sizes, devices, this machine and the run's folder.

    `report.model` may be missing.
    """
    options = report.options
    trainer = options.trainer
    model = report.model
    world = report.world
    folder = Path(trainer.default_local_dir)
    faults = [
        *check_mesh(options, world.processes, model.heads if model else None),
        *check_experts(options, world.processes, model),
        *check_device(trainer.device, world.per_node, box),
        *check_attention(
            options,
            # Every kernel takes 64: without a model the rest is checked all the same
            head_dim=model.head_dim if model else 64,
            box=box,
            windowed=model is not None and model.windowed,
            capped=model is not None and model.score_cap > 0,
        ),
        *check_borrowed(options, model),
    ]
    if not box.elsewhere:
        faults += check_port(environment)
        faults += check_rounds(environment)
        compiles = options.model.use_compile
        # Neither is compiled unless asked for, so a compiler that is missing is no fault
        if compiles == "auto" and (trainer.device == "cpu" or isinstance(model, BorrowedConfig)):
            compiles = False
        faults += check_compiler(compiles, options.model_key)
    # As it was given: a Path has one slash where an address has two
    if "://" in trainer.default_local_dir:
        faults.append(_no_folder(trainer.default_local_dir))
    else:
        faults += check_output(folder, checkpoint_bytes(report) if options.saves else 0.0)
    faults += check_run_folder(folder)
    faults += check_store(trainer.default_hdfs_dir, "trainer.default_hdfs_dir")
    if model is not None and not box.elsewhere:
        kinds = ("param_offload", "optimizer_offload")
        keys = [f"{options.fsdp_key}{kind}=true" for kind in kinds if getattr(options.fsdp, kind)]
        faults += check_host_memory(host_bytes(report), " ".join(keys))
    return report.blame(*faults)


def _no_folder(address: str) -> Fault:
    return Fault(
        f"trainer.default_local_dir={address}",
        "is an address, and a run writes to a disk.",
        "Give a folder; trainer.default_hdfs_dir takes the address that checkpoints are copied to.",
    )


def check_run_folder(folder: Path) -> Iterator[Fault]:
    """A fault if the run's folder is a model's or a checkpoint: a run would write among their
    files.
    """
    where = f"trainer.default_local_dir={folder}"
    another = "Choose another trainer.default_local_dir"
    if not may_look_into(folder):
        return  # check_output tells it
    others = [name for name in GONE_ON_WITH if not _may_go_on_with(folder / name)]
    if others:
        names = " and ".join(others)
        yield Fault(
            where,
            f"holds {names} of another user, which this one may not read.",
            f"{another}, or make them yours (chown).",
        )
    if STEP.fullmatch(folder.name) and os.path.isdir(folder):
        yield Fault(
            where,
            "is a checkpoint, not a run's folder.",
            f"{another}; to go on from it, {folder.parent}.",
        )
    elif os.path.isfile(folder / "config.json"):
        yield Fault(where, "is a model's folder: a run would write among its files.", f"{another}.")


def _may_go_on_with(file: Path) -> bool:
    return not os.path.lexists(file) or os.access(file, os.R_OK)


def notes_of(
    report: RunReport, box: Box, environment: Mapping[str, str], *, planning: bool
) -> Iterator[str]:
    """What is allowed but probably not meant, and what this machine may run out of later, or shares
    with somebody.
    """
    options = report.options
    trainer = options.trainer
    folder = trainer.default_local_dir
    yield from _schedule_notes(report)
    yield from resume_notes(options)
    if trainer.resume_mode == "disable" and options.saves:
        for _, newest in itertools.islice(checkpoints(Path(folder)), 1):
            yield (
                f"trainer.resume_mode=disable: {newest} and what else that run wrote are moved to a "
                "folder previous_N there."
            )
    yield from _disk_notes(report)
    if planning and in_use(Path(folder)):
        yield (
            f"another run is writing in {folder} now: this one would wait for ten seconds and then be "
            "refused."
        )
    if box.elsewhere:
        if report.world.processes > 1 and not port_is_free(DEFAULT_PORT):
            yield (
                f"port {DEFAULT_PORT}, torchrun's own choice, is taken here: start with torchrun "
                "--standalone, or --master_port."
            )
    elif trainer.device != "cpu":
        compute = setting_of(options, report.world).compute
        yield from gpu_notes(report.world.per_node, compute, environment)
        yield from unused_gpus(environment)


def _schedule_notes(report: RunReport) -> Iterator[str]:
    """Nothing left to train, or saves that come too seldom."""
    steps = report.steps
    save_freq = report.options.trainer.save_freq
    if report.options.saves and report.step_then >= steps:
        more = (
            "raise trainer.total_epochs or trainer.total_training_steps to train on, or start anew with "
            "trainer.resume_mode=disable"
        )
        yield f"nothing is left to train: step {report.step_then:,} of {steps:,} is done; {more}."
    if isinstance(save_freq, int) and save_freq > steps:
        yield f"trainer.save_freq={save_freq} is more than the {steps} steps: only the last is saved."


def _disk_notes(report: RunReport) -> Iterator[str]:
    """Checkpoints that will be more than the disk holds."""
    folder = report.options.trainer.default_local_dir
    each = checkpoint_bytes(report)
    kept = kept_checkpoints(report)
    free = free_bytes(Path(folder))
    if kept > 1 and each * kept > free:
        # One less than there is room for: an old one goes only when the new one is complete
        fit = max(1, int(free // each) - 1)
        yield (
            f"{kept} checkpoints of {each / GIB:.1f} GiB need more than the {free / GIB:.1f} GiB "
            f"that are free in {folder}: add trainer.max_ckpt_to_keep={fit}."
        )
