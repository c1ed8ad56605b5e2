"""Where a run's numbers go. One small interface; `metrics.jsonl` is always on; a failing logger warns once and never ends a run.

`metrics.jsonl` holds one JSON object per optimizer step and one per validation, each with its `step`. Non-finite numbers,
which JSON lacks, stand as null. A run resumed at step s keeps the entries up to s and goes on from there, so that no
step is missing or repeated whatever the earlier process had still logged, a torn last line included.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from retool.config import Fault
from retool.redact import redact

HEADLINE = (  # what a terminal line shows, in order: (metric, label, format)
    ("train/loss", "loss", ".4f"),
    ("val/loss", "val loss", ".4f"),
    ("train/grad_norm", "grad", ".3f"),
    ("train/lr", "lr", ".2e"),
    ("perf/tokens_per_second_per_gpu", "tok/s/gpu", ",.0f"),
    ("train/mfu", "mfu", ".1%"),
    ("perf/max_memory_allocated_gb", "GiB", ".1f"),
    ("timing_s/step", "s/step", ".2f"),
    ("critic/score/mean", "score", ".3f"),
    ("response_length/mean", "length", ".0f"),
    ("num_turns/mean", "turns", ".1f"),
    ("tool/latency", "s/tool", ".2f"),
)
PHASES_SHOWN = 5


class Logger(Protocol):
    """A place for metrics. `log` may raise: `Loggers` keeps the run going."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told at start. `first_step` is the step the run resumes after (0 = fresh), `total_steps` the last one."""

    folder: Path
    project: str
    experiment: str
    config: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0
    total_steps: int = 0


class JsonlLogger:
    """`metrics.jsonl`. A line that couldn't be written (a full disk) is kept and written with the next one."""

    def __init__(self, info: RunInfo) -> None:
        info.folder.mkdir(parents=True, exist_ok=True)
        path = info.folder / "metrics.jsonl"
        resume_jsonl(path, info.first_step)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        self._pending = b""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entry = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
        self._pending += json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            written = os.pwrite(self._file, self._pending, self._end)
            if written < len(self._pending):
                raise OSError(f"metrics.jsonl: only {written} of {len(self._pending)} bytes fitted")
        except OSError:
            os.ftruncate(self._file, self._end)  # no torn line in the middle
            raise
        self._end += written
        self._pending = b""

    def close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def resume_jsonl(path: Path, step: int) -> None:
    """Keep the entries of `path` up to `step`; a torn line and everything later go. Atomic.

    At step 0 an older run's file is moved to `metrics.N.jsonl`, not emptied.
    """
    if not path.exists():
        return
    if step == 0:
        if path.stat().st_size:
            number = next(n for n in range(1, 10**6) if not path.with_name(f"metrics.{n}.jsonl").exists())
            path.rename(path.with_name(f"metrics.{number}.jsonl"))
        return
    rest = path.with_suffix(".jsonl.tmp")
    with path.open("rb") as old, rest.open("wb") as new:
        for line in old:
            entry = _parse_line(line)
            if entry is not None and entry["step"] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    rest.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, a torn last line left out."""
    with path.open("rb") as lines:
        return [entry for line in lines if (entry := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _finite(value: float) -> float | int | None:
    number = value if isinstance(value, (int, float)) else float(value)
    return number if math.isfinite(number) else None


class Display(Progress):
    """A progress bar with a line below it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim", no_wrap=True, overflow="ellipsis")


class ConsoleLogger:
    """A line a step. On a terminal also a bar with the time left, and the last step's phases; elsewhere `key=value` lines to parse."""

    def __init__(self, info: RunInfo, console: Console | None = None) -> None:
        self._console = console or Console(markup=False, highlight=False, soft_wrap=True)
        self._info, self._bar = info, None
        self._first: tuple[int, float] | None = None  # the first step logged and when: what came before it (compiling) isn't the pace
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("eta"), TimeRemainingColumn())  # fmt: skip
            self._bar = Display(*columns, console=self._console)
            self._task = self._bar.add_task(printable(info.experiment), total=info.total_steps or None, completed=info.first_step)
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is None:
            self._console.print(self._plain(step, metrics))
            return
        shown = (f"{label} {format(metrics[name], form)}" for name, label, form in HEADLINE if name in metrics)
        self._bar.note = phases(metrics) or self._bar.note
        self._bar.update(self._task, completed=step)
        self._console.print(f"step {step}/{self._info.total_steps}  " + "  ".join(shown))

    def _plain(self, step: int, metrics: Mapping[str, float]) -> str:
        words = [f"step={step}/{self._info.total_steps}", *(f"{name}={value:.6g}" for name, value in metrics.items())]
        now, left = time.monotonic(), self._info.total_steps - step
        first, then = self._first = self._first or (step, now)
        if left == 0 or (step > first and left > 0):
            words.append(f"eta_s={left and (now - then) / (step - first) * left:.0f}")
        return " ".join(words)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def phases(metrics: Mapping[str, float]) -> str:
    """Where a step's time went, the longest phases first; empty where nothing was timed."""
    whole = metrics.get("timing_s/step", 0.0)
    named = {name.removeprefix("timing_s/"): value for name, value in metrics.items() if name.startswith("timing_s/") and value > 0}
    longest = sorted((name for name in named if name != "step"), key=lambda name: -named[name])[:PHASES_SHOWN]
    return f"last step {whole:.2f} s: " + " · ".join(f"{name} {named[name]:.2f}" for name in longest) if whole > 0 and longest else ""


