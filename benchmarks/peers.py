"""SFT of retool, TRL and verl on the same GPUs in one go, in one table.

    python benchmarks/peers.py OUT [--trl WHERE] [--verl WHERE] [--only retool,trl,verl] [--gpus 2]
    python benchmarks/peers.py OUT --shape tiny --scale 256 --only retool,trl

WHERE is the Python of an environment that has the peer, or folders for PYTHONPATH; the two don't go
into one environment (`pip install trl==1.16.0 liger-kernel flash-attn`; `verl==0.9.1 liger-kernel
flash-attn 'transformers<5.11'`). Left out, this Python is asked. A peer that isn't there, or fails, is
a row that says so. `sft.py` says what the workloads are; each row is a job of its own with random
weights of `--shape`, and its line is in OUT as soon as it has ended, so `--only` can spread the
systems (verl 4 minutes, TRL 3, ours 3) over several calls; the table is of all that OUT has (`--only
""`: just that). On a CPU it only shows whether everything would run: the shapes differ there, and verl
needs NCCL.

`--bound SCRIPT`: a lean single-GPU loop without sharding or optimizer, which prints lines such as
`RESULT bound cudnn 1 x 16384: 74218 tok/s/GPU, … peak 21.6 GiB`. Part `bound` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rl_step import cause, write_model
from table import show, some_of

HERE = Path(__file__).resolve().parent
OURS = "full,full-recompute,full-sp1,mixed,mixed-recompute,4096"
BOUND = re.compile(
    r"^RESULT bound (?P<kernel>\S+) (?P<documents>\d+) x (?P<length>\d+): (?P<rate>\d+) tok/s/GPU"
)
# Our row → documents and length of the bound's
SAME = {
    "full-sp1": ("1", "16384"),
    "4096": ("8", "4096"),
}
TUNED = (
    "model.use_liger=True",
    "model.use_fused_kernels=True",
    "engine.ulysses_sequence_parallel_size=1",
    "data.use_dynamic_bsz=True",
)
VOCABULARY = 151_936  # of `write_model`'s


@dataclass(frozen=True)
class Job:
    """A peer's row: its trainer's settings."""

    peer: str
    title: str
    workload: str
    batch: int = 1  # TRL's, documents of a micro-batch
    keys: tuple[str, ...] = ()  # verl's


JOBS = {
    "verl-published": Job(
        "verl",
        "verl, published settings (sp 2, recomputation)",
        "full",
        keys=(
            "engine.ulysses_sequence_parallel_size=2",
            "data.use_dynamic_bsz=False",
            "data.micro_batch_size_per_gpu=2",
        ),
    ),
    "verl-full": Job(
        "verl",
        "verl, tuned (sp 1, liger, fused kernels, no recomputation)",
        "full",
        keys=(
            *TUNED,
            "data.max_token_len_per_gpu=16384",
            "model.enable_gradient_checkpointing=False",
        ),
    ),
    "verl-mixed": Job(
        "verl",
        "verl, tuned (sp 1, liger, fused kernels)",
        "mixed",
        keys=(*TUNED, "data.max_token_len_per_gpu=32768"),
    ),
    "trl-full": Job("trl", "TRL, FSDP2, liger, padding-free, no recomputation", "full"),
    "trl-mixed": Job("trl", "TRL, as above", "mixed", batch=4),
}


@dataclass(frozen=True)
class Line:
    """A row of the table; `name`: of our rows in `sft.py`, or of JOBS."""

    workload: str
    system: str
    rate: float
    peak: float
    name: str


# --- running ---


def torchrun(python: str, gpus: int) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]


def run(command: list[str], path: str, log: Path, seconds: float) -> str:
    """Empty, or why it failed."""
    environment = {**os.environ, "PYTHONPATH": path, "HYDRA_FULL_ERROR": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return f"exit status {status}: {cause(log.read_text(errors='replace'))}" if status else ""


def run_ours(args: Namespace) -> str:
    sizes = ["--shape", args.shape, "--scale", str(args.scale)]
    rows = ["--rows", OURS, "--json", str(args.out / "retool.json")]
    path = os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))
    command = [*torchrun(sys.executable, args.gpus), str(HERE / "sft.py"), *rows, *sizes]
    return run(command, path, args.out / "retool.log", 2 * args.timeout)


def run_peer(name: str, job: Job, args: Namespace) -> str:
    """A peer's job in its own Python; what it measured is in OUT."""
    where = args.trl if job.peer == "trl" else args.verl
    own = where.is_file() if where else False
    model = args.out / "model"
    if not model.exists():
        write_model(model, args.shape)
    out = args.out / f"{name}.json"
    out.unlink(missing_ok=True)
    options: dict[str, Any] = {
        "workload": job.workload,
        "scale": args.scale,
        "vocabulary": VOCABULARY,
        "model": str(model),
        "batch": job.batch,
        "keys": [*job.keys, *args.verl_keys.split()],
        "out": str(out),
    }
    here = os.environ.get("PYTHONPATH", "")
    path = "" if own else os.pathsep.join(filter(None, (str(where or ""), here)))
    python = str(where) if own else sys.executable
    words = [str(HERE / "peer_sft.py"), job.peer, json.dumps(options)]
    why = run([*torchrun(python, args.gpus), *words], path, args.out / f"{name}.log", args.timeout)
    return "" if out.exists() else why or "it made too few steps"


