"""The two published commands as users start them, with random weights: seconds by part.

    python benchmarks/published.py --dapo QUESTIONS.parquet VALIDATION.parquet \\
        --sft TRAIN.parquet TEST.parquet --tokenizer FOLDER [--gpus 2] [--json out.json]
    python benchmarks/published.py --dapo … --shape tiny --questions 2 --samples 2 --response 16

`examples/dapo_qwen2_5.sh` (sp 2, 8 turns, responses of up to 16,384 tokens, offloading, the code
interpreter) with a smaller batch: `--questions` of `--samples` answers are one optimizer step.
`examples/sft_qwen2_5.sh` as it is; `--sft-steps` ends it early. Without `--model` the weights are
random ones of `--shape`, with the tokenizer of `--tokenizer` or a small one. Such a model hardly
ever ends an answer or calls a tool: nearly all answers are as long as they may be, and the
interpreter waits. The reward is one that gives every group of answers a signal.

*sampling* is without the tools and judges that it waited for; *other* is what no part counts. The
last step validates and saves, which isn't part of the step. A command that takes longer than
`--timeout` is asked to stop, and has `--stopping` seconds more; the table has the steps that it did.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rl_step import cause, write_model
from table import arguments, attempt, hardware, head, row, save

from retool.metrics import read_jsonl

HERE = Path(__file__).resolve().parent
ARR = "actor_rollout_ref."
LOOK_S = 0.2  # seconds between two looks at a run's metrics
GRACE_S = 10.0  # for torchrun to end the ranks that haven't ended in time
# The column and the metric's name; "gen" holds the next two
PARTS = {
    "weights": "sync_weights",
    "sampling": "gen",
    "tools": "tools",
    "reward": "reward",
    "old log-probs": "old_log_prob",
    "update": "update_actor",
}
Line = dict[str, Any]


def dapo_keys(args: Namespace) -> list[str]:
    """What is smaller than published, and the reward."""
    return [
        f"data.train_batch_size={args.questions}",
        f"data.max_response_length={args.response}",
        f"{ARR}actor.ppo_mini_batch_size={args.questions}",
        f"{ARR}rollout.n={args.samples}",
        f"{ARR}rollout.val_kwargs.n=1",
        f"data.val_max_samples={args.questions}",
        f"custom_reward_function.path={HERE / 'rl_step.py'}",
        "custom_reward_function.name=compute_score",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.total_training_steps={args.steps}",
    ]


def sft_keys(args: Namespace) -> list[str]:
    return [f"trainer.total_training_steps={args.sft_steps}"] if args.sft_steps else []


def run(args: Namespace, name: str, files: list[Path], keys: list[str], folder: Path) -> Line:
    """One of the scripts in `examples/`, from its start to its end: its steps, the seconds of the
    whole and those before its first step (NaN where there was none). What was cut short has the
    steps that it came to.
    """
    out = folder / name
    environment = {
        **os.environ,
        "TRAIN": str(files[0].resolve()),
        "EVAL": str(files[1].resolve()),
        "MODEL_PATH": str(args.model),
        "SAVE_PATH": str(out),
        "GPUS": str(args.gpus),
        "SP": str(args.gpus),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(args.stopping),
        # torchrun of this Python; the reward finds what it imports
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")))
        ),
    }
    always = [f"trainer.device={args.device}", "trainer.resume_mode=disable"]
    script = HERE.parent / "examples" / f"{name}_qwen2_5.sh"
    command = ["bash", str(script), *keys, *always, *args.overrides.split()]
    log = folder / f"{name}.log"
    metrics = out / "metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        whole, starting = watch(process, metrics, args.timeout, args.stopping)
    stopped = whole > args.timeout
    if process.returncode and not stopped:
        said = cause(log.read_text(errors="replace"))
        raise RuntimeError(f"exit status {process.returncode}: {said}")
    return {
        "name": name,
        "whole": whole,
        "starting": starting,
        "note": f"stopped after {args.timeout:.0f} s" if stopped else "",
        "entries": read_entries(metrics),
    }


def watch(
    process: subprocess.Popen[Any], metrics: Path, limit: float, stopping: float
) -> tuple[float, float]:
    """Wait for a run to end; after `limit` seconds it is asked to, and after `stopping` more it is killed.

    Returns (seconds until it ended, those before its first step), the second within LOOK_S, and NaN
    if no step was written.
    """
    began = time.monotonic()
    starting = float("nan")
    asked = False
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_S)
        passed = time.monotonic() - began
        if math.isnan(starting):
            entries = read_entries(metrics)
            if any("timing_s/step" in entry for entry in entries):
                starting = passed - in_steps(entries)
        if passed > limit and not asked:
            process.send_signal(signal.SIGTERM)  # torchrun passes it on, and waits for its ranks
            asked = True
        if passed > limit + stopping + GRACE_S:
            process.kill()
    return time.monotonic() - began, starting


def read_entries(metrics: Path) -> list[dict[str, Any]]:
    """What a run has written so far."""
    return read_jsonl(metrics) if metrics.exists() else []


# --- the tables ---


def seconds_of(line: Line, key: str) -> float:
    return sum(entry.get(f"timing_s/{key}") or 0.0 for entry in line["entries"])


def in_steps(entries: list[dict[str, Any]]) -> float:
    """Seconds of steps, validations and saves."""
    return sum(
        entry.get(f"timing_s/{key}") or 0.0
        for entry in entries
        for key in ("step", "testing", "save_checkpoint")
    )


def around(line: Line) -> str:
    """What isn't in a step, in validation or in a save."""
    ending = line["whole"] - line["starting"] - in_steps(line["entries"])
    return f"starting {line['starting']:.1f}, ending {ending:.1f}, the whole command {line['whole']:.1f}"


def show_dapo(line: Line, title: str) -> None:
    """A column a step, a row a part."""
    steps = [entry for entry in line["entries"] if "timing_s/step" in entry]
    head(
        f"{title}: DAPO {line['note']}".rstrip(), ["seconds", *(f"step {e['step']}" for e in steps)]
    )
    parts = {
        name: [entry.get(f"timing_s/{key}", 0.0) for entry in steps] for name, key in PARTS.items()
    }
    waited = zip(parts["sampling"], parts["tools"], parts["reward"], strict=True)
    parts["sampling"] = [seconds - tools - judges for seconds, tools, judges in waited]
    whole = [entry["timing_s/step"] for entry in steps]
    known = [sum(values) for values in zip(*(parts[name] for name in PARTS), strict=True)]
    parts["other"] = [step - counted for step, counted in zip(whole, known, strict=True)]
    parts["the step"] = whole
    parts["validation"] = [entry.get("timing_s/testing", 0.0) for entry in steps]
    parts["save"] = [entry.get("timing_s/save_checkpoint", 0.0) for entry in steps]
    for name, values in parts.items():
        row([name, *(f"{value:.2f}" for value in values)])
    for name, key, form in FIGURES:
        row([name, *(f"{entry.get(key) or 0.0:{form}}" for entry in steps)])
    print(around(line))


def show_sft(line: Line, title: str) -> None:
    """One column."""
    steps = [entry for entry in line["entries"] if "timing_s/step" in entry]
    head(f"{title}: SFT {line['note']}".rstrip(), ["", f"{len(steps)} steps"])
    late = steps[len(steps) // 10 :]
    for name, key in (
        ("seconds a step", "timing_s/step"),
        ("tokens/s/GPU", "perf/tokens_per_second_per_gpu"),
    ):
        values = [entry[key] for entry in late]
        middle = statistics.median(values)
        row([f"{name}, {SETTLED}", f"{middle:,.3f} ({min(values):,.3f} … {max(values):,.3f})"])
    ends = (steps[0]["train/loss"], steps[-1]["train/loss"])
    row(["loss, first and last step", " · ".join(f"{loss:.3f}" for loss in ends)])
    held_out = [entry["val/loss"] for entry in line["entries"] if "val/loss" in entry]
    row(["validation loss", " · ".join(f"{loss:.3f}" for loss in held_out)])
    row(["peak GiB", f"{steps[-1]['perf/max_memory_allocated_gb']:.1f}"])
    row(["seconds of all steps", f"{seconds_of(line, 'step'):.1f}"])
    row(["seconds before the first", f"{line['starting']:.1f}"])
    row(["the whole command", f"{line['whole']:.1f}"])


FIGURES = (
    ("answers' tokens, mean", "response_length/mean", ",.0f"),
    ("sampled tokens/s", "perf/rollout_tokens_per_second", ",.0f"),
    ("tool calls", "tool/calls", ",.0f"),
    ("sampler and trainer apart, nats", "training/rollout_logp_diff_mean", ".1e"),
    ("peak GiB", "perf/max_memory_allocated_gb", ".1f"),
)
SETTLED = "after the first tenth"
TABLES = {"dapo": show_dapo, "sft": show_sft}


def main() -> None:
    parser = arguments(__doc__)
    files: dict[str, Any] = {"type": Path, "nargs": 2, "metavar": ("TRAIN", "VALIDATION")}
    parser.add_argument("--dapo", help="run DAPO on these questions", **files)
    parser.add_argument("--sft", help="run SFT on these conversations", **files)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; else one is made")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=("tiny", "qwen2.5-0.5b"))
    parser.add_argument("--tokenizer", type=Path, help="a folder that has one; else a small one")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--questions", type=int, default=4, help="of a step of DAPO")
    parser.add_argument("--samples", type=int, default=16, help="of each question")
    parser.add_argument("--response", type=int, default=16_384, help="tokens of an answer at most")
    parser.add_argument("--steps", type=int, default=2, help="of DAPO")
    parser.add_argument("--sft-steps", type=int, help="of SFT; else both epochs")
    parser.add_argument("--overrides", default="", help="more keys, as key=value …")
    parser.add_argument("--timeout", type=float, default=900, help="seconds of a command")
    parser.add_argument(
        "--stopping", type=float, default=20, help="more, for a command that is asked to stop"
    )
    parser.add_argument("--logs", type=Path, help="keep the commands' output and runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.logs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if args.model is None:
            args.model = folder / "model"
            write_model(args.model, args.shape, args.tokenizer)
        device = torch.device(args.device)
        title = f"{args.gpus}× {hardware(device)}"
        lines = list[Line]()
        for name, keys in (("dapo", dapo_keys(args)), ("sft", sft_keys(args))):
            chosen = getattr(args, name)
            if chosen is None:
                continue
            found = attempt(partial(run, args, name, chosen, keys, folder))
            lines.append({"name": name, **found})
            save(args.json, device, lines)
            if "failed" in found or not found["entries"]:
                print(f"{name}: {found.get('failed') or found['note'] or 'no step'}")
            else:
                TABLES[name](found, title)


if __name__ == "__main__":
    main()
