"""Each mechanism on its own: with every other one left out, this one alone stops its attack;
without it, the attack gets through.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from retool.sandbox import Limits, Sandbox
from retool.sandbox.layers import GUARANTEES, LAYERS, Plan, parts
from retool.sandbox.probe import find
from tests.sandbox.conftest import Arena
from tests.sandbox.modes import modes_here
from tests.sandbox.world import World, descendants

READ = "print('ESCAPED', open(<SECRET>).read())"
WRITE = "open(<SECRET>, 'r+').close()\nprint('ESCAPED')"
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', <TCP>), 2)\nprint('ESCAPED')"
ABSTRACT = "import socket\nsocket.socket(socket.AF_UNIX).connect(<ABSTRACT>)\nprint('ESCAPED')"
SIGNAL = "import os\nos.kill(<VICTIM>, 0)\nprint('ESCAPED')"
DEVICE = "import os\nos.open('/dev/zero', os.O_RDONLY)\nprint('ESCAPED')"
NAMESPACE = "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000):\n    raise PermissionError\nprint('ESCAPED')"
HOSTNAME = "import socket, os\nos.uname()\nimport ctypes\nif ctypes.CDLL(None).msgget(0x7e57, 0):\n    raise PermissionError\nprint('ESCAPED')"

# layer → what must be there for it to work, the attacks it stops, and how its refusals read
ALONE: dict[str, tuple[set[str], list[tuple[str, str]]]] = {
    "mount_namespace": (set(), [(READ, "FileNotFoundError"), (DEVICE, "FileNotFoundError")]),
    "landlock": (
        set(),
        [(READ, "PermissionError"), (WRITE, "PermissionError"), (DEVICE, "PermissionError")],
    ),
    "landlock_scopes": (
        {"landlock"},
        [(SIGNAL, "PermissionError"), (ABSTRACT, "PermissionError")],
    ),
    "pid_namespace": (set(), [(SIGNAL, "ProcessLookupError")]),
    "network_namespace": (
        set(),
        [
            (CONNECT, "OSError|ConnectionRefusedError|unreachable"),
            (ABSTRACT, "ConnectionRefusedError"),
        ],
    ),
    "seccomp": (
        set(),
        [
            (CONNECT, "PermissionError"),
            (NAMESPACE, "PermissionError"),
            (SIGNAL, "PermissionError"),
        ],
    ),
    "separate_uid": (set(), [(SIGNAL, "PermissionError")]),
}


def with_only(*layers: str) -> Sandbox:
    """A sandbox of these layers and what they can't do without."""
    return Sandbox(
        Limits(wall_seconds=10), 1, "best_effort", without=frozenset(LAYERS) - set(layers)
    )


@pytest.fixture(scope="module")
def here() -> Plan:
    return find()