def warn_from_first_rank(rank: int) -> None:
    """Python's warnings and libraries' log lines below errors come from rank 0 alone: every rank has the same to say."""
    if rank > 0:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


class TensorBoardLogger:
    """Event files under `tensorboard/` of the run's folder; a resumed run hides what came after its step."""

    def __init__(self, info: RunInfo) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(info.folder / "tensorboard"), purge_step=info.first_step + 1 if info.first_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases. The run's id is kept in the folder, so that a resumed run goes on in the same place."""

    def __init__(self, info: RunInfo) -> None:
        wandb = importlib.import_module("wandb")
        note = info.folder / "wandb_run_id.txt"
        known = note.read_text().strip() if note.exists() and info.first_step else None
        self._run = wandb.init(
            project=info.project, name=info.experiment, config=redact(info.config), dir=str(info.folder), id=known,
            resume="allow" if known else None,
        )  # fmt: skip
        note.write_text(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow, where MLFLOW_TRACKING_URI says; the run's id is kept in the folder."""

    def __init__(self, info: RunInfo) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(info.project)
        note = info.folder / "mlflow_run_id.txt"
        known = note.read_text().strip() if note.exists() and info.first_step else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else info.experiment)
        note.write_text(run.info.run_id)
        self._mlflow.log_dict(redact(info.config), "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class SwanlabLogger:
    """SwanLab; its log folder lies in the run's folder, and SWANLAB_MODE=local needs no account."""

    def __init__(self, info: RunInfo) -> None:
        swanlab = importlib.import_module("swanlab")
        self._run = swanlab.init(
            project=info.project, experiment_name=info.experiment, config=redact(info.config), logdir=str(info.folder / "swanlab"),
            mode=os.environ.get("SWANLAB_MODE"),
        )  # fmt: skip
        self._swanlab = swanlab

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def close(self) -> None:
        self._swanlab.finish()


class Loggers:
    """All loggers of a run behind the one interface. Another rank than 0 has none: `Loggers()`."""

    def __init__(self, loggers: Sequence[tuple[str, Logger]] = (), warn: Callable[[str], None] | None = None) -> None:
        self._loggers, self._failed, self._warn = tuple(loggers), set[str](), warn or _warn

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step's, or one validation's, metrics."""
        for name, logger in self._loggers:
            try:
                logger.log(step, metrics)
            except Exception as error:  # whatever a third party's client raises
                self.failed(name, error)

    def close(self) -> None:
        for name, logger in self._loggers:
            try:
                logger.close()
            except Exception as error:
                self.failed(name, error)

    def failed(self, name: str, error: Exception) -> None:
        """Say once that a logger fails."""
        if name not in self._failed:
            self._failed.add(name)
            self._warn(f"warning: the {name} logger fails ({type(error).__name__}: {printable(str(error))}); the run goes on.")


def missing_extras(names: Sequence[str]) -> Iterator[Fault]:
    """A fault for each unknown logger and each whose package isn't installed."""
    for name in names:
        if name not in LOGGERS:
            yield Fault(f"trainer.logger={name}", "is not known.", f"Use any of {', '.join(LOGGERS)}.")
        elif name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
            yield Fault(f"trainer.logger={name}", f"needs the package {EXTRAS[name]}.", f"pip install 'retool[{name}]'")


def open_loggers(names: Sequence[str], info: RunInfo) -> Loggers:
    """Open the named loggers, and jsonl always. ValueError for a missing extra; one that fails to start is warned of."""
    faults = list(missing_extras(names))
    if faults:
        raise ValueError("\n".join(map(str, faults)))
    opened: list[tuple[str, Logger]] = []
    trouble: list[tuple[str, Exception]] = []
    for name in dict.fromkeys(["jsonl", *names]):
        try:
            opened.append((name, LOGGERS[name](info)))
        except Exception as error:  # no account, no network: not worth a training run
            trouble.append((name, error))
    loggers = Loggers(opened)
    for name, error in trouble:
        loggers.failed(name, error)
    return loggers


def printable(text: str) -> str:
    """`text` on one line without control characters, so that it can't steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


LOGGERS: dict[str, Callable[[RunInfo], Logger]] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "swanlab": SwanlabLogger,
}
EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab"}
