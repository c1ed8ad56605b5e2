"""`retool.sft(…)`: the command's own run, in a program that goes on after it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import retool
from retool.metrics import read_jsonl
from retool.sft import SFTConfig
from retool.sft.__main__ import main
from retool.sft.config import DataConfig, ModelConfig, OptimConfig
from tests.ranks import run_ranks
from tests.sft.test_command import words

OPTIONS = {"data.num_workers": 0, "data.micro_batch_size_per_gpu": 2}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that a run logged, but for times and what they make of tokens."""
    entries = read_jsonl(folder / "metrics.jsonl")
    return [
        {name: value for name, value in entry.items() if not name.startswith(("timing_s", "perf"))}
        for entry in entries
    ]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in numbers(folder) if "train/loss" in entry]


def rows_of(work: Path, name: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(work / f"{name}.parquet").to_pylist()


def tune(work: Path, out: Path, data: Any = None, **more: Any) -> retool.Result:
    """A small run of three steps, as `words` has it."""
    options = {**OPTIONS, **more.pop("options", {})}
    return retool.sft(
        work / "model",
        str(work / "train.parquet") if data is None else data,
        output_dir=out,
        learning_rate=1e-3,
        batch_size=4,
        **{"max_steps": 3, "quiet": True, "options": options, **more},
    )


@pytest.fixture(scope="module")
def commanded(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the command's run."""
    out = tmp_path_factory.mktemp("command") / "run"
    val = work / "val.parquet"
    assert main(words(work, out, f"data.val_files={val}", trainer__total_training_steps=3)) == 0
    return out


def process_state() -> tuple[Any, ...]:
    """What a run must leave as it was."""
    return (
        {number: signal.getsignal(number) for number in (2, 10, 15)},
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
        torch.get_rng_state().tolist(),
        dict(os.environ),
        list(warnings.filters),
        logging.root.manager.disable,
        sys.excepthook,
        threading.excepthook,
        torch.are_deterministic_algorithms_enabled(),
        os.getcwd(),
    )


def test_it_is_the_commands_run(work: Path, tmp_path: Path, commanded: Path) -> None:
    """The same numbers to the last bit, from rows that the program holds; the process is as before."""
    before = process_state()
    told: list[tuple[int, Mapping[str, float]]] = []
    result = tune(
        work,
        tmp_path / "run",
        rows_of(work),
        eval_data=rows_of(work, "val"),
        on_step=lambda step, metrics: told.append((step, metrics)),
        options={"trainer.deterministic": True},
    )
    assert numbers(result.folder) == numbers(commanded)
    assert (result.step, result.steps, result.finished) == (3, 3, True)
    assert result.model == tmp_path / "run" / "global_step_3" / "huggingface"
    assert result.last["val/loss"] == numbers(commanded)[-1]["val/loss"]
    assert list(result.metrics) == read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [{"step": step, **metrics} for step, metrics in told] == list(result.metrics)
    assert process_state() == before
    with retool.LLM(result.folder, device="cpu") as llm:
        assert llm.folder == result.model
        assert llm.chat([{"role": "user", "content": "1 + 1?"}])[0].outputs[0].token_ids


def test_in_a_notebook(work: Path, tmp_path: Path, commanded: Path) -> None:
    """A cell runs inside of an event loop, which goes on afterwards."""

    async def cell() -> retool.Result:
        task = asyncio.current_task()
        result = tune(work, tmp_path)
        assert asyncio.current_task() is task and asyncio.get_running_loop().is_running()
        await asyncio.sleep(0)
        return result

    assert numbers(asyncio.run(cell()).folder) == steps_of(commanded)


def test_a_typed_config_and_dotted_keys(work: Path, tmp_path: Path) -> None:
    """Arguments win over options, and these over the configuration. In another thread than the main
    one, where Python knows no signals.
    """
    config = SFTConfig(
        data=DataConfig(train_files=(str(work / "train.parquet"),), train_batch_size=8),
        model=ModelConfig(partial_pretrain=str(work / "model")),
        optim=OptimConfig(lr=1.0, weight_decay=0.5),
    )
    dotted = {"optim": {"lr": 0.5, "min_lr_ratio": 0.1}, "trainer.total_training_steps": 1}
    results: list[retool.Result] = []

    def call() -> None:
        result = retool.sft(
            config=config,
            options={**OPTIONS, **dotted},
            learning_rate=1e-4,
            output_dir=tmp_path,
            report_to=[],
        )
        results.append(result)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    said = (tmp_path / "config.yaml").read_text()
    assert results[0].finished
    for line in ("  lr: 0.0001", "weight_decay: 0.5", "min_lr_ratio: 0.1", "train_batch_size: 8"):
        assert line in said, line


def test_all_faults_are_raised_at_once(work: Path, tmp_path: Path) -> None:
    with pytest.raises(retool.Refused) as caught:
        retool.sft(
            work / "nowhere",
            [{"messages": []}, 3],
            output_dir=tmp_path / "run",
            learning_rate=-1,
            options={"optim.learning_rte": 1, "data.max_length": "long"},
        )
    text = str(caught.value)
    assert isinstance(caught.value, ValueError) and len(caught.value.faults) == 5
    for part in (
        "5 faults",
        "row 1 of the data is a int",
        "nowhere",
        "optim.lr=-1",
        "learning_rte",
    ):
        assert part in text, part
    assert "is required" not in text and not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match=r"train_dataset: did you mean data\?"):
        retool.sft(train_dataset=[])  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"peft_config: Leave it out: retool trains all weights"):
        retool.sft("m", [], peft_config={})  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"options=\{'optim\.lr': …\}"):
        retool.sft(optim__lr=1)  # pyright: ignore[reportCallIssue]


