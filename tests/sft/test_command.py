"""`python -m retool.sft` as users start it: the published command, resuming, being asked to stop,
what goes wrong on the way.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.quickstart.model import END_OF_TEXT, TURN_END
from retool import optim
from retool.batch import Sample, pack
from retool.checkpoint import write
from retool.checkpoint.__main__ import main as checkpoints
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.metrics import read_jsonl
from retool.parallel.mesh import make_mesh
from retool.sft import step
from retool.sft.__main__ import main
from retool.sft.loss import loss_sum
from tests import warm

PUBLISHED = """data.train_files={work}/train.parquet data.val_files={work}/val.parquet
    data.max_length=16384 data.train_batch_size=16
    data.multiturn.enable=true data.multiturn.messages_key=messages data.multiturn.tools_key=tools
    data.micro_batch_size_per_gpu=2
    model.partial_pretrain={work}/model model.strategy=fsdp
    trainer.default_local_dir={out} trainer.project_name=wuxibin-multiturn-sft
    trainer.experiment_name=multiturn-sft-Qwen2.5-0.5B-Instruct
    trainer.logger=["console"] trainer.total_epochs=2
    ulysses_sequence_parallel_size=2 use_remove_padding=true"""
Start = Callable[[list[str]], subprocess.CompletedProcess[str]]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nnodes=1",
    "--nproc_per_node=2",
    "-m",
    "retool.sft",
]


def words(work: Path, out: Path, *more: str, **changed: Any) -> list[str]:
    """A small single-process run: 4 samples a step, 13 steps an epoch."""
    keys = {
        "data.train_files": work / "train.parquet",
        "model.partial_pretrain": work / "model",
        "trainer.default_local_dir": out,
        "data.train_batch_size": 4,
        "data.micro_batch_size_per_gpu": 2,
        "optim.lr": 1e-3,
        "data.num_workers": 0,
    }
    return (
        [f"{k}={v}" for k, v in keys.items()]
        + [f"{k.replace('__', '.')}={v}" for k, v in changed.items()]
        + list(more)
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a run's metrics.jsonl."""
    return [entry for entry in read_jsonl(folder / "metrics.jsonl") if "train/loss" in entry]


