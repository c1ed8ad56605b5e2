"""What a process sees of its machine: packages, GPUs, limits, the sandbox."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from retool.doctor.finding import Finding, alike
from retool.parallel.network import Place, own_place
from retool.perf import GIB
from retool.preflight.versions import versions
from retool.sandbox.probe import find

FEWEST_FILES = 1024
LEAST_SHM = 256 * 2**20  # bytes: docker's 64 MiB end NCCL's runs of several GPUs
INFINIBAND = Path("/sys/class/infiniband")
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Machine:
    """What one rank sees. `sandbox` are guarantees without a mechanism; only the first rank of a
    machine looks, and -1 stands for no limit.
    """

    rank: int
    first: bool
    place: Place
    versions: dict[str, str]
    gpu: str
    open_files: int
    locked_memory: int
    infiniband: bool
    shm: int
    sandbox: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.place.host}"


def look(rank: int, device: torch.device, sandbox: bool) -> Machine:
    """This rank's machine, and its sandbox where that is asked for."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return Machine(
        rank,
        first,
        own_place(os.environ),
        versions(),
        _gpu(device),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        shutil.disk_usage(SHM).total if SHM.is_dir() else 0,
        tuple(find().unmet()) if first and sandbox else (),
    )


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return "none: CPUs"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"


def findings(machines: Sequence[Machine], sandbox: bool) -> list[Finding]:
    """What all ranks' machines come to."""
    firsts = [machine for machine in machines if machine.first]
    return [
        _processes(machines),
        *_compared(machines),
        *_limits(firsts),
        *([_sandboxes(firsts)] if sandbox else []),
    ]


def _processes(machines: Sequence[Machine]) -> Finding:
    counts: dict[Place, int] = {}
    for machine in machines:
        counts[machine.place] = counts.get(machine.place, 0) + 1
    where = ", ".join(f"{n} on {place.host} ({place.address})" for place, n in counts.items())
    return Finding("processes", where)


def _compared(machines: Sequence[Machine]) -> list[Finding]:
    """GPUs and versions; all versions in one line where they are the same everywhere."""
    gpus: dict[str, list[str]] = {}
    for machine in machines:
        gpus.setdefault(machine.gpu, []).append(machine.name)
    found = [alike("GPUs", gpus, "The slowest, or smallest, decides.")]
    same = list[str]()
    names = dict.fromkeys(name for machine in machines for name in machine.versions)
    for name in names:
        said: dict[str, list[str]] = {}
        for machine in machines:
            said.setdefault(machine.versions.get(name, ""), []).append(machine.name)
        if len(said) > 1:
            found.append(alike(name, said, "Install the same everywhere."))
        elif "" not in said:
            same.append(f"{name} {next(iter(said))}")
    return [*found, Finding("the same everywhere", ", ".join(same))]


def _limits(machines: Sequence[Machine]) -> list[Finding]:
    least = min(machines, key=lambda machine: _unlimited(machine.open_files))
    files = f"Fewer than {FEWEST_FILES} on {least.place.host}: ulimit -n 65536."
    few = _unlimited(least.open_files) < FEWEST_FILES
    locked = [m.place.host for m in machines if m.infiniband and m.locked_memory != -1]
    memory = f"InfiniBand needs more on {', '.join(locked)}: ulimit -l unlimited."
    small = [m.place.host for m in machines if m.shm < LEAST_SHM]
    shm = f"Too little on {', '.join(small)}: docker run --shm-size=8g, or --ipc=host."
    room = min(machine.shm for machine in machines) / GIB
    return [
        Finding("open files", _words(least.open_files), files if few else ""),
        Finding("locked memory", _words(machines[0].locked_memory), memory if locked else ""),
        Finding("/dev/shm", f"{room:.1f} GiB", shm if small else ""),
    ]


def _unlimited(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _words(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _sandboxes(machines: Sequence[Machine]) -> Finding:
    lacking = [machine for machine in machines if machine.sandbox]
    if not lacking:
        return Finding("sandbox", "strict isolation: every guarantee has a mechanism")
    guarantees = ", ".join(dict.fromkeys(name for m in lacking for name in m.sandbox))
    hosts = ", ".join(machine.place.host for machine in lacking)
    way_out = "retool sandbox doctor says why; retool doctor --command sft leaves it out."
    return Finding("sandbox", f"nothing guarantees: {guarantees}", f"On {hosts}. {way_out}")
