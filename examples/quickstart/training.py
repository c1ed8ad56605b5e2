"""Runs the SFT command on two processes and shows its loss falling."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STEP = re.compile(r"^step=(\d+)/(\d+) .*?train/loss=([-+.\deE]+)")
LINES = 12  # printed over a run, besides the progress bar of a terminal
BAR = 40  # characters
COLUMNS = (
    TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}  left"), TimeRemainingColumn()
)  # fmt: skip


def sft_words(train: Path, held_out: Path, model: Path, run: Path, steps: int, batch: int) -> list[str]:
    """The published command line with the demo's paths, for two CPU processes that share every sequence."""
    return [
        "--nnodes=1", "--nproc_per_node=2", "-m", "retool.sft",
        f"data.train_files={train}", f"data.val_files={held_out}", "data.max_length=256", f"data.train_batch_size={batch}",
        "data.multiturn.enable=true", "data.multiturn.messages_key=messages", "data.multiturn.tools_key=tools",
        f"data.micro_batch_size_per_gpu={batch}", f"data.cache_dir={run.parent / 'cache'}",
        f"model.partial_pretrain={model}", "model.strategy=fsdp", "optim.lr=1e-3",
        f"trainer.default_local_dir={run}", "trainer.project_name=demo", "trainer.experiment_name=shop",
        'trainer.logger=["console"]', f"trainer.total_training_steps={steps}", "trainer.device=cpu",
        "ulysses_sequence_parallel_size=2", "use_remove_padding=true",
    ]  # fmt: skip


def shown(words: Sequence[str]) -> str:
    """A command line to copy, a key a line."""
    first = words.index("retool.sft") + 1
    return " \\\n    ".join([shlex.join(["torchrun", *words[:first]]), *(shlex.quote(word) for word in words[first:])])


def run_sft(words: Sequence[str], log: Path, console: Console) -> list[float]:
    """Run the command, everything it says kept in `log`; the loss of each step. Raises ValueError with its last words if it fails."""
    # A free port instead of torchrun's usual one: another run on this machine mustn't matter.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    losses: list[float] = []
    with log.open("w") as file, Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None, loss="")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if step := STEP.match(line):
                    losses.append(float(step[3]))
                    progress.update(task, completed=int(step[1]), total=int(step[2]), description="training", loss=f"loss {losses[-1]:.3f}")
                    _print_line(console, losses, int(step[2]))
    if process.returncode:
        said = [line for line in log.read_text().splitlines() if not STEP.match(line)]
        raise ValueError(f"training failed with exit status {process.returncode}. All it said is in {log}; first:\n" + "\n".join(said[:40]))
    return losses


def _print_line(console: Console, losses: Sequence[float], total: int) -> None:
    """After the first step and then every so many, the mean loss since the last line, as a number and a bar."""
    every = max(1, total // LINES)
    if len(losses) == 1 or len(losses) % every == 0:
        mean = sum(losses[-every:]) / len(losses[-every:])
        console.print(f"  step {len(losses):4d}/{total}  loss {mean:6.3f}  [cyan]{'█' * round(BAR * min(1.0, mean / losses[0]))}[/cyan]")