def from_a_shell(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Three new interpreters: fifteen seconds, most of which go to importing torch."""
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


@pytest.mark.parametrize(
    "start", [warm.run, pytest.param(from_a_shell, marks=pytest.mark.slow)], ids=["warm", "shell"]
)
def test_published_command(start: Start, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = start([*TORCHRUN, *PUBLISHED.format(work=work, out=out).split(), "optim.lr=1e-3"])
    assert done.returncode == 0, done.stderr[-3000:]
    entries = steps(out)
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6], (
        "52 rows: 3 full batches of 16 in each of 2 epochs"
    )
    assert entries[-1]["train/loss"] < entries[0]["train/loss"] - 1
    assert {
        "train/grad_norm",
        "train/lr",
        "train/global_tokens",
        "train/trained_tokens",
        "perf/tokens_per_second_per_gpu",
        "perf/max_memory_allocated_gb",
        "perf/max_memory_reserved_gb",
        "timing_s/step",
        "timing_s/data",
        "timing_s/forward_backward",
        "timing_s/optimizer",
    } <= set(entries[0])
    assert any("val/perplexity" in e for e in read_jsonl(out / "metrics.jsonl"))
    of_both = entries[0]["perf/tokens_per_second_per_gpu"] * entries[0]["timing_s/step"] * 2
    assert of_both == pytest.approx(entries[0]["train/global_tokens"])
    folder = out / "global_step_6"
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "6" and (
        out / "config.yaml"
    ).exists()
    expected = {
        f"{kind}_world_size_2_rank_{r}.pt"
        for kind in ("model", "optim", "extra_state")
        for r in (0, 1)
    } | {"fsdp_config.json", "data.pt", "huggingface"}
    assert expected <= {p.name for p in folder.iterdir()}
    check_export(folder, work)


def check_export(folder: Path, work: Path) -> None:
    """The export loads in transformers and computes what our decoder computes; `merge` makes the
    same bytes from the shards.
    """
    export = folder / "huggingface"
    assert {p.name for p in (work / "model").iterdir()} <= {p.name for p in export.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(export)
    ends = GenerationConfig.from_pretrained(export).eos_token_id
    assert ends == tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tokens = np.arange(5, 60, dtype=np.int32)
    with torch.no_grad():
        ours = load_pretrained(export, make_mesh())(
            pack([Sample(tokens, tokens > 0)]), lambda hidden, weight: hidden @ weight.t()
        )
        theirs = reference(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    merged = folder.parent / "merged"
    assert checkpoints(["merge", str(folder), "--out", str(merged)]) == 0
    ours_file = load_file(export / "model.safetensors")
    merged_file = load_file(merged / "model.safetensors")
    assert ours_file.keys() == merged_file.keys()
    assert all(torch.equal(ours_file[name], merged_file[name]) for name in ours_file)
    assert all(t.dtype == torch.bfloat16 for t in ours_file.values())


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((9, 10, 11), id="some"),
        pytest.param(range(1, 12), id="every", marks=pytest.mark.slow),
    ],
)
def test_stopping_after_any_step_changes_no_bit(
    work: Path, tmp_path: Path, stops: Sequence[int]
) -> None:
    """Twelve steps of a data set whose epoch has ten, stopped on the way: losses, norms and weights
    are bit-equal.
    """
    common = {"data__train_max_samples": 40, "trainer__total_training_steps": 12}
    whole = tmp_path / "whole"
    assert main(words(work, whole, trainer__save_freq=1, **common)) == 0
    reference = steps(whole)
    assert [e["train/epoch"] for e in reference] == [0] * 10 + [1] * 2
    final = torch.load(whole / "global_step_12" / "model_world_size_1_rank_0.pt", weights_only=True)
    for k in stops:  # the epoch ends at 10
        out = tmp_path / f"from{k}"
        again = {
            "trainer__resume_mode": "resume_path",
            "trainer__resume_from_path": whole / f"global_step_{k}",
            **common,
        }
        assert main(words(work, out, **again)) == 0
        found = [
            (e["step"], e["train/loss"], e["train/grad_norm"], e["train/lr"]) for e in steps(out)
        ]
        assert found == [
            (e["step"], e["train/loss"], e["train/grad_norm"], e["train/lr"]) for e in reference[k:]
        ]
        weights = torch.load(
            out / "global_step_12" / "model_world_size_1_rank_0.pt", weights_only=True
        )
        assert all(torch.equal(weights[name], final[name]) for name in final)


def test_fp16_goes_on_with_its_loss_scale_and_trains_as_fp32(work: Path, tmp_path: Path) -> None:
    small = {"data__train_batch_size": 1, "trainer__total_training_steps": 4}
    common = {"model__fsdp_config__param_dtype": "fp16", **small}
    assert main(words(work, tmp_path / "whole", trainer__save_freq=2, **common)) == 0
    again = {
        "trainer__resume_mode": "resume_path",
        "trainer__resume_from_path": tmp_path / "whole/global_step_2",
        **common,
    }
    assert main(words(work, tmp_path / "rest", **again)) == 0
    assert main(words(work, tmp_path / "fp32", **small)) == 0
    whole, rest, wide = (steps(tmp_path / name) for name in ("whole", "rest", "fp32"))
    assert [(e["train/loss"], e["train/grad_norm"]) for e in rest] == [
        (e["train/loss"], e["train/grad_norm"]) for e in whole[2:]
    ]
    assert whole[-1]["train/skipped_steps"] == 0
    assert [e["train/loss"] for e in whole] == pytest.approx(
        [e["train/loss"] for e in wide], rel=1e-3
    )
    assert [e["train/grad_norm"] for e in whole] == pytest.approx(
        [e["train/grad_norm"] for e in wide], rel=2e-2
    )
    saved = [
        torch.load(
            tmp_path / f"{run}/global_step_4/extra_state_world_size_1_rank_0.pt", weights_only=False
        )
        for run in ("whole", "rest")
    ]
    assert saved[0]["loss_scale"] == saved[1]["loss_scale"] == [2.0**16, 4.0]


def test_a_resumed_run_continues_its_metrics(
    work: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    factors = itertools.chain([float("nan")], itertools.repeat(1.0))
    monkeypatch.setattr(
        step, "loss_sum", lambda model, batch: loss_sum(model, batch) * next(factors)
    )
    assert main(words(work, out, trainer__save_freq=2, trainer__total_training_steps=3)) == 0
    assert main(words(work, out, trainer__total_training_steps=5)) == 0
    assert [(e["step"], e["train/skipped_steps"]) for e in steps(out)] == [
        (number, 1) for number in range(1, 6)
    ], "the first one's gradient isn't finite"
    *_, model, page = capfd.readouterr().out.splitlines()
    assert model.endswith(f"{out}/global_step_5/huggingface")
    assert page.endswith(f"python -m retool.report {out}")
    before = (out / "metrics.jsonl").read_bytes()
    assert main(words(work, out, trainer__total_training_steps=5)) == 0, "nothing left to do"
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_from_the_start_sets_the_one_before_aside(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "previous_1").mkdir(parents=True)
    (out / "mine.txt").write_text("not the run's")
    assert main(words(work, out, trainer__total_training_steps=3)) == 0
    saved = (out / "global_step_3" / "model_world_size_1_rank_0.pt").read_bytes()
    assert (
        main(words(work, out, trainer__total_training_steps=2, trainer__resume_mode="disable")) == 0
    )
    assert [e["step"] for e in steps(out)] == [1, 2] and [
        e["step"] for e in steps(out / "previous_2")
    ] == [1, 2, 3]
    assert (
        out / "previous_2" / "global_step_3" / "model_world_size_1_rank_0.pt"
    ).read_bytes() == saved
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml",
        "global_step_2",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
        "mine.txt",
        "previous_1",
        "previous_2",
    ]


def test_padding_and_micro_batches_change_nothing(work: Path, tmp_path: Path) -> None:
    losses = []
    for name, more in {
        "packed": {},
        "padded": {"use_remove_padding": "false", "data__max_length": 1024},
        "tokens": {"data__micro_batch_size_per_gpu": "null", "data__max_token_len_per_gpu": 700},
        "recompute": {"model__enable_gradient_checkpointing": "true"},
        "offload": {"model__enable_activation_offload": "true"},
    }.items():
        assert (
            main(
                words(
                    work,
                    tmp_path / name,
                    trainer__total_training_steps=3,
                    trainer__save_freq=-1,
                    **more,
                )
            )
            == 0
        )
        losses.append([e["train/loss"] for e in steps(tmp_path / name)])
    for found in losses[1:]:
        np.testing.assert_allclose(found, losses[0], rtol=1e-6)


SIGNALS = [
    pytest.param(signal.SIGTERM, [], id="TERM"),
    pytest.param(signal.SIGINT, [], id="INT"),
    pytest.param(
        signal.SIGUSR1,
        ["--signals-to-handle", "SIGTERM,SIGUSR1"],
        marks=pytest.mark.slow,
        id="USR1",
    ),
]


@pytest.mark.parametrize(("asked", "flags"), SIGNALS)
def test_asked_to_stop_under_torchrun(
    work: Path, tmp_path: Path, asked: signal.Signals, flags: list[str]
) -> None:
    """A signal to the launcher: the workers save within a step and leave nobody behind; another
    world size goes on from there.
    """
    out = tmp_path / "run"
    command = [
        *TORCHRUN[:3],
        *flags,
        *TORCHRUN[3:],
        *words(work, out, "trainer.total_training_steps=500"),
    ]
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    workers = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            workers = children_of(process.pid)
        if line.startswith("step 3/"):
            process.send_signal(asked)
    process.wait(timeout=60)
    text = "".join(lines)
    assert len(workers) == 2 and not any(alive(p) for p in workers)
    assert text.count("asked to stop at step") == 1 and "KeyboardInterrupt" not in text, text[
        -3000:
    ]
    stopped = int((out / "latest_checkpointed_iteration.txt").read_text())
    # A step takes milliseconds, and the signal goes by way of two processes of a busy machine
    assert 3 <= stopped <= 20 and steps(out)[-1]["step"] == stopped
    assert main(words(work, out, trainer__total_training_steps=stopped + 1)) == 0
    assert [e["step"] for e in steps(out)] == list(range(1, stopped + 2))


def test_workers_stop_when_their_launcher_dies(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    log = tmp_path / "log"
    with log.open("w") as file:
        process = warm.Popen(
            [*TORCHRUN, *words(work, out, "trainer.total_training_steps=500")],
            stdout=file,
            stderr=file,
        )
    wait_until(lambda: "step 2/" in log.read_text())
    children = children_of(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait(timeout=10)
    wait_until(lambda: not any(alive(p) for p in children))
    assert (out / "latest_checkpointed_iteration.txt").exists(), log.read_text()[-3000:]


def wait_until(true: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss is NaN, whatever the model and the data."""
    monkeypatch.setattr(
        step, "loss_sum", lambda model, batch: loss_sum(model, batch) * float("nan")
    )


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 3), ("fp16", 4)])
def test_gradients_that_are_no_numbers_stop_the_run_and_say_so(
    work: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_gradient: None,
    dtype: str,
    most: int,
) -> None:
    monkeypatch.setattr(optim, "FIRST_LOSS_SCALE_LOG2", 1)
    out = tmp_path / "run"
    assert (
        main(words(work, out, model__fsdp_config__param_dtype=dtype, data__train_batch_size=1)) == 1
    )
    printed = capfd.readouterr()
    assert f"{most} steps in a row had a non-finite gradient norm" in printed.err
    assert not list(out.glob("global_step_*")), "a run that was thrown away has no checkpoint"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/skipped_steps"] for r in rows] == [*range(1, most + 1)] and rows[0][
        "train/grad_norm"
    ] is None
    command = printed.err.strip().partition("python -m retool.checkpoint ")[2]
    assert checkpoints(shlex.split(command)) == 0, "the advice is a command that works"


