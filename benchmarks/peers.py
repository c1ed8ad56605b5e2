"""retool beside TRL, verl and a lean single-GPU loop, on the same GPUs in one go, in one table.

    python benchmarks/peers.py FOLDER WHEELS TOKENIZER OUT [--only ours,peers,bound] \\
        [--shape qwen2.5-0.5b] [--scale 1] [--gpus 2]

FOLDER has the peers' scripts, `run.sh WHEELS TOKENIZER LOGS` (TRL and verl on 2 GPUs) and
`single_gpu_bound.py` (no sharding, no optimizer: what the kernels give), which print lines that
begin with RESULT. Each part's lines are kept in OUT as soon as it has ended, so `--only` can spread
the parts (peers 8 minutes, ours 3, bound 1) over several calls; the table is of all that OUT has
(`--only ""`: just that). `benchmarks/sft.py` says what the workloads are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from table import show

HERE = Path(__file__).resolve().parent
OURS = "full,full-recompute,full-sp1,mixed,mixed-recompute,4096"
NUMBERS = r": (?P<rate>\d+) tok/s/GPU,.* peak (?P<peak>[\d.]+) GiB"
PEER = re.compile(r"^RESULT (?P<system>.+) (?P<workload>full|mixed)" + NUMBERS)
BOUND = re.compile(r"^RESULT bound (?P<kernel>\S+) (?P<documents>\d+) x (?P<length>\d+)" + NUMBERS)
# Our row → documents and length of the bound's
SAME = {
    "full-sp1": ("1", "16384"),
    "4096": ("8", "4096"),
}


@dataclass(frozen=True)
class Line:
    """A row of the table; `name`: of our rows in `benchmarks/sft.py`."""

    workload: str
    system: str
    rate: float
    peak: float
    name: str = ""


def peers_of(text: str) -> list[Line]:
    """What the peers' scripts print."""
    return [
        Line(m["workload"], m["system"], float(m["rate"]), float(m["peak"]))
        for m in map(PEER.match, text.splitlines())
        if m
    ]


def bounds_of(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """(documents, length) → tokens per second of each attention kernel."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for m in map(BOUND.match, text.splitlines()):
        if m:
            found.setdefault((m["documents"], m["length"]), {})[m["kernel"]] = float(m["rate"])
    return found


def ours_of(text: str) -> list[Line]:
    """The lines that `benchmarks/sft.py --json` leaves."""
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


def run(part: str, args: argparse.Namespace) -> None:
    """Run one part; its lines go to OUT."""
    log = args.out / f"{part}.log"
    ours = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={args.gpus}",
        str(HERE / "sft.py"),
        "--rows",
        OURS,
        "--shape",
        args.shape,
        "--scale",
        str(args.scale),
        "--json",
        str(args.out / "ours.json"),
    ]
    command = {
        "ours": [sys.executable, *ours],
        "peers": [
            "bash",
            str(args.folder / "run.sh"),
            str(args.wheels),
            str(args.tokenizer),
            str(args.out / "peer-logs"),
        ],
        "bound": [sys.executable, str(args.folder / "single_gpu_bound.py")],
    }[part]
    ours_first = os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))
    # The peers bring packages of their own
    environment = {
        **os.environ,
        "PYTHONPATH": "" if part == "peers" else ours_first,
    }
    with log.open("w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status:
        print(f"{part}: exit status {status}, see {log}", flush=True)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("folder", "wheels", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", default="ours,peers,bound")
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in filter(None, args.only.split(",")):
        run(part, args)
    ours = ours_of(read(args.out / "ours.json"))
    lines = peers_of(read(args.out / "peers.log"))
    rows = []
    for workload in ("full", "mixed"):
        best = max((line.rate for line in lines if line.workload == workload), default=float("nan"))
        for line in (
            *(x for x in lines if x.workload == workload),
            *(x for x in ours if x.workload == workload),
        ):
            rows.append(
                [
                    f"{workload}: {line.system}",
                    f"{line.rate:,.0f}",
                    f"{line.peak:.1f}",
                    f"{line.rate / best:.2f}×",
                ]
            )
    show("Tokens per second and GPU", ["", "tok/s/GPU", "peak GiB", "against the best peer"], rows)
    bounds = bounds_of(read(args.out / "bound.log"))
    named = {line.name: line for line in ours}
    shares = [
        [
            f"{named[name].system}",
            f"{named[name].rate:,.0f}",
            f"{kernel} {rate:,.0f}",
            f"{named[name].rate / rate:.2f}",
        ]
        for name, place in SAME.items()
        if name in named
        for kernel, rate in bounds.get(place, {}).items()
    ]
    show("Share of the single-GPU bound", ["", "tok/s/GPU", "bound", "share"], shares)


if __name__ == "__main__":
    main()
