"""Run a function on several gloo processes of this machine: what every distributed test stands on."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "retool.parallel.fsdp", "retool.model.decoder"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(function: Callable[..., Any], rank: int, world: int, port: int, args: tuple[Any, ...], out: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        out.put((rank, True, function(*args)))
    except BaseException:
        out.put((rank, False, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world` processes with a launcher's environment; the results by rank.

    `function` and its arguments and results are pickled: a module-level function; return numbers, lists or numpy arrays.
    """
    out, port = _context.Queue(), free_port()
    processes = [_context.Process(target=_worker, args=(function, r, world, port, args, out), daemon=True) for r in range(world)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, good, value = out.get(timeout=timeout)
            if not good:
                raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5 if len(results) == world else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[r] for r in range(world)]
