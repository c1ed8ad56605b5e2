"""Loggers behind packages of others: TensorBoard, Weights & Biases, MLflow, SwanLab."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence

from retool.metrics.logger import Logger, Row, RunInfo


class TensorBoardLogger:
    """Event files under `tensorboard/` of the run's folder; a resumed run hides what came after its
    step.
    """

    def __init__(self, info: RunInfo) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(
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
        note = info.folder / "wandb_run_id.txt"
        known = note.read_text().strip() if note.exists() and info.first_step else None
        self._run = self._wandb.init(
            project=info.project,
            name=info.experiment,
            config=info.config,
            dir=str(info.folder),
            id=known,
            resume="allow" if known else None,
        )
        note.write_text(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        table = self._wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
        self._run.log({name: table}, step=step)

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
        self._mlflow.log_dict(info.config, "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._mlflow.log_text(
            "".join(json.dumps(dict(row)) + "\n" for row in rows), f"{name}/step_{step}.jsonl"
        )

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
        self._swanlab.log({name: [self._swanlab.Text(_as_code(row)) for row in rows]}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


def _as_code(row: Row) -> str:
    """Markdown that shows every text as it is."""
    return "\n\n".join(
        f"{name}\n\n    " + str(value).replace("\n", "\n    ") for name, value in row.items()
    )


TRACKERS: dict[str, Callable[[RunInfo], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "swanlab": SwanlabLogger,
}