def test_a_run_that_trained_nothing_ends_with_an_error_and_no_export(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_gradient: None
) -> None:
    """Fewer steps than may be skipped in a row."""
    out = tmp_path / "run"
    assert main(words(work, out, trainer__total_training_steps=2)) == 1
    assert (
        "nothing was trained: all 2 updates had a gradient that isn't finite"
        in capfd.readouterr().err
    )
    assert not list(out.glob("global_step_*"))


def test_weights_that_became_infinite_are_not_saved(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The gradient of the first step is finite, its update isn't: the checkpoint before, which is
    good, must stay the newest.
    """
    out = tmp_path / "run"
    assert main(words(work, out, trainer__total_training_steps=1, optim__lr=1e38)) == 1
    assert "step 1 isn't saved: NaN or infinite values in " in capfd.readouterr().err
    assert not list(out.glob("global_step_*"))


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_save_that_fails_ends_the_run_with_1_only_if_it_is_the_last(
    work: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
) -> None:
    write_archive = write.write_archive

    def on_a_full_disk(path: Path, content: Any) -> dict[str, Any]:
        if f"global_step_{fails}." in str(path):
            raise OSError(28, "No space left on device")
        return write_archive(path, content)

    monkeypatch.setattr(write, "write_archive", on_a_full_disk)
    out = tmp_path / "run"
    few = {"data__train_batch_size": 1, "trainer__total_training_steps": 3}
    status = main(words(work, out, trainer__save_freq=1, **few))
    (told,) = caplog.messages
    assert f"global_step_{fails} was not saved: rank 0: OSError: [Errno 28] No space left" in told
    before = f"global_step_{fails - 1} stays the newest" if fails > 1 else "no checkpoint before it"
    assert told.endswith(f"{before}.")
    last = "step 3 was trained, but its checkpoint could not be saved" in capfd.readouterr().err
    assert (status, last) == (int(fails == 3), fails == 3)
    saved = sorted(folder.name for folder in out.glob("global_step_*"))
    assert saved == [f"global_step_{step}" for step in (1, 2, 3) if step != fails]
    assert (out / "latest_checkpointed_iteration.txt").read_text() == saved[-1][-1]
    assert [e["step"] for e in steps(out)] == [1, 2, 3]


def test_nan_in_the_weights_is_refused_before_the_first_step(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "model"
    shutil.copytree(work / "model", bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert main(words(work, tmp_path / "run", model__partial_pretrain=bad)) == 1
    assert "NaN or infinite values in model.norm.weight" in capfd.readouterr().err
    assert (
        not list((tmp_path / "run").glob("global_step_*"))
        and not (tmp_path / "run/metrics.jsonl").exists()
    )
