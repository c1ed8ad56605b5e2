"""A run on several machines, as its user starts it: torchrun on each of them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.parallel.meeting import OWN_STORES
from tests import warm
from tests.hosts.network import Host

PORT = 29500


@dataclass(frozen=True)
class Ended:
    """What a machine's torchrun ended with and said; `seconds` since the start."""

    status: int
    text: str
    seconds: float


def start(host: Host, options: Sequence[str], words: Sequence[str | Path], log: Path) -> warm.Popen:
    """torchrun with `options` on one machine; what it says goes to `log`."""
    environment = {**os.environ, OWN_STORES: "1", "XDG_CACHE_HOME": str(host.disk / "cache")}
    with log.open("ab") as said:
        command = ["-m", "torch.distributed.run", *options, *words]
        return host.start(command, stdout=said, stderr=subprocess.STDOUT, env=environment)


def fixed(hosts: Sequence[Host], each: int) -> list[list[str]]:
    """torchrun's options on each machine of a run that has exactly these."""
    return [
        [
            f"--nnodes={len(hosts)}",
            f"--nproc_per_node={each}",
            f"--node_rank={number}",
            f"--master_addr={hosts[0].address}",
            f"--master_port={PORT}",
        ]
        for number in range(len(hosts))
    ]


def elastic(hosts: Sequence[Host], each: int, restarts: int = 8) -> list[str]:
    """torchrun's options of a run that goes on with those of its machines that are there."""
    return [
        f"--nnodes=1:{len(hosts)}",
        f"--nproc_per_node={each}",
        f"--max-restarts={restarts}",
        "--rdzv_id=run",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={hosts[0].address}:{PORT}",
        "--rdzv_conf=last_call_timeout=6",
    ]


def run(
    hosts: Sequence[Host],
    each: int,
    words: Sequence[str | Path],
    folder: Path,
    timeout: float = 200,
) -> list[Ended]:
    """The same command on every machine, `each` ranks on each; how it ended on each."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{host.name}.log" for host in hosts]
    options = fixed(hosts, each)
    processes = [
        start(host, mine, words, log) for host, mine, log in zip(hosts, options, logs, strict=True)
    ]
    return wait(processes, logs, timeout)


def wait(processes: Sequence[Any], logs: Sequence[Path], timeout: float) -> list[Ended]:
    """How each ended; all are killed after `timeout` seconds."""
    begun = time.monotonic()
    seconds: dict[int, float] = {}
    try:
        while len(seconds) < len(processes) and time.monotonic() < begun + timeout:
            for number, process in enumerate(processes):
                if number not in seconds and process.poll() is not None:
                    seconds[number] = time.monotonic() - begun
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [
        Ended(process.wait(), log.read_text(errors="replace"), seconds.get(n, timeout))
        for n, (process, log) in enumerate(zip(processes, logs, strict=True))
    ]
