"""Loggers behind packages of others: TensorBoard, Weights & Biases, MLflow, SwanLab."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from retool.metrics.logger import Logger, Row, RunInfo


class TensorBoardLogger:
    """Event files under `tensorboard/` of the run's folder; a resumed run hides what came after its
    step.
    """

    def __init__(self, info: RunInfo) -> None:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(
            str(info.folder / "tensorboard"),
            purge_step=info.first_step + 1 if info.first_step else None,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._writer.add_text(name, "\n\n---\n\n".join(map(_as_code, rows)), step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases.

    The run's id is kept in the folder, so that a resumed run goes on in the same place.
    """

    def __init__(self, info: RunInfo) -> None:
        self._wandb = importlib.import_module("wandb")
        id_file = info.folder / "wandb_run_id.txt"
        known_id = _id_to_resume(info, id_file)
        self._run = self._wandb.init(
            project=info.project,
            name=info.experiment,
            config=info.config,
            dir=str(info.folder),
            id=known_id,
            resume="allow" if known_id else None,
        )
        id_file.write_text(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        columns = list(rows[0])
        cells = [list(row.values()) for row in rows]
        self._run.log({name: self._wandb.Table(columns=columns, data=cells)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow, where MLFLOW_TRACKING_URI says; the run's id is kept in the folder."""

    def __init__(self, info: RunInfo) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(info.project)
        id_file = info.folder / "mlflow_run_id.txt"
        known_id = _id_to_resume(info, id_file)
        run = self._mlflow.start_run(
            run_id=known_id, run_name=None if known_id else info.experiment
        )
        id_file.write_text(run.info.run_id)
        self._mlflow.log_dict(info.config, "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        lines = [json.dumps(dict(row)) + "\n" for row in rows]
        self._mlflow.log_text("".join(lines), f"{name}/step_{step}.jsonl")

    def close(self) -> None:
        self._mlflow.end_run()


class SwanlabLogger:
    """SwanLab; its log folder lies in the run's folder, and SWANLAB_MODE=local needs no account."""

    def __init__(self, info: RunInfo) -> None:
        swanlab = importlib.import_module("swanlab")
        self._run = swanlab.init(
            project=info.project,
            experiment_name=info.experiment,
            config=info.config,
            logdir=str(info.folder / "swanlab"),
            mode=os.environ.get("SWANLAB_MODE"),
        )
        self._swanlab = swanlab

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        texts = [self._swanlab.Text(_as_code(row)) for row in rows]
        self._swanlab.log({name: texts}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


def _id_to_resume(info: RunInfo, id_file: Path) -> str | None:
    """Under which id the tracker knows the run that is resumed; None for a fresh one."""
    if info.first_step and id_file.exists():
        return id_file.read_text().strip()
    return None


def _as_code(row: Row) -> str:
    """Markdown that shows every text as it is: an indented block under each name."""
    parts = []
    for name, value in row.items():
        indented = str(value).replace("\n", "\n    ")
        parts.append(f"{name}\n\n    {indented}")
    return "\n\n".join(parts)


TRACKERS: dict[str, Callable[[RunInfo], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "swanlab": SwanlabLogger,
}
