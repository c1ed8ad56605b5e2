"""Reinforcement learning on two machines: an engine and a sandbox on each, and one of them failing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from retool.sandbox.probe import find
from tests import warm
from tests.hosts.faulty_engine import ERROR
from tests.hosts.launch import fixed, run, start, wait
from tests.hosts.network import Host
from tests.rl.conftest import work
from tests.rl.test_command import ARR, steps, words

__all__ = ["work"]
SAME = (
    "critic/score/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "response_length/mean",
)


@pytest.mark.slow
def test_an_engine_and_a_sandbox_on_each_machine(
    work: Path, hosts: list[Host], tmp_path: Path
) -> None:
    """Two ranks share an engine, four train: the numbers of one machine with the same layout."""
    if find().unmet():
        pytest.skip("no strict isolation here")
    keys = [
        "trainer.total_training_steps=2",
        f"{ARR}rollout.tensor_model_parallel_size=2",
        f"{ARR}actor.fsdp_config.fsdp_size=2",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_workers=1",
    ]
    apart = tmp_path / "apart"
    together = tmp_path / "together"
    ended = run(hosts, 2, ["-m", "retool.rl", *words(work, apart, *keys)], tmp_path / "logs")
    assert [one.status for one in ended] == [0, 0], [one.text[-3000:] for one in ended]
    command = ["-m", "retool.rl", *words(work, together, *keys)]
    (alone,) = run(hosts[1:], 4, command, tmp_path / "logs of one")
    assert alone.status == 0, alone.text[-3000:]
    for two, one in zip(steps(apart), steps(together), strict=True):
        assert {name: two[name] for name in SAME} == {name: one[name] for name in SAME}


PORT = 8080  # of each machine's sandbox, on its loopback
LAST = 5  # steps


def with_tools(work: Path, out: Path, broken: Path) -> list[str | Path]:
    """A run of which every answer runs a program on its own machine."""
    url = f"http://127.0.0.1:{PORT}/run_code"
    tool = {"class_name": "retool.rl.agent.tools.CodeInterpreter"}
    tools = out.with_suffix(".yaml")
    tools.write_text(json.dumps({"tools": [{**tool, "config": {"sandbox_fusion_url": url}}]}))
    keys = [
        f"trainer.total_training_steps={LAST}",
        "data.max_response_length=60",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_config_path={tools}",
    ]
    return ["-m", "tests.hosts.faulty_engine", broken, *words(work, out, *keys)]


@contextmanager
def sandboxes(hosts: list[Host]) -> Iterator[list[warm.Popen]]:
    servers = [host.start(["-m", "tests.hosts.sandbox_server", str(PORT)]) for host in hosts]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
            server.wait()


def reach(out: Path, step: int, **also: Any) -> dict[str, Any]:
    """The first step from this one on whose metrics say so, once it is done."""
    end = time.monotonic() + 150
    while time.monotonic() < end:
        for entry in steps(out) if (out / "metrics.jsonl").is_file() else ():
            if entry["step"] >= step and all(entry[name] == value for name, value in also.items()):
                return entry
        time.sleep(0.05)
    raise AssertionError(f"step {step} with {also} was not reached")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["sandbox", "engine"])
def test_a_machine_that_cannot_sample_goes_on_training(
    work: Path, hosts: list[Host], tmp_path: Path, fault: str
) -> None:
    """The other one samples for both, and what is trained is the same."""
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    broken = tmp_path / "broken"
    with sandboxes(hosts) as servers:
        ended = run(hosts, 1, with_tools(work, whole, broken), tmp_path / "logs of the whole")
        assert [one.status for one in ended] == [0, 0], [one.text[-3000:] for one in ended]

        logs = [tmp_path / f"{host.name}.log" for host in hosts]
        command = with_tools(work, out, broken)
        processes = [
            start(host, options, command, log)
            for host, options, log in zip(hosts, fixed(hosts, 1), logs, strict=True)
        ]
        reach(out, 2)
        begun = time.monotonic()
        if fault == "sandbox":
            servers[1].kill()
        else:
            broken.touch()
        moved = reach(out, 3, **{"rollout/engines_back": 1.0})
        print(f"{fault}: the step was done {time.monotonic() - begun:.1f} s after the fault")
        ended = wait(processes, logs, 200)
    assert [one.status for one in ended] == [0, 0], [one.text[-3000:] for one in ended]
    assert moved["rollout/moved_samples"] > 0
    assert "engine 1 on host-b stands back for 10 steps" in ended[0].text
    assert (ERROR if fault == "engine" else "of its 8 samples were lost") in ended[0].text
    assert [entry["step"] for entry in steps(out)] == [*range(1, LAST + 1)]
    for mine, theirs in zip(steps(out), steps(whole), strict=True):
        assert mine["stop/infrastructure"] == 0
        assert mine["tool/calls"] == theirs["tool/calls"] > 0
        for name in SAME:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
