"""`trainer.*`: the run, with what RL adds to every command's keys."""

from __future__ import annotations

from dataclasses import dataclass

from retool.config import option, options


@dataclass(frozen=True)
class TrainerConfig(options.TrainerConfig):
    """The run."""

    project_name: str = option("retool-rl", "Project, for the loggers and the folder.")
    total_training_steps: int | None = option(
        None, "Steps (of train_batch_size prompts); overrides total_epochs.", minimum=1
    )
    val_before_train: bool = option(True, "Validate before the first step.")
    val_only: bool = option(False, "Validate and stop.")
    log_val_generations: int = option(
        0, "Validation answers shown to the loggers; all are written to report/.", minimum=0
    )
    save_freq: int = option(
        -1, "Steps between checkpoints; the last step is always saved; -1 = only that.", minimum=-1
    )
    test_freq: int = option(
        -1,
        "Steps between validations; the last step is always validated; -1 = only that.",
        minimum=-1,
    )
    deterministic: bool = option(
        False, "Deterministic kernels and batches: a resumed run is bit-equal on the same layout."
    )
    watchdog_s: float = option(
        3600,
        (
            "After so many seconds without progress, every rank writes its stacks "
            "into the run's folder and the run ends; 0 = never."
        ),
        minimum=0,
    )
