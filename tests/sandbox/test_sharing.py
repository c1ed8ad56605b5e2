"""One sandbox for all processes of a node: one supervisor, and no process hangs when another goes."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from retool.sandbox import Result, Sandbox, sharing, wire
from retool.sandbox.connection import Connection

_names = (f"test-{os.getpid()}-{number}" for number in itertools.count())
OWNER = """
import sys, time
from retool.sandbox import Sandbox
with Sandbox(workers=1, share=sys.argv[1]) as sandbox:
    print(sandbox.owner, flush=True)
    time.sleep(60)
"""
SLEEP = "import time\ntime.sleep({})"


@pytest.fixture(scope="module")
def name() -> str:
    return next(_names)


@pytest.fixture(scope="module")
def owner(name: str) -> Iterator[Sandbox]:
    with Sandbox(workers=2, share=name) as opened:
        assert opened.owner
        yield opened


@pytest.fixture
def guest(owner: Sandbox, name: str) -> Iterator[Sandbox]:
    with Sandbox(workers=2, share=name) as opened:
        assert not opened.owner
        yield opened


def test_programs_of_both_wait_in_one_queue(owner: Sandbox, guest: Sandbox) -> None:
    async def main() -> list[Result]:
        return await asyncio.gather(
            *(sandbox.run(SLEEP.format(0.4)) for sandbox in (owner, guest, owner, guest))
        )

    assert owner.pid == guest.pid
    results = asyncio.run(main())
    assert all(result.ok for result in results)
    assert sum(result.queue_seconds > 0.2 for result in results) >= 2  # two ran, two waited


def test_a_guest_that_goes_gives_up_its_calls(owner: Sandbox, name: str) -> None:
    guest = Sandbox(workers=2, share=name)
    for _ in range(4):
        guest._submit(guest._message(SLEEP.format(60), "", None, None, {}, ()))
    time.sleep(0.2)
    guest.close()
    assert owner.run_blocking("1+1").stdout == "2\n"


def test_a_killed_supervisor_comes_back_for_guests_too(owner: Sandbox, guest: Sandbox) -> None:
    """The owner starts it again without a call of its own."""
    first = owner.pid
    os.kill(first, signal.SIGKILL)
    assert guest.run_blocking("1+1").stdout == "2\n"
    assert not guest.owner and guest.pid != first
    assert owner.run_blocking("1+1").stdout == "2\n"
    assert owner.pid == guest.pid


def test_another_setup_is_another_sandbox() -> None:
    """And of another user's: a guest only ever joins what it would have started itself."""
    setups: list[dict[str, object]] = [{"workers": 1}, {"workers": 2}]
    assert len({sharing.address(name, setup) for name in ("a", "b") for setup in setups}) == 4


def test_a_guest_takes_over_when_the_owner_dies() -> None:
    name = next(_names)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, name], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with Sandbox(workers=1, share=name) as guest:
            assert not guest.owner and guest.run_blocking("1").ok
            process.kill()
            process.wait()
            assert guest.run_blocking("1+1").stdout == "2\n"
            assert guest.owner
        with Sandbox(workers=1, share=name) as next_one:  # the name is free after the end
            assert next_one.owner


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "have colour, which isn't known here"),
        ({"reason": None}, "have no reason"),
    ],
)
def test_a_supervisor_of_another_version_is_told_of_and_no_call_waits_for_it(
    change: dict[str, str | None], said: str
) -> None:
    """Every call is answered, the one that its results can't be read of and those behind it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.encode({"hello": {}}))
        connection = Connection(ours)
        futures = [connection.submit({})[1] for _ in range(2)]
        fields = {**Result("success").to_json(), **change}
        answer = {
            name: value
            for name, value in fields.items()
            if value is not None or name == "return_code"
        }
        theirs.sendall(wire.encode({"id": 0, "result": answer}))
        for future in futures:
            result = future.result(timeout=10)
            assert result.status == "sandbox_error"
            assert "version of retool" in result.reason and said in result.reason
        assert not connection.alive
