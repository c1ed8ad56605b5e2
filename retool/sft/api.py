"""`retool.sft(…)`: supervised fine-tuning from Python, the run that `python -m retool.sft` makes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from retool.config import Parsed, read
from retool.metrics.loggers import OnStep
from retool.run.caller import Caller
from retool.run.program import as_guest, carry_out, given_files, pass_on, stated, with_faults
from retool.run.result import Result
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.preflight import preflight
from retool.sft.show import in_words, rows_read
from retool.sft.train import train

# What others call it → ours
OTHER_NAMES = {
    "train_dataset": "data",
    "dataset": "data",
    "train_files": "data",
    "eval_dataset": "eval_data",
    "validation_data": "eval_data",
    "val_files": "eval_data",
    "model_name_or_path": "model",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "total_training_steps": "max_steps",
    "per_device_train_batch_size": "batch_size, of all GPUs together",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size: micro-batches are chosen to fit",
    "max_seq_length": "max_length",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps_ratio": "warmup_ratio",
    "logger": "report_to",
    "callbacks": "on_step",
    "args": "config",
}


def sft(
    model: str | os.PathLike[str] | None = None,
    data: Any = None,
    *,
    eval_data: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    lr_scheduler: Literal["cosine", "wsd", "constant"] | None = None,
    warmup_ratio: float | None = None,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    chat_template: str | None = None,
    eval_steps: int | Literal["after_each_epoch"] | None = None,
    save_steps: int | Literal["after_each_epoch"] | None = None,
    report_to: str | Sequence[str] | None = None,
    run_name: str | None = None,
    seed: int | None = None,
    device: Literal["auto", "cuda", "cpu"] | None = None,
    resume: bool = True,
    quiet: bool = False,
    on_step: OnStep | None = None,
    config: SFTConfig | None = None,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Fine-tune `model` on the conversations in `data`. Returns the run's folder and what is in it.

    `model` is a Hugging Face folder or hub id. `data` and `eval_data` are whatever the command reads
    (files, folders, globs), or rows: a list of dicts, a `datasets.Dataset`, a data frame.
    `batch_size` counts the samples of an optimizer step over all GPUs. `output_dir` is the run's
    folder. A run that it already holds is continued, as the command does, unless `resume` is false.

    All other settings go into `options`, under the command's dotted keys ({"optim.min_lr_ratio":
    0.1}), or come as a whole `config`. Arguments override `options`, and `options` override `config`.

    `on_step(step, metrics)` is called on rank 0 with each entry of metrics.jsonl; an exception in it
    ends the run. Under torchrun every process makes the same call.

    Raises Refused, a ValueError that lists everything that is wrong, before anything starts; and
    KeyboardInterrupt after Ctrl-C, once the run has saved.
    """
    asked = stated(SFTConfig, options, quiet, {
        "model.partial_pretrain": model,
        "data.train_batch_size": batch_size,
        "data.max_length": max_length,
        "data.chat_template": chat_template,
        "optim.lr": learning_rate,
        "optim.lr_scheduler": lr_scheduler,
        "optim.warmup_steps_ratio": warmup_ratio,
        "optim.weight_decay": weight_decay,
        "optim.clip_grad": max_grad_norm,
        "trainer.default_local_dir": output_dir,
        "trainer.total_epochs": epochs,
        "trainer.total_training_steps": max_steps,
        "trainer.test_freq": eval_steps,
        "trainer.save_freq": save_steps,
        "trainer.logger": report_to,
        "trainer.experiment_name": run_name,
        "trainer.seed": seed,
        "trainer.device": device,
        "trainer.resume_mode": None if resume else "disable",
    })  # fmt: skip
    with as_guest():
        files, faults = given_files({"train": data, "val": eval_data}, asked, config)
        parsed = read(SFTConfig, [], SYNONYMS, base=config, options={**asked, **files})
        result, stopped_by = _run(with_faults(parsed, faults), Caller(False, on_step, quiet))
    pass_on(stopped_by)
    return result


def _run(parsed: Parsed[SFTConfig], caller: Caller) -> tuple[Result, int | None]:
    """What the command does with a configuration: (what there is then, what stopped it)."""
    # The ranks don't know each other yet: only the launcher's variable says which one speaks
    first = int(os.environ.get("RANK", 0)) == 0
    with rows_read() if first and not caller.quiet else nullcontext() as progress:
        report = preflight(parsed, progress=progress)
    return carry_out(report, in_words, train, caller)