def test_ctrl_c_saves_and_the_same_call_goes_on(
    work: Path, tmp_path: Path, commanded: Path
) -> None:
    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(work, tmp_path, on_step=interrupt)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() in ("1", "2")
    result = tune(work, tmp_path)
    assert result.finished and numbers(result.folder) == steps_of(commanded)


def test_the_programs_own_error_ends_the_run(work: Path, tmp_path: Path) -> None:
    def fail(step: int, metrics: Mapping[str, float]) -> None:
        raise LookupError(f"{step} {len(metrics)}")

    before = process_state()
    with pytest.raises(LookupError):
        tune(work, tmp_path, on_step=fail)
    assert process_state() == before


def test_a_signal_to_end_is_passed_on(work: Path, tmp_path: Path) -> None:
    """The run saves; then the program gets what was meant for it."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        result = tune(
            work,
            tmp_path,
            options={"data.val_files": work / "val.parquet", "trainer.test_freq": 1},
            on_step=lambda *_: signal.raise_signal(signal.SIGTERM),
            max_steps=5,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and not result.finished
    assert result.model is not None
    validated = [entry["step"] for entry in result.metrics if "val/loss" in entry]
    assert result.step not in validated, "a stop waits for no validation"


def several_runs(work: Path, out: Path) -> list[list[dict[str, Any]]]:
    """On each rank: one that is refused for a fault of one rank, and for what differs between the
    ranks, and two that aren't.
    """
    rank = int(os.environ["RANK"])
    wrong = {"data.seed": rank, **({"optim.lr": -1} if rank else {})}
    with pytest.raises(retool.Refused, match=r"optim\.lr=-1\.0 \(rank 1") as refused:
        retool.sft(work / "model", str(work / "train.parquet"), output_dir=out, options=wrong)
    assert "data.seed: isn't the same on all ranks: 0 (rank 0" in str(refused.value)
    assert "optim.lr: isn't the same" not in str(refused.value), "no news twice"
    return [numbers(tune(work, out / f"run{number}").folder) for number in range(2)]


def test_on_two_ranks(work: Path, tmp_path: Path) -> None:
    for first, second in run_ranks(several_runs, 2, work, tmp_path):
        assert first == second and len(first) == 3


SCRIPT = """
import retool
result = retool.sft({model!r}, {data!r}, output_dir={out!r}, batch_size=4, max_steps=1,
                    quiet=True, options={{"data.num_workers": 2}})
print("once", result.step)
"""


@pytest.mark.slow
def test_a_script_needs_no_main_guard(work: Path, tmp_path: Path) -> None:
    rows = rows_of(work)
    script = tmp_path / "script.py"
    many = tmp_path / "many.parquet"
    pq.write_table(pa.Table.from_pylist(rows * 40), many)
    script.write_text(
        SCRIPT.format(model=str(work / "model"), data=str(many), out=str(tmp_path / "run"))
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "once 1\n"
