"""A worker that dies in mid-step under torchrun: the others end within seconds, and its own error
is what the user sees first.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool.checkpoint import latest
from retool.parallel.lost_peer import SIGNS, lost_peer
from tests import warm
from tests.sft.test_command import words

# `python -m retool.sft`, with an accident on rank 1 between the forward and the backward pass of
# its fourth step.
FAULTY = """
import os, signal, sys, time
from retool.sft import __main__ as command, step

whole, calls = step.loss_sum, 0

def loss_sum(*arguments, **named):
    global calls
    calls += 1
    result = whole(*arguments, **named)
    if calls == 4 and os.environ["RANK"] == "1":
        print(f"accident at {time.time()}", flush=True)
        {ACCIDENT}
    return result

step.loss_sum = loss_sum
sys.exit(command.main(sys.argv[1:]))
"""
ACCIDENTS = {
    "raises": (
        "raise RuntimeError('rank 1 is out of luck')",
        "RuntimeError: rank 1 is out of luck",
    ),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "exitcode  : -9"),
}
FOLLOWER = "rank 0 ends because another rank is gone"


@pytest.mark.parametrize("accident", ["raises", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_others_and_its_error_comes_first(
    work: Path, tmp_path: Path, accident: str
) -> None:
    code, own = ACCIDENTS[accident]
    script = tmp_path / "faulty.py"
    out = tmp_path / "run"
    script.write_text(FAULTY.replace("{ACCIDENT}", code))
    keys = words(work, out, trainer__total_training_steps=50, trainer__save_freq=1)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        *keys,
    ]
    launcher = warm.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = launcher.communicate(timeout=150)[0]
    lasted = time.time() - float(text.split("accident at ")[1].split()[0])
    assert launcher.returncode == 1 and own in text, text[-5000:]
    assert lasted < 30, f"the others outlive it by {lasted:.0f} s"
    assert not any(sign in text for sign in SIGNS) and "timed out" not in text, (
        "the consequence hides the cause"
    )
    if accident == "raises":
        assert text.index(own) == min(
            text.index(e) for e in (own, FOLLOWER, "ChildFailedError") if e in text
        ), text[-5000:]
    cause = text.split("Root Cause")[1]
    assert "(local_rank: 1)" in cause and "(local_rank: 0)" not in cause, cause
    assert latest(out) == out / "global_step_3", "what was complete before is there"


def test_only_a_lost_peer_is_taken_for_one() -> None:
    gloo = "[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:31154: Connection reset by peer. This is typically caused by"
    nccl = "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.27.3\nncclRemoteError: A call failed"
    assert lost_peer(RuntimeError(gloo)) and lost_peer(RuntimeError(nccl))
    for error in (
        RuntimeError("CUDA out of memory"),
        RuntimeError("[/x/gloo/…] Timed out waiting 1800000ms"),
        OSError("Broken pipe"),
        RuntimeError("Broken pipe"),
    ):
        assert not lost_peer(error)
