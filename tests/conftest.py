"""What every test stands on: one thread, no network, a cache of its own, no launcher's environment."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported; the processes of distributed tests inherit it
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pyarrow's allocator has no thread of its own: ranks are forks of a process that has imported it
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
):
    os.environ.pop(name, None)
# Who started us may have blocked it, and a blocked alarm is no time limit
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
_cache = tempfile.mkdtemp(prefix="retool-tests-")
os.environ["XDG_CACHE_HOME"] = _cache
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Tests that aren't marked `gpu` say what a CPU does, on a machine with GPUs too. Of those that are,
    each worker has one GPU, which it shares with others where there are more workers.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if "not gpu" in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of_worker(worker, os.environ)


def gpu_of_worker(worker: str, environment: Mapping[str, str]) -> str:
    """A GPU of those that are visible, or of the first TEST_GPUS; the workers get them in turn."""
    number = int(worker.removeprefix("gw"))
    count = int(environment.get("TEST_GPUS", number + 1))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    return gpus[number % len(gpus)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fixture that isn't there ends the run: a test that is skipped here would find out on a GPU."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        missing = set(item.fixturenames) - set(item._fixtureinfo.name2fixturedefs) - {"request"}
        if missing:
            raise pytest.UsageError(f"{item.nodeid} asks for fixtures that aren't there: {missing}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `gpu` is skipped where there is none, before a fixture looks for one."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session")
def gpu() -> str:
    """Where a test marked `gpu` computes."""
    return "cuda"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; a clone elsewhere has none, and its tests skip."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder
