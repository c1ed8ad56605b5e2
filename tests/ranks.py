"""Run a function on several processes of this machine, over gloo or NCCL: what every distributed
test stands on.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

# Every rank is a fork of one process that has imported already what ranks need and what is slow to
# import: seconds for each rank otherwise. Nothing that starts a thread, which a fork would lose.
PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "pytest",
    "datasets",
    "retool.sft.train",
    "retool.rl.train",
    # what `main` imports late
    "retool.data.audit",
    "retool.sft.preflight",
    "retool.run.start",
    "transformers.models.qwen2.tokenization_qwen2",
]


class _Popen(popen_forkserver.Popen):
    """A process forked by the server of ranks, not by the one that a reward pool has started with
    other imports and another environment.
    """

    def _launch(self, process_obj: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
            super()._launch(process_obj)  # type: ignore[misc]


class RankProcess(ForkServerProcess):
    _Popen = _Popen  # type: ignore[assignment]


class RankContext(ForkServerContext):
    Process = RankProcess  # type: ignore[assignment]


# A process that has touched the GPU can't be forked, and what ranks of GPU tests import is theirs.
GPU_PRELOADED = ["torch", "torch.distributed", "retool.parallel.fsdp", "retool.model.decoder"]
NO_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not torch.backends.cuda.is_built()
server = forkserver.ForkServer()
server.set_forkserver_preload(PRELOADED if NO_GPU else GPU_PRELOADED)
_context = RankContext()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def need_gpus(count: int) -> None:
    """Skip a test of `count` ranks where there are fewer GPUs.

    With RANKS_SHARE_GPU=1 they all take the first one: to NCCL each is a machine of its own, so
    that the data goes over loopback. Right, and slow.
    """
    found = torch.cuda.device_count()
    if found < (1 if _share_gpu() else count):
        pytest.skip(f"needs {count} GPUs, found {found}")


def _share_gpu() -> bool:
    return os.environ.get("RANKS_SHARE_GPU") == "1"


def _worker(call: bytes, rank: int, world: int, port: int, out: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if _share_gpu():
        os.environ |= {"LOCAL_RANK": "0", "NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        # here, so that a module that fails on import is reported as everything else is
        function, args = pickle.loads(call)
        out.put((rank, True, function(*args)))
    except BaseException:
        out.put((rank, False, traceback.format_exc()))


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 240
) -> list[Any]:
    """`function(*args)` on `world` processes with a launcher's environment; the results by rank.

    `function` and its arguments and results are pickled: a module-level function; return numbers,
    lists or numpy arrays. AssertionError with a rank's traceback, or its exit code where it died
    without one, as soon as that happens.
    """
    out = _context.Queue()
    port = free_port()
    call = pickle.dumps((function, args))
    processes = [
        _context.Process(target=_worker, args=(call, r, world, port, out), daemon=True)
        for r in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, good, value = _next(out, processes, results, timeout)
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


def _next(
    out: Any, processes: list[BaseProcess], done: Collection[int], timeout: float
) -> tuple[int, bool, Any]:
    """The next (rank, good, value).

    AssertionError when a rank has died without one, or after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while True:
        # A process flushes what it has put before it ends: who was dead before an empty wait won't
        # report any more.
        dead = [
            (r, p.exitcode)
            for r, p in enumerate(processes)
            if r not in done and p.exitcode is not None
        ]
        try:
            return out.get(timeout=1 if dead else 0.2)
        except queue.Empty:
            if dead:
                raise AssertionError(
                    f"rank {dead[0][0]} of {len(processes)} ended with exit code {dead[0][1]} and said nothing"
                ) from None
            if time.monotonic() > end:
                silent = [r for r in range(len(processes)) if r not in done]
                raise AssertionError(
                    f"rank {silent} of {len(processes)}: no result in {timeout:g} s"
                ) from None
