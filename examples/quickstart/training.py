"""Runs the SFT command on two processes and shows its loss falling.

`run` is for any command that logs steps.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retool.metrics import read_jsonl

STEP = re.compile(r"^step (\d+)/(\d+) ")
LINES = 12  # printed over a run, besides the progress bar of a terminal
BAR = 40  # characters
COLUMNS = (
    TextColumn("  training"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)

# What the command logged: "step", "steps" (of the whole run) and its metrics
Step = dict[str, float]


def sft_words(
    train: Path, held_out: Path, model: Path, run: Path, steps: int, batch: int, save_every: int
) -> list[str]:
    """The published command line with the demo's paths, for two CPU processes that share every
    sequence.
    """
    return [
        "--nnodes=1",
        "--nproc_per_node=2",
        "-m",
        "retool.sft",
        f"data.train_files={train}",
        f"data.val_files={held_out}",
        "data.max_length=256",
        f"data.train_batch_size={batch}",
        "data.multiturn.enable=true",
        "data.multiturn.messages_key=messages",
        "data.multiturn.tools_key=tools",
        f"data.micro_batch_size_per_gpu={batch}",
        f"data.cache_dir={run.parent / 'cache'}",
        f"model.partial_pretrain={model}",
        "model.strategy=fsdp",
        "optim.lr=1e-3",
        f"trainer.default_local_dir={run}",
        "trainer.project_name=demo",
        "trainer.experiment_name=shop",
        'trainer.logger=["console"]',
        f"trainer.total_training_steps={steps}",
        f"trainer.save_freq={save_every}",
        "trainer.device=cpu",
        "ulysses_sequence_parallel_size=2",
        "use_remove_padding=true",
    ]


def shown(words: Sequence[str]) -> str:
    """A command line to copy, a key a line."""
    first = words.index("-m") + 2
    return " \\\n    ".join(
        [shlex.join(["torchrun", *words[:first]]), *(shlex.quote(word) for word in words[first:])]
    )


def run(
    words: Sequence[str], log: Path, console: Console, line: Callable[[Sequence[Step]], str | None]
) -> list[Step]:
    """Run the command, everything it says kept in `log`; what its metrics.jsonl has. After each
    entry `line` is shown all so far, and what it returns is printed. Raises ValueError with the
    command's words if it fails.
    """
    # A free port instead of torchrun's usual one: another run on this machine mustn't matter.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    folder = next(
        word.partition("=")[2] for word in words if word.startswith("trainer.default_local_dir=")
    )
    steps: list[Step] = []
    with (
        log.open("w") as file,
        Progress(
            *COLUMNS, console=console, transient=True, disable=not console.is_terminal
        ) as progress,
    ):
        task = progress.add_task("", total=None)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                file.write(text)
                if STEP.match(text) is None:
                    continue
                for step in logged(Path(folder), text)[len(steps) :]:
                    steps.append(step)
                    progress.update(task, completed=step["step"], total=step["steps"])
                    if (said := line(steps)) is not None:
                        console.print(said)
    if process.returncode:
        said = [text for text in log.read_text().splitlines() if not STEP.match(text)]
        raise ValueError(
            f"training failed with exit status {process.returncode}. All it said is in {log}; first:\n"
            + "\n".join(said[:40])
        )
    return steps


def logged(folder: Path, line: str) -> list[Step]:
    """What the run has logged so far, as numbers; `line` is the console's about a step, which says
    how many there will be.
    """
    found = STEP.match(line)
    assert found is not None
    numbers = (
        {name: value for name, value in entry.items() if value is not None}
        for entry in read_jsonl(folder / "metrics.jsonl")
    )
    return [{"steps": float(found[2]), **entry} for entry in numbers]


def loss_line(steps: Sequence[Step]) -> str | None:
    """After the first step and then every so many, the mean loss since the last line, as a number
    and a bar.
    """
    if "train/loss" not in steps[-1]:
        return None
    losses = losses_of(steps)
    total = int(steps[-1]["steps"])
    every = max(1, total // LINES)
    if len(losses) != 1 and len(losses) % every:
        return None
    mean = sum(losses[-every:]) / len(losses[-every:])
    return f"  step {len(losses):4d}/{total}  loss {mean:6.3f}  {bar(mean / losses[0])}"


def losses_of(steps: Sequence[Step]) -> list[float]:
    """The loss of each training step."""
    return [step["train/loss"] for step in steps if "train/loss" in step]


def bar(share: float) -> str:
    """`share` of the full width, coloured."""
    return f"[cyan]{'█' * round(BAR * min(1.0, max(0.0, share)))}[/cyan]"
