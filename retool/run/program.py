"""A run inside a program that was there before it and goes on after it: a script, a notebook.

[Note: a guest in a process] A command may change its process as it likes: it ends with the run. Here
signals, random states, environment, warnings, event loop and memory are given back as they were
found. Notebooks run their cells inside an event loop, where Python allows no other one: it is laid
aside meanwhile.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from retool.checkpoint.format.tracker import tracked
from retool.config import Fault, Parsed, leaves
from retool.config.redact import redact
from retool.config.words import flattened
from retool.data.in_memory import files_of
from retool.metrics import read_jsonl
from retool.preflight.plan import RunReport, attempt
from retool.preflight.resume import export_of
from retool.preflight.show import show_plan
from retool.run.caller import Caller
from retool.run.result import Refused, Result
from retool.run.start import alone_in_folder, verdict_of_all

C = TypeVar("C")
R = TypeVar("R", bound=RunReport)


@contextmanager
def as_guest() -> Iterator[None]:
    """Around a run: what it changes in its process is put back. See [Note: a guest in a process]."""
    with ExitStack() as held:
        for part in (_loop_aside, _random_states, _deterministic_kernels, _environment, _said):
            held.enter_context(part())
        try:
            yield
        finally:
            # A run freezes what it loaded (`gc.freeze`). In a program that goes on it would never
            # be freed.
            gc.unfreeze()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            if dist.is_initialized():
                atexit.unregister(_leave)
                atexit.register(_leave)


def _leave() -> None:
    """The program ends: part from the other processes, whose group its runs shared."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _loop_aside() -> Iterator[None]:
    """No event loop runs in this thread while this lasts."""
    # Private names of asyncio: there are no public ones for this.
    loop = asyncio._get_running_loop()
    if loop is None:
        yield
        return
    # The cell is a task of the loop. asyncio allows one current task a thread, so it steps back,
    # too.
    task = asyncio.current_task(loop)
    if task is not None:
        asyncio.tasks._leave_task(loop, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio.tasks._enter_task(loop, task)


@contextmanager
def _random_states() -> Iterator[None]:
    python = random.getstate()
    numbers = np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    on_host = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(on_host)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    asked = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=only_warned)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _said() -> Iterator[None]:
    """What `warn_from_first_rank` silences is heard again."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        try:
            yield
        finally:
            logging.disable(level)


# --- what is asked ---


def stated(
    schema: type, options: Mapping[str, Any] | None, quiet: bool, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """`options`, which may be nested, with the arguments that were given, by their dotted keys."""
    given = {key: value for key, value in arguments.items() if value is not None}
    silent = {"trainer.logger": []} if quiet else {}
    known = {leaf.key: leaf for leaf in leaves(schema)}
    return {**silent, **dict(flattened(options or {}, known)), **given}


def given_files(
    data: Mapping[str, Any], options: Mapping[str, Any], config: Any
) -> tuple[dict[str, tuple[str, ...]], list[Fault]]:
    """`data.train_files` and `data.val_files` for what was given as `train` and `val`: rows of the
    program's become files. And what can't.
    """
    folder = options.get(
        "data.cache_dir", getattr(getattr(config, "data", None), "cache_dir", None)
    )
    files: dict[str, tuple[str, ...]] = {}
    faults: list[Fault] = []
    for name, rows in data.items():
        key = f"data.{name}_files"
        if rows is None:
            continue
        found = attempt(key, partial(files_of, rows, name, folder), faults)
        if found is not None:
            files[key] = found
    return files, faults


def with_faults(parsed: Parsed[C], faults: Sequence[Fault]) -> Parsed[C]:
    """With faults that were found before; a key that has one isn't said to lack."""
    known = {fault.where for fault in faults}
    others = [fault for fault in parsed.faults if fault.where not in known]
    return replace(parsed, faults=(*faults, *others))


# --- a run ---


def carry_out(
    report: R,
    in_words: Callable[[R], Iterable[tuple[str, str]]],
    train: Callable[[R, Caller], int | None],
    caller: Caller,
) -> tuple[Result, int | None]:
    """What a command does with preflight's report: (what there is then, the signal that stopped it).

    Raises Refused where any rank has a fault. Collective.
    """
    with alone_in_folder(report, checking=False) as report:
        # The store stays open until the run has a process group.
        faults, _store = verdict_of_all(report, checking=False, show=lambda _: None)
        if faults:
            raise Refused(faults)
        if int(os.environ.get("RANK", 0)) == 0 and not caller.quiet:
            show_plan(in_words(report), report.notes)
        stopped_by = train(report, caller)
    return result_of(report), stopped_by


def pass_on(stopped_by: int | None) -> None:
    """What asked the run to stop was meant for the program, too: it gets the signal that the run
    has caught. After Ctrl-C it has had its KeyboardInterrupt.
    """
    if stopped_by is not None and stopped_by != signal.SIGINT:
        signal.raise_signal(stopped_by)


def result_of(report: RunReport) -> Result:
    """What a run has left in its folder."""
    folder = Path(report.options.trainer.default_local_dir)
    step = tracked(folder) or 0
    log = folder / "metrics.jsonl"
    metrics: list[dict[str, Any]] = read_jsonl(log) if log.is_file() else []
    return Result(
        folder=folder,
        model=export_of(folder / f"global_step_{step}"),
        step=step,
        steps=report.steps,
        metrics=redact(metrics),
    )