def run_parts(args: Namespace) -> None:
    """Each part's jobs, one after the other; what fails is said and costs no other."""
    parts = args.only.split(",")
    failures = {}
    if "retool" in parts:
        failures["retool"] = run_ours(args)
    for name, job in JOBS.items():
        if job.peer in parts:
            failures[name] = run_peer(name, job, args)
    if "bound" in parts:
        command = [sys.executable, str(args.bound)]
        log = args.out / "bound.log"
        failures["bound"] = run(command, os.environ.get("PYTHONPATH", ""), log, args.timeout)
    for name, why in failures.items():
        if why:
            print(f"{name}: {why} (see {args.out / name}.log)", flush=True)


# --- the tables ---


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def ours_of(text: str) -> list[Line]:
    """The lines that `sft.py --json` leaves."""
    lines = json.loads(text)["lines"] if text else []
    return [
        Line(
            line["name"].split("-")[0],
            f"**retool**, {line['row']}",
            line["tokens_per_second_per_gpu"],
            line["peak_gib"],
            line["name"],
        )
        for line in lines
        if "failed" not in line
    ]


def peers_of(out: Path) -> list[Line]:
    """What the peers' jobs left."""
    lines = []
    for name, job in JOBS.items():
        if text := read(out / f"{name}.json"):
            found = json.loads(text)
            rate = found["tokens_per_second_per_gpu"]
            lines.append(Line(job.workload, job.title, rate, found["peak_gib"], name))
    return lines


def bounds_of(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """(documents, length) → tokens per second of each attention kernel."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for m in map(BOUND.match, text.splitlines()):
        if m:
            found.setdefault((m["documents"], m["length"]), {})[m["kernel"]] = float(m["rate"])
    return found


def show_all(out: Path) -> None:
    """Every system against the best peer of its workload, and ours against the bound."""
    ours = ours_of(read(out / "retool.json"))
    lines = peers_of(out)
    rows = []
    for workload in ("full", "mixed"):
        of_peers = [line for line in lines if line.workload == workload]
        best = max((line.rate for line in of_peers), default=float("nan"))
        for line in (*of_peers, *(line for line in ours if line.workload == workload)):
            against = f"{line.rate / best:.2f}×"
            cells = [f"{workload}: {line.system}", f"{line.rate:,.0f}", f"{line.peak:.1f}", against]
            rows.append(cells)
    show("Tokens per second and GPU", ["", "tok/s/GPU", "peak GiB", "against the best peer"], rows)
    bounds = bounds_of(read(out / "bound.log"))
    named = {line.name: line for line in ours}
    shares = []
    for name, place in SAME.items():
        for kernel, rate in bounds.get(place, {}).items():
            if line := named.get(name):
                share = f"{line.rate / rate:.2f}"
                shares.append([line.system, f"{line.rate:,.0f}", f"{kernel} {rate:,.0f}", share])
    if shares:
        columns = ["", "tok/s/GPU", "bound", "share"]
        show("Share of the single-GPU bound", columns, shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("retool", "trl", "verl", "bound")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", type=some_of(parts), default="retool,trl,verl")
    parser.add_argument("--trl", type=Path, help="a Python, or folders for PYTHONPATH")
    parser.add_argument("--verl", type=Path, help="a Python, or folders for PYTHONPATH")
    parser.add_argument("--verl-keys", default="", help="more keys of verl's, as key=value …")
    parser.add_argument("--bound", type=Path, help="the lean loop's script")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=("tiny", "qwen2.5-0.5b"))
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--timeout", type=float, default=240, help="seconds of a job")
    args = parser.parse_args()
    if "bound" in args.only.split(",") and args.bound is None:
        parser.error("--only bound needs the script: --bound SCRIPT")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    run_parts(args)
    show_all(args.out)


if __name__ == "__main__":
    main()
