"""A whole run whose tokens come from two servers, one of which dies."""

from __future__ import annotations

import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from retool.llm.llm import LLM
from tests import warm
from tests.rl.test_command import ARR, TORCHRUN, steps, words
from tests.serve.server import Served, serving


@pytest.mark.slow  # half a minute: two ranks, two servers
def test_two_ranks_train_on_what_two_servers_sample(work: Path, tmp_path: Path) -> None:
    """The gap stays that of rounding, so weights arrive in every step; the run outlives a server, and
    ends with the last, naming it as its cause.
    """
    with ExitStack() as stack:
        llms = [stack.enter_context(LLM(work / "model", device="cpu")) for _ in range(2)]
        ends = [stack.enter_context(ExitStack()) for _ in range(2)]
        stays = ends[0].enter_context(serving(llms[0]))
        dies = ends[1].enter_context(serving(llms[1]))
        out = tmp_path / "run"
        done, said, wrong = run(work, out, [stays, dies], 4, kill=(dies, 2, ends[1]))
        assert done == 0, wrong[-3000:]
        assert f"rollout.name=server: {stays.url}, {dies.url} sample" in said
        assert f"{dies.url} is left out, 1 server(s) go on" in wrong
        measured = steps(out)
        assert len(measured) == 4 and stays.site.weights.changes == 4
        for entry in measured:
            assert entry["training/rollout_logp_diff_mean"] < 1e-4
        assert not list(out.glob("retool-weights-*"))

        done, said, wrong = run(work, tmp_path / "other", [stays], 2, kill=(stays, 5, ends[0]))
        assert done != 0
        assert f"no server is left ({stays.url}: " in said + wrong


def run(
    work: Path, out: Path, servers: list[Served], count: int, kill: tuple[Served, int, ExitStack]
) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a run of so many steps, while which a server is killed."""
    process = start(work, out, servers, count)
    watcher = threading.Thread(target=close_when_loaded, args=kill)
    watcher.start()
    said, wrong = process.communicate(timeout=170)
    watcher.join()
    return process.returncode, said, wrong


def start(work: Path, out: Path, servers: list[Served], count: int, *more: str) -> warm.Popen:
    urls = ",".join(served.url for served in servers)
    mine = [
        f"trainer.total_training_steps={count}",
        f"{ARR}rollout.name=server",
        f"{ARR}rollout.server.urls=[{urls}]",
        f"{ARR}rollout.server.retries=1",
    ]
    command = [*TORCHRUN, *words(work, out, *mine, *more)]
    return warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def close_when_loaded(served: Served, times: int, until: ExitStack) -> None:
    """End a server in the middle of the step for which it loaded weights the last of `times` times."""
    while served.site.weights.changes < times or not served.site.engine.under_way:
        if threading.Event().wait(0.001):
            return
    until.close()
