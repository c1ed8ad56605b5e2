"""Several fork servers: children are asked of them in turn, and each may die without the others."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from retool.sandbox import Limits, Result, Sandbox, embedded, forkserver
from retool.sandbox.layers import Plan
from tests.sandbox.modes import REFUSE, USER, Mode, modes_here, unprivileged_python
from tests.sandbox.world import descendants, process_state, settled, sleeper

SERVERS = 3
SLEEP = "import time\ntime.sleep(0.2)"
# As many open files as a machine may allow for a start: fewer than all the cells' pipes
FEW_DESCRIPTORS = ["sh", "-c", 'ulimit -Sn 40; exec "$0" "$@"']


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    launcher = FEW_DESCRIPTORS
    with Sandbox(Limits(), workers=SERVERS, servers=SERVERS, launcher=launcher) as opened:
        yield opened


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def has_ended(pid: int) -> bool:
    """Gone, or nothing but a name that its parent, who is stopped, hasn't asked for yet."""
    return not os.path.exists(f"/proc/{pid}") or process_state(pid) == "Z"


def living(servers: list[int]) -> list[int]:
    return [pid for pid in servers if os.path.exists(f"/proc/{pid}")]


def waits_for(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_children_are_asked_of_all_in_turn(sandbox: Sandbox) -> None:
    assert len(set(sandbox.server_pids)) == SERVERS
    assert settled(sandbox)
    waiting = set(descendants(sandbox.pid)) - set(sandbox.server_pids)
    made = collections.Counter(map(parent, waiting))
    assert len({made[pid] for pid in sandbox.server_pids}) == 1, made


def test_calls_begin_in_the_order_of_arrival(sandbox: Sandbox) -> None:
    """Whichever fork server their processes come from."""

    async def main() -> list[Result]:
        # all workers but one are busy, so that the others run one after the other
        sleep = "import time\ntime.sleep(60)"
        busy = [asyncio.create_task(sandbox.run(sleep)) for _ in range(sandbox.workers - 1)]
        await asyncio.sleep(0.1)
        program = "import time\ntime.monotonic_ns()"
        results = await asyncio.gather(*(sandbox.run(program) for _ in range(12)))
        for call in busy:
            call.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        return results

    begun = [int(result.stdout) for result in asyncio.run(main())]
    assert begun == sorted(begun)


async def with_one_killed(sandbox: Sandbox, victim: int) -> list[Result]:
    """Of calls that keep all workers busy, while that fork server is killed."""
    program = "import time\nprint('begun', flush=True)\ntime.sleep(1)"
    calls = [asyncio.create_task(sandbox.run(program)) for _ in range(sandbox.workers)]
    await asyncio.sleep(0.4)
    os.kill(victim, signal.SIGKILL)
    return await asyncio.gather(*calls)


def test_a_killed_one_is_replaced_and_its_calls_run_again(sandbox: Sandbox) -> None:
    """The calls of the others go on; but all end with the first, which the others are forks of."""
    first, *twins = sandbox.server_pids
    for victim, lost in ((twins[0], 1), (first, SERVERS)):
        assert settled(sandbox)
        results = asyncio.run(with_one_killed(sandbox, victim))
        assert {(result.status, result.stdout) for result in results} == {("success", "begun\n")}
        # the lost attempt is no time of the program's
        assert sum(result.queue_seconds > 0.3 for result in results) == lost
        assert settled(sandbox)  # as many fork servers as before
        assert victim not in living(sandbox.server_pids)


def test_their_number_follows_workers_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    for cores, workers in ((2, 4), (32, 4), (32, 32), (16, 64), (192, 192)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        numbers.append(forkserver.servers_for(workers))
    assert numbers == [1, 1, 8, 4, 8]
    with pytest.raises(ValueError, match="servers=0"):
        Sandbox(servers=0)


@pytest.mark.slow
def test_all_at_once_are_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many end with the first, and whichever of them is heard of first."""
    monkeypatch.setattr(embedded, "RETRIES", 0)
    with Sandbox(Limits(), workers=2, servers=8) as sandbox:
        first, *twins = sandbox.server_pids
        with ThreadPoolExecutor(1) as thread:
            os.kill(sandbox.pid, signal.SIGSTOP)
            call = thread.submit(sandbox.run_blocking, "1 + 1")
            time.sleep(0.1)  # it is heard of before them
            for victim in (*twins, first):
                os.kill(victim, signal.SIGKILL)
                assert waits_for(lambda victim=victim: has_ended(victim))
            os.kill(sandbox.pid, signal.SIGCONT)
            assert call.result().stdout == "2\n"
        assert settled(sandbox) and sandbox.restarts == 0


@pytest.mark.slow
def test_the_first_is_enough_where_the_kernel_is_too_old() -> None:
    """A twin needs a descriptor that stands for its own pid namespace."""
    launcher = [sys.executable, REFUSE, "--no-pidfd"]
    with Sandbox(Limits(), workers=2, servers=3, launcher=launcher) as sandbox:
        nested = "pid_namespace" in sandbox.plan.present
        assert len(sandbox.server_pids) == (1 if nested else 3)
        for _ in range(4):
            assert sandbox.run_blocking("1 + 1").stdout == "2\n"
        assert settled(sandbox)


def test_the_first_works_alone_where_no_other_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = forkserver.ForkServers(Plan(frozenset()), "/nowhere", 1, count=4)
    pairs = iter([socket.socketpair()])

    def pair() -> tuple[socket.socket, socket.socket]:
        for found in pairs:
            return found
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(forkserver, "_socket_pair", pair)
    monkeypatch.setattr(forkserver.spawn, "start", lambda *_, **__: None)
    monkeypatch.setattr(forkserver.ForkServer, "wait_until_warm", lambda _: True)
    servers.start()
    assert servers.first is not None and servers.all == [servers.first]
    servers.first.control.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes_here(), ids=lambda mode: mode.name)
def test_in_every_mode(mode: Mode) -> None:
    """A killed one takes its programs with it, and the supervisor's end takes all, be it killed or
    closed, whatever isolates them.
    """
    sandbox = mode.start()
    try:
        for victim in reversed(sandbox.server_pids):
            results = asyncio.run(with_one_killed(sandbox, victim))
            assert all(result.ok for result in results)
            assert settled(sandbox)
        # processes that are gone only when somebody ends them
        staying = "import os, time\nos.fork()\nprint('begun', flush=True)\ntime.sleep(60)"

        async def leave(end: Callable[[], None]) -> list[int]:
            assert sandbox.run_blocking("1").ok
            assert settled(sandbox)
            calls = [asyncio.create_task(sandbox.run(staying)) for _ in range(2)]
            await asyncio.sleep(0.5)
            family = descendants(sandbox.pid)
            await asyncio.to_thread(end)
            for call in calls:  # they would be run again
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            return family

        def kill() -> None:
            # A stopped supervisor doesn't hear which waiting children have ended
            os.kill(sandbox.pid, signal.SIGSTOP)
            family = descendants(sandbox.pid)
            parents = {pid: parent(pid) for pid in family}
            for pid in set(family) - set(parents.values()):
                if parents[pid] in sandbox.server_pids:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            # A stopped fork server hears of its end only after what the kernel does about it
            first = next(pid for pid in family if parents[pid] == sandbox.pid)
            os.kill(first, signal.SIGSTOP)
            os.kill(sandbox.pid, signal.SIGKILL)
            time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGCONT)

        os.kill(sandbox.pid, signal.SIGKILL)  # so that the fork servers are as `sandbox` tells
        for end in (kill, sandbox.close):
            family = asyncio.run(leave(end))
            assert len(family) > 6 and waits_for(lambda family=family: not living(family))
    finally:
        sandbox.close()


def test_few_open_files_are_told_of_once_and_no_call_is_lost(
    capfd: pytest.CaptureFixture[str],
) -> None:
    launcher = ["sh", "-c", 'ulimit -n 90; exec "$0" "$@"']
    with Sandbox(Limits(), workers=6, launcher=launcher) as sandbox:

        async def main() -> list[Result]:
            return await asyncio.gather(*(sandbox.run(SLEEP) for _ in range(9)))

        assert all(result.ok for result in asyncio.run(main()))
        os.kill(sandbox.pid, signal.SIGKILL)
        assert sandbox.run_blocking("1").ok
        assert sandbox.restarts == 1
    said = capfd.readouterr().err
    assert said.count("3 of 6 programs can run at once") == 1 and "ulimit -n" in said


@pytest.mark.skipif(os.geteuid() != 0 or not unprivileged_python(), reason="needs an own user")
def test_where_no_process_may_be_made_calls_wait_for_others_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None is lost while any child is there; with none, what failed and the way out are told."""
    monkeypatch.setattr(embedded, "RETRIES", 0)
    user = USER + 1  # who has no processes of other tests
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    launcher = [*become, "bash", "-c", 'ulimit -u 9; exec "$0" "$@"']
    with Sandbox(Limits(), 4, python=unprivileged_python(), launcher=launcher) as sandbox:

        async def main() -> list[Result]:
            return await asyncio.gather(*(sandbox.run(SLEEP) for _ in range(8)))

        assert all(result.ok for result in asyncio.run(main()))
        others = [sleeper(user) for _ in range(9)]
        try:
            refused = [sandbox.run_blocking("1") for _ in range(5)][-1]
        finally:
            for other in others:
                other.kill()
                other.wait()
        assert refused.status == "sandbox_error"
        assert "Resource temporarily unavailable" in refused.reason
        assert "ulimit -u" in refused.reason and "--pids-limit" in refused.reason
        assert sandbox.run_blocking("1").ok and sandbox.restarts == 0
