"""The code interpreter next to `subprocess.run([python, "-c", program])` with rlimits, which has no
isolation.

    python benchmarks/sandbox.py [--seconds 4] [--calls 1000] [--workers N] [--servers N,N]
        [--json out.json]

*print* is `print(1+1)`, *sympy* imports numpy and sympy and solves an equation. Callers are tasks
of one event loop, each asking again as soon as it is answered; p50 and p99 are a call's round trip,
with its time in the queue. The baseline runs at most 8 at once (256 would thrash) and drops what
hasn't begun when its time is up. The ways take turns, three times each, in pieces of `--seconds`/3,
so that a noisy neighbour meets all; the spread of calls/s is over the pieces. `sandbox_fusion` is
the same over HTTP, server and client on this machine. Then `--calls` calls of mixed outcome, and
what they left behind: processes, descriptors, memory, files.

With `--servers 1,4,8` nothing of this: a table for these numbers of fork servers, with the CPU time
a call of each kind of process. A fork server, the supervisor and the caller run on one core each:
1,000 / these milliseconds are the most calls that one of them can serve in a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retool.sandbox import Result, Sandbox
from retool.sandbox.fusion_client import SandboxFusion
from retool.sandbox.fusion_server import Server

PROGRAMS = {
    "print": ("print(1+1)", "2\n"),
    "sympy": (
        "import numpy, sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 5*x + 6, x))",
        "[2, 3]\n",
    ),
}
BASELINE = "subprocess"
PIECES = 3


def hardware() -> str:
    """One line: what decides the numbers."""
    model = platform.machine()
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), model
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "sympy"))
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{cores} cores of {model}, {system}, {packages}, {date.today()}, load {load:.1f}"


def plain(program: str) -> str:
    """What people do without a sandbox."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit,
    ).stdout


async def piece(
    run: Callable[[str], Awaitable[str]], program: str, expected: str, callers: int, seconds: float
) -> tuple[list[float], float]:
    """Round trips in milliseconds of `callers` callers for `seconds`, and calls per second."""
    trips: list[float] = []
    begun = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            printed = await run(program)
            if printed == "":
                return  # the baseline didn't get to it in time
            trips.append(1e3 * (time.perf_counter() - start))
            if printed != expected:
                raise RuntimeError(f"expected {expected!r}, got {printed!r}")

    await asyncio.gather(*(caller() for _ in range(callers)))
    return trips, len(trips) / (time.perf_counter() - begun)


def ways(
    sandbox: Sandbox, fusion: SandboxFusion, threads: ThreadPoolExecutor, seconds: float
) -> dict[str, Callable[[str], Awaitable[str]]]:
    """Name → how to run a program and get what it printed."""
    ends: list[float] = []  # when the baseline's piece is over, from its first call on

    async def embedded(program: str) -> str:
        return _printed(await sandbox.run(program))

    async def over_http(program: str) -> str:
        return _printed(await fusion.run(program))

    async def bare(program: str) -> str:
        ends.append(time.perf_counter() + seconds)
        return await asyncio.get_running_loop().run_in_executor(
            threads, lambda: plain(program) if time.perf_counter() < ends[0] else ""
        )

    return {BASELINE: bare, "embedded": embedded, "sandbox_fusion": over_http}


def _printed(result: Result) -> str:
    if not result.ok:
        raise RuntimeError(f"{result.status}: {result.reason} {result.stderr}")
    return result.stdout


async def compare(
    options: argparse.Namespace, sandbox: Sandbox, fusion: SandboxFusion, found: dict[str, Any]
) -> None:
    """One line per program, number of callers and way; printed and saved as they come."""
    print("\n| program | callers | way | p50 ms | p99 ms | calls/s (spread) | against subprocess |")
    print("|---|---:|---|---:|---:|---:|---:|", flush=True)
    share = options.seconds / PIECES
    with ThreadPoolExecutor(8) as threads:
        for name, (program, expected) in PROGRAMS.items():
            for callers in options.callers:
                timed: dict[str, list[tuple[list[float], float]]] = {}
                for _ in range(PIECES):
                    for way, run in ways(sandbox, fusion, threads, share).items():
                        timed.setdefault(way, []).append(
                            await piece(run, program, expected, callers, share)
                        )
                group = [
                    {"program": name, "callers": callers, "way": way, **summary(pieces)}
                    for way, pieces in timed.items()
                ]
                show(group)
                found["lines"] += group
                save(options.json, found)


