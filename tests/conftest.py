"""What every test stands on: one thread, no network, a cache of its own, no launcher's environment."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

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
    each worker sees all GPUs, and the first of them is its own, which it shares with others where
    there are more workers.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if not is_for_gpus(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of_worker(worker, os.environ)


def is_for_gpus(config: pytest.Config) -> bool:
    """Whether tests that are marked `gpu` may be among those that run."""
    return "not gpu" not in (config.getoption("markexpr") or "")


def gpus_of_worker(worker: str, environment: Mapping[str, str]) -> str:
    """Those that are visible, or the first TEST_GPUS, from the worker's own on; workers get theirs in
    turn.
    """
    number = int(worker.removeprefix("gw"))
    count = int(environment.get("TEST_GPUS", number + 1))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    own = number % len(gpus)
    return ",".join([*gpus[own:], *gpus[:own]])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A fixture that isn't there ends the run: a test that is skipped here would find out on a GPU.

    Of the tests of GPUs those that take longest begin first.
    """
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        missing = set(item.fixturenames) - set(item._fixtureinfo.name2fixturedefs) - {"request"}
        if missing:
            raise pytest.UsageError(f"{item.nodeid} asks for fixtures that aren't there: {missing}")
    if is_for_gpus(config):
        items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the tests of GPUs those of a function run in one process, not those of a whole file: a file may
    take two minutes.
    """
    if not is_for_gpus(config):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFunction(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("[", 1)[0]

    return ByFunction(config, log)


_setup_seconds = dict[str, float]()


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport,
) -> Generator[None, tuple[str, str, str], tuple[str, str, str]]:
    """With `-v` a test's line ends with its seconds: a run that is cut off has said where they went."""
    category, letter, word = yield
    if isinstance(report, pytest.TestReport):
        if report.when == "setup":
            _setup_seconds[report.nodeid] = report.duration
        # Once: the summary at the end asks, too
        elif report.when == "call" and report.nodeid in _setup_seconds:
            seconds = report.duration + _setup_seconds.pop(report.nodeid)
            word = f"{word} {seconds:.1f} s"
    return category, letter, word


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