@pytest.mark.parametrize("layer", ALONE)
def test_alone(layer: str, world: World, here: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    needed, attacks = ALONE[layer]
    wanted = {layer, *needed} | (set() if os.geteuid() == 0 else {"user_namespace"})
    if not wanted <= here.present:
        pytest.skip(
            f"this machine lacks {', '.join(wanted - here.present)}: {[here.missing.get(name) for name in wanted - here.present]}"
        )
    with with_only(*wanted) as sandbox:
        for program, refusal in attacks:
            result = sandbox.run_blocking(world.fill(program, sandbox))
            assert "ESCAPED" not in result.stdout, program
            assert re.search(refusal, result.stderr), (program, result)
    # Named once, loudly
    assert capfd.readouterr().err.count("SANDBOX WARNING: running WITHOUT") == 1


def test_the_attacks_are_real(world: World) -> None:
    with with_only() as sandbox:
        for program in (READ, CONNECT, SIGNAL, NAMESPACE):
            result = sandbox.run_blocking(world.fill(program, sandbox))
            assert "ESCAPED" in result.stdout, f"without any layer this ought to work: {result}"
    world.tcp.accept()[0].close()


def test_kernel_memory_account_alone(here: Plan) -> None:
    """cgroup: processes that each stay below their own limit are ended together."""
    if "cgroup" not in here.present:
        pytest.skip(f"no cgroup: {here.missing['cgroup']}")
    program = "import os, time\nfor i in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (90 << 20)\n        time.sleep(30)\n    time.sleep(0.1)\ntime.sleep(20)"
    with Sandbox(Limits(memory_mb=256), 1) as sandbox:
        result = sandbox.run_blocking(program)
    assert (result.status, result.reason) == ("memory_limit", "the call used more than 256 MB")
    assert result.execution_time < 15


def test_summed_memory_alone() -> None:
    program = "import os, time\nfor i in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (90 << 20)\n        time.sleep(30)\n    time.sleep(0.1)\ntime.sleep(20)"
    with Sandbox(Limits(memory_mb=256), 1, without=frozenset({"cgroup"})) as sandbox:
        result = sandbox.run_blocking(program)
        assert (result.status, result.reason) == ("memory_limit", "the call used more than 256 MB")
        # sixteen forks that share the interpreter's memory are no hog
        shared = sandbox.run_blocking(
            "import os, time\nfor i in range(16):\n    if os.fork() == 0:\n        time.sleep(1)\n        os._exit(0)\ntime.sleep(0.5)\nprint('fine')"
        )
        assert shared.stdout == "fine\n", shared
    assert result.execution_time < 15


def test_files_count_as_memory() -> None:
    """Private folder, no cgroup: files and processes share the call's memory limit."""
    program = "open('a', 'wb').write(bytes(60 << 20))\nx = bytearray(b'x') * (80 << 20)\nimport time\ntime.sleep(20)"
    with Sandbox(Limits(memory_mb=128), 1, without=frozenset({"cgroup"})) as sandbox:
        if "mount_namespace" not in sandbox.plan.present:
            pytest.skip("needs a mount namespace")
        assert sandbox.run_blocking(program).status == "memory_limit"


def test_process_group_alone_ends_everything(here: Plan, world: World) -> None:
    """No pid namespace: nobody leaves the group, and killing it gets all."""
    program = "import os, time\nfor i in range(5):\n    if os.fork() == 0:\n        os.fork()\n        time.sleep(60)\ntry:\n    os.setsid()\nexcept PermissionError:\n    print('kept')"
    with Sandbox(
        Limits(), 1, "best_effort", without=frozenset({"pid_namespace", "user_namespace"})
    ) as sandbox:
        assert sandbox.run_blocking(program).stdout == "kept\n"
        world.assert_unchanged(sandbox)


def test_every_guarantee_names_known_layers() -> None:
    for mechanisms in GUARANTEES.values():
        for mechanism in mechanisms:
            assert mechanism.startswith("always: ") or set(parts(mechanism)) <= set(LAYERS)


def test_strict_refuses_where_names_of_files_are_told() -> None:
    """Without namespaces nothing keeps a program from asking whether a file is there."""
    for mode in modes_here():
        if not mode.refused:
            continue
        with pytest.raises(
            ValueError,
            match=r"no host file names.*apparmor_restrict_unprivileged_userns.*isolation=best_effort",
        ):
            mode.start(isolation="strict")


def test_best_effort_names_once_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    mode = next(mode for mode in modes_here() if mode.refused)
    with mode.start(workers=1) as sandbox:
        assert list(sandbox.unmet) == ["no host file names"]
        sandbox.run_blocking("1")
        os.kill(sandbox.pid, signal.SIGKILL)  # another supervisor doesn't say it again
        assert sandbox.run_blocking("1").ok
    assert capfd.readouterr().err.count("running WITHOUT: no host file names") == 1


def test_strict_refuses_and_says_which_and_how() -> None:
    with pytest.raises(
        ValueError, match=r"no network.*seccomp.*CONFIG_SECCOMP_FILTER.*best_effort"
    ):
        Sandbox(workers=1, without=frozenset({"seccomp", "network_namespace"}))
    with pytest.raises(ValueError, match=r"no host files.*Landlock"):
        Sandbox(workers=1, without=frozenset({"landlock", "mount_namespace"}))


def test_programs_hold_nothing(arenas: list[Arena]) -> None:
    """No capability, no way to gain one, a filter on every call: by the kernel's word, from
    outside.
    """
    for arena in arenas:
        waiting = [
            pid
            for pid in descendants(arena.sandbox.pid)
            if "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
        ]
        told = Path(f"/proc/{waiting[-1]}/status").read_text()
        held = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
        assert all(int(held[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")), (
            arena.mode.name,
            told,
        )
        assert held["NoNewPrivs"] == "1"


def test_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown isolation layers"):
        find(frozenset({"selinux"}))


def test_plan_survives_json(here: Plan) -> None:
    import json

    assert Plan.from_json(json.loads(json.dumps(here.to_json()))) == here