def save(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


def summary(pieces: list[tuple[list[float], float]]) -> dict[str, Any]:
    """The numbers of one line."""
    trips = sorted(trip for those, _ in pieces for trip in those)
    rates = [rate for _, rate in pieces]
    p99 = trips[min(len(trips) - 1, int(0.99 * len(trips)))]
    return {
        "calls": len(trips),
        "p50_ms": statistics.median(trips),
        "p99_ms": p99,
        "per_second": statistics.median(rates),
        "rates": rates,
    }


def show(group: list[dict[str, Any]]) -> None:
    """Rows of the table, the baseline's first."""
    for line in group:
        gain = line["per_second"] / group[0]["per_second"]
        spread = f"{line['per_second']:.0f} ({min(line['rates']):.0f} … {max(line['rates']):.0f})"
        head = (
            f"| {line['program']} | {line['callers']} | {line['way']} | {line['p50_ms']:.1f} | "
            f"{line['p99_ms']:.1f}"
        )
        print(f"{head} | {spread} | {gain:.1f}× |", flush=True)


def clock_ms(pid: int) -> tuple[float, float]:
    """CPU milliseconds of a process, and of its children that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    own, ended = (sum(map(int, fields[first : first + 2])) for first in (11, 13))
    tick = 1e3 / os.sysconf("SC_CLK_TCK")
    return own * tick, ended * tick


def clocks(sandbox: Sandbox) -> dict[str, float]:
    """CPU milliseconds so far of each kind of process, of all fork servers together."""
    servers = [clock_ms(pid) for pid in sandbox.server_pids]
    return {
        "fork servers": sum(own for own, _ in servers),
        "children": sum(ended for _, ended in servers),
        "supervisor": clock_ms(sandbox.pid)[0],
        "caller": 1e3 * time.process_time(),
    }


async def scale(sandbox: Sandbox, callers: int, seconds: float) -> dict[str, Any]:
    """One line of the table of fork servers."""

    async def run(program: str) -> str:
        return _printed(await sandbox.run(program))

    program, expected = PROGRAMS["print"]
    await piece(run, program, expected, callers, seconds / 4)  # gets warm
    before = clocks(sandbox)
    trips, rate = await piece(run, program, expected, callers, seconds)
    after = clocks(sandbox)
    a_call = {name: (after[name] - before[name]) / len(trips) for name in after}
    return {
        "servers": len(sandbox.server_pids),
        "callers": callers,
        **summary([(trips, rate)]),
        "cpu_ms": a_call,
    }


def compare_servers(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """One line per number of fork servers and of callers."""
    kinds = ("fork servers", "children", "supervisor", "caller")
    print(f"\n| servers | callers | calls/s | p50 ms | p99 ms | {' | '.join(kinds)} |")
    print("|---:" * 9 + "|", flush=True)
    for servers in options.servers:
        with Sandbox(workers=options.workers, servers=servers) as sandbox:
            for callers in options.callers:
                line = asyncio.run(scale(sandbox, callers, options.seconds))
                cpu = " | ".join(f"{line['cpu_ms'][kind]:.2f}" for kind in kinds)
                print(
                    f"| {servers} | {callers} | {line['per_second']:.0f} | {line['p50_ms']:.1f} | "
                    f"{line['p99_ms']:.1f} | {cpu} |",
                    flush=True,
                )
                found["lines"].append(line)
                save(options.json, found)


def footprint(sandbox: Sandbox) -> dict[str, int]:
    """What the sandbox holds while nothing runs."""
    time.sleep(1)
    processes = subprocess.run(
        ["ps", "-eo", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    with open(f"/proc/{sandbox.pid}/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10
    return {
        "processes": len(processes) - 1,
        "descriptors": len(os.listdir(f"/proc/{sandbox.pid}/fd")),
        "supervisor KiB": resident,
        "files": len(os.listdir(sandbox.scratch)),
    }


async def endure(sandbox: Sandbox, calls: int) -> tuple[float, dict[str, int], dict[str, int]]:
    """Calls per second over `calls` calls of mixed outcome, and the footprint before and after."""
    programs = [
        "print(1+1)",
        "1/0",
        "import os\nos._exit(3)",
        "open('f', 'w').write('x' * 9999)",
        "import os\nos.fork()",
    ]
    for program in programs * 20:
        await sandbox.run(program)
    before = footprint(sandbox)
    start = time.perf_counter()
    for first in range(0, calls, 256):
        await asyncio.gather(
            *(
                sandbox.run(programs[i % len(programs)])
                for i in range(first, min(first + 256, calls))
            )
        )
    rate = calls / (time.perf_counter() - start)
    return rate, before, footprint(sandbox)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--callers", type=numbers, default=[1, 8, 64, 256])
    parser.add_argument("--calls", type=int, default=1000, help="of the endurance run; 0: none")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--servers", type=numbers, help="compare these numbers of fork servers")
    parser.add_argument("--json", type=Path, help="save the lines here")
    options = parser.parse_args()
    line = hardware()
    print(line)
    found: dict[str, Any] = {"hardware": line, "lines": []}
    if options.servers:
        compare_servers(options, found)
    else:
        compare_ways(options, found)


def compare_ways(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The tables of the three ways, and the endurance run."""
    start = time.perf_counter()
    with Sandbox(workers=options.workers) as sandbox:
        warm = time.perf_counter() - start
        layers = ", ".join(sorted(sandbox.plan.present))
        print(
            f"server warm after {warm:.1f} s; {sandbox.workers} workers, "
            f"{len(sandbox.server_pids)} fork servers; layers: {layers}",
            flush=True,
        )
        server = Server(sandbox, port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asyncio.run(
            compare(
                options,
                sandbox,
                SandboxFusion(f"http://127.0.0.1:{server.port}/run_code", 256),
                found,
            )
        )
        if options.calls:
            rate, before, after = asyncio.run(endure(sandbox, options.calls))
            found["endurance"] = {
                "calls": options.calls,
                "per_second": rate,
                "before": before,
                "after": after,
            }
            save(options.json, found)
            print(
                f"\n{options.calls} mixed calls: {rate:.0f} calls/s; before {before}, after {after}"
            )
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
