"""What a well-meant program gets: values, streams, files, limits; and what a caller gets: order,
cancellation, restarts, no leaks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from retool.sandbox import Limits, Result, Sandbox, keeper, spawn
from retool.sandbox.embedded import strip_fence
from tests.sandbox.conftest import Arena
from tests.sandbox.world import descendants, settled


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("1 + 1", "2\n"),
        ("x = 5", ""),
        ("x = 5\nx", "5\n"),
        ("'text'", "'text'\n"),
        ("None", ""),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("for i in range(3):\n    i", ""),
        ("1; 2; 3", "3\n"),
        ("import sympy\nx = sympy.symbols('x')\nsympy.integrate(2 * x, x)", "x**2\n"),
        (
            "from __future__ import annotations\ndef f(a: Missing): ...\nf.__annotations__['a']",
            "'Missing'\n",
        ),
        ("_ = 1\ndef f():\n    return __name__\nf()", "'__main__'\n"),
        (
            "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nasyncio.run(f())",
            "3\n",
        ),
        ("import atexit\natexit.register(print, 'last')\nprint('first')", "first\nlast\n"),
        (
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()",
            "thread\n",
        ),
        (
            "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p:\n    print(p.map(abs, [-1, -2]))",
            "[1, 2]\n",
        ),
        ("print(end='no newline')", "no newline"),
        ("", ""),
        ("# only a comment", ""),
    ],
)
def test_notebook_value(default_sandbox: Sandbox, program: str, printed: str) -> None:
    result = default_sandbox.run_blocking(program)
    assert (result.status, result.stdout, result.stderr) == ("success", printed, "")


@pytest.mark.parametrize(
    "fenced",
    [
        "```python\nprint(1)\n```",
        "```py\nprint(1)```",
        "\n ```\nprint(1)\n``` \n",
        "```Python  \nprint(1)\n\n```",
        "print(1)",
    ],
)
def test_fence(fenced: str) -> None:
    assert strip_fence(fenced).strip() == "print(1)"


def test_fence_inside_is_left_alone() -> None:
    inside = 's = """\n```python\nx\n```\n"""'
    assert strip_fence(inside) == inside


def test_traceback_names_the_programs_own_lines(default_sandbox: Sandbox) -> None:
    result = default_sandbox.run_blocking("def f():\n    return 1 / 0\nf()")
    assert result.status == "error" and result.return_code == 1
    assert result.stderr.startswith(
        'Traceback (most recent call last):\n  File "main.py", line 3, in <module>\n    f()'
    )
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "retool" not in result.stderr


@pytest.mark.parametrize(
    ("program", "code", "stderr"),
    [
        ("import sys\nsys.exit()", 0, ""),
        ("import sys\nsys.exit(3)", 3, ""),
        ("exit('why')", 1, "why\n"),
    ],
)
def test_exit_codes(default_sandbox: Sandbox, program: str, code: int, stderr: str) -> None:
    result = default_sandbox.run_blocking(program)
    assert (result.return_code, result.stderr) == (code, stderr)


def test_stdin(default_sandbox: Sandbox) -> None:
    assert default_sandbox.run_blocking("print(input() + input())", "ab\ncd\n").stdout == "abcd\n"
    big = "x" * (1 << 20)
    assert (
        default_sandbox.run_blocking("import sys\nprint(len(sys.stdin.read()))", big).stdout
        == f"{1 << 20}\n"
    )


def test_files_in_and_out(default_sandbox: Sandbox) -> None:
    program = (
        "import helper, os\nopen('out.bin', 'wb').write(bytes(range(256)) + open('in/data', 'rb').read())\n"
        "os.symlink('/etc/passwd', 'link')\nos.symlink('in', 'way')\nos.mkdir('folder')\nos.link('out.bin', 'twice')\nhelper.value"
    )
    result = default_sandbox.run_blocking(
        program,
        files={"helper.py": b"value = 42", "in/data": b"tail"},
        fetch=["out.bin", "link", "missing", "folder", "in", "way/data", "in/data"],
    )
    assert result.stdout == "42\n"
    # out.bin has two names, the others are no plain files
    assert result.files == {"in/data": b"tail"}
    single = default_sandbox.run_blocking("open('out.bin', 'wb').write(b'abc')", fetch=["out.bin"])
    assert single.files == {"out.bin": b"abc"}
    killed = default_sandbox.run_blocking(
        "open('half', 'w').write('so far')\nwhile True: pass", timeout=0.5, fetch=["half"]
    )
    assert (killed.status, killed.files) == ("timeout", {"half": b"so far"})


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".", "a\0b", "x" * 2000, "a/" + "é" * 128],
)
def test_file_names_that_lead_out(default_sandbox: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="work folder"):
        default_sandbox.run_blocking("1", files={name: b""})
    with pytest.raises(ValueError, match="work folder"):
        default_sandbox.run_blocking("1", fetch=[name])


def test_nothing_is_left_for_the_next_call(default_sandbox: Sandbox) -> None:
    dirty = "import builtins, sys, math, os\nbuiltins.print = None\nmath.pi = 3\nopen('left', 'w').close()\nos.environ['LEFT'] = '1'\nsys.modules['left'] = math"
    clean = "import os, sys, math\nprint(os.listdir('.'), math.pi > 3.1, 'LEFT' in os.environ, 'left' in sys.modules)"
    for _ in range(4):
        assert default_sandbox.run_blocking(dirty).ok
        assert default_sandbox.run_blocking(clean).stdout == "[] True False False\n"


def test_same_program_same_result(default_sandbox: Sandbox) -> None:
    program = "import random, numpy as np\nprint(random.random(), np.random.rand(), hash('text'), {str(i) for i in range(9)})"
    assert len({default_sandbox.run_blocking(program).stdout for _ in range(5)}) == 1


def test_what_was_printed_before_a_limit_is_returned(default_sandbox: Sandbox) -> None:
    result = default_sandbox.run_blocking(
        "print('first')\nprint('second', end='')\nwhile True: pass", timeout=0.5
    )
    assert (result.status, result.stdout) == ("timeout", "first\nsecond")
    assert result.return_code is None and 0.4 < result.execution_time < 5


def test_cpu_limit_apart_from_wall() -> None:
    with Sandbox(Limits(wall_seconds=30, cpu_seconds=1), workers=1) as sandbox:
        result = sandbox.run_blocking("while True: pass")
    assert (result.status, result.reason) == ("timeout", "the program used up its 1 s of CPU time")


def test_limits_of_one_call(default_sandbox: Sandbox) -> None:
    program = "x = bytearray(b'x') * (200 << 20)\nprint(len(x) >> 20)"
    assert default_sandbox.run_blocking(program).stdout == "200\n"
    assert default_sandbox.run_blocking(program, memory_mb=128).status == "memory_limit"
    assert default_sandbox.run_blocking(program).stdout == "200\n"


def test_stdout_keeps_the_beginning_and_stderr_the_end(default_sandbox: Sandbox) -> None:
    result = default_sandbox.run_blocking(
        "import sys\nfor i in range(20000):\n    print(i)\n    print(i, file=sys.stderr)"
    )
    assert result.stdout.startswith("0\n1\n") and len(result.stdout) == 64 << 10
    assert result.stderr.endswith("19998\n19999\n") and len(result.stderr) == 64 << 10
    assert result.stdout_bytes == result.stderr_bytes == sum(len(f"{i}\n") for i in range(20000))


def test_many_concurrent_calls_in_order(default_sandbox: Sandbox) -> None:
    async def main() -> list[Result]:
        return await asyncio.gather(*(default_sandbox.run(f"print({i})") for i in range(64)))

    results = asyncio.run(main())
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(64)]


def test_short_calls_pass_a_long_one(default_sandbox: Sandbox) -> None:
    async def main() -> None:
        slow = asyncio.create_task(default_sandbox.run("import time\ntime.sleep(15)"))
        await asyncio.sleep(0.1)
        assert (await default_sandbox.run("1")).ok
        assert not slow.done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)

    asyncio.run(main())


def test_cancelling_ends_the_program(default_sandbox: Sandbox) -> None:
    async def main() -> None:
        # Two run, two wait
        tasks = [
            asyncio.create_task(default_sandbox.run("import time\ntime.sleep(60)"))
            for _ in range(4)
        ]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        start = time.monotonic()
        assert (await default_sandbox.run("1")).ok
        assert time.monotonic() - start < 10

    asyncio.run(main())


SLEEPS = "import time\nprint('begun', flush=True)\ntime.sleep({seconds})"


def in_background(
    sandbox: Sandbox, program: str, timeout: float | None = None
) -> concurrent.futures.Future[Result]:
    """The result to come of a call made on another thread."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    threading.Thread(
        target=lambda: future.set_result(sandbox.run_blocking(program, timeout=timeout)),
        daemon=True,
    ).start()
    return future


def test_a_killed_supervisor_takes_all_with_it_and_is_started_again() -> None:
    with Sandbox(Limits(), workers=2) as sandbox:
        first = sandbox.pid
        family = descendants(sandbox.pid)
        scratch = sandbox.scratch
        future = in_background(sandbox, SLEEPS.format(seconds=1))
        time.sleep(0.3)
        os.kill(first, signal.SIGKILL)
        again = future.result(timeout=60)
        assert (again.status, again.stdout) == ("success", "begun\n")
        assert sandbox.run_blocking("print(2)").stdout == "2\n"
        assert sandbox.restarts == 1 and sandbox.pid != first
        assert ended(family)
        end = time.monotonic() + 30
        while os.path.exists(scratch) and time.monotonic() < end:
            time.sleep(0.02)
        assert not os.path.exists(scratch)


def test_a_supervisor_that_keeps_dying_is_infrastructures_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later and later it is tried again, and what still fails is told from every fault of a
    program.
    """
    monkeypatch.setattr(keeper, "BACKOFF_SECONDS", 0.01)
    with Sandbox(Limits(), workers=1) as sandbox:
        monkeypatch.setattr(sandbox._keeper, "python", "/bin/false")
        os.kill(sandbox.pid, signal.SIGKILL)
        result = sandbox.run_blocking("1")
        assert (
            result.infrastructure
            and result.status == "sandbox_error"
            and "supervisor died" in result.reason
        )
        assert asyncio.run(sandbox.run("1")).infrastructure
        monkeypatch.setattr(sandbox._keeper, "python", sys.executable)
        assert sandbox.run_blocking("1+1").stdout == "2\n"
    assert not Result("error").infrastructure


def test_restarts_wait_longer_each_time() -> None:
    waits = [keeper.backoff(attempt) for attempt in range(12)]
    assert waits == sorted(waits) and waits[0] < 1 and waits[-1] == keeper.MAX_BACKOFF_SECONDS


def test_waiting_for_a_worker_is_told_apart_from_running() -> None:
    async def main() -> list[Result]:
        with Sandbox(Limits(wall_seconds=1), workers=2) as sandbox:
            return await asyncio.gather(
                *(sandbox.run("import time\ntime.sleep(0.4)") for _ in range(8))
            )

    results = asyncio.run(main())
    assert all(result.ok and result.execution_time >= 0.4 for result in results)
    waited = sorted(result.queue_seconds for result in results)
    assert (
        waited[1] < 0.3 <= waited[3] and waited[-1] > 1.0
    )  # longer than the limit, which it doesn't touch


def test_a_late_supervisor_counts_as_waiting_and_a_late_caller_does_not(
    default_sandbox: Sandbox,
) -> None:
    os.kill(default_sandbox.pid, signal.SIGSTOP)
    try:
        future = in_background(default_sandbox, "1")
        time.sleep(0.4)
    finally:
        os.kill(default_sandbox.pid, signal.SIGCONT)
    assert future.result(timeout=30).queue_seconds > 0.3

    async def late() -> Result:
        call = asyncio.create_task(default_sandbox.run("1"))
        await asyncio.sleep(0)
        time.sleep(0.6)
        return await call

    assert asyncio.run(late()).queue_seconds < 0.5


def test_a_late_supervisor_does_not_make_programs_late(default_sandbox: Sandbox) -> None:
    """They ended in time, and their time is their own."""

    async def main() -> list[Result]:
        program = "import time\ntime.sleep(0.3)"
        calls = [asyncio.create_task(default_sandbox.run(program, timeout=0.8)) for _ in range(3)]
        await asyncio.sleep(0.15)
        os.kill(default_sandbox.pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(default_sandbox.pid, signal.SIGCONT)
        return await asyncio.gather(*calls)

    for result in asyncio.run(main()):
        assert result.ok, result
        assert result.execution_time < 0.8 and result.queue_seconds > 0.4


def test_a_late_fork_server_does_not_make_programs_late(default_sandbox: Sandbox) -> None:
    assert default_sandbox.run_blocking("1").ok
    os.kill(default_sandbox.server_pids[0], signal.SIGSTOP)
    try:
        future = in_background(default_sandbox, "1", timeout=0.5)
        time.sleep(0.9)
    finally:
        os.kill(default_sandbox.server_pids[0], signal.SIGCONT)
    assert future.result(timeout=30).ok


def test_a_child_that_is_late_to_read_its_program_holds_up_no_other(
    default_sandbox: Sandbox,
) -> None:
    assert default_sandbox.run_blocking("1").ok and settled(default_sandbox)
    waiting: list[int] = []
    while len(waiting) < default_sandbox.workers:  # confined, all of them
        waiting = [
            pid
            for pid in descendants(default_sandbox.pid)
            if "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
        ]
    os.kill(waiting[0], signal.SIGSTOP)
    long = "len(input())"  # more than a socket holds

    async def main() -> list[Result]:
        calls = [default_sandbox.run(long, "x" * (4 << 20), timeout=1.5) for _ in range(2)]
        return await asyncio.gather(*calls, default_sandbox.run("1"))

    results = asyncio.run(main())
    late = [result for result in results if result.status == "timeout"]
    assert len(late) == 1 and not late[0].stdout
    others = [result for result in results if result not in late]
    assert [result.stdout for result in others] == [f"{4 << 20}\n", "1\n"]
    assert all(result.queue_seconds < 8 for result in others)


def ended(family: list[int]) -> bool:
    """Whether these processes are gone, within a while."""
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in family) and time.monotonic() < end:
        time.sleep(0.02)
    return not [pid for pid in family if os.path.exists(f"/proc/{pid}")]


def test_close_ends_everything_and_answers_everybody() -> None:
    sandbox = Sandbox(Limits(), workers=2)
    family = [sandbox.pid, *descendants(sandbox.pid)]
    futures = [in_background(sandbox, SLEEPS.format(seconds=60)) for _ in range(5)]
    time.sleep(0.2)
    sandbox.close()
    assert {future.result(timeout=30).status for future in futures} == {"sandbox_error"}
    assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")]
    assert not os.path.exists(sandbox.scratch)
    assert sandbox.run_blocking("1").status == "sandbox_error"
    sandbox.close()


def test_a_forgotten_sandbox_ends_with_its_process() -> None:
    code = "from retool.sandbox import Sandbox\ns = Sandbox(workers=1)\nprint(s.pid, s.scratch, s.run_blocking('1+1').stdout)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    pid, scratch, printed = done.stdout.split()
    assert printed == "2" and not os.path.exists(f"/proc/{pid}") and not os.path.exists(scratch)


def test_importing_it_is_light() -> None:
    code = "import sys, retool.sandbox\nassert not {'torch', 'numpy', 'httpx', 'transformers'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="strict"):
        Sandbox(isolation="lax")  # type: ignore[arg-type]
    wrong: dict[str, Any]
    for wrong in ({"memory_mb": 0}, {"output_kb": 1.5}, {"cpu_seconds": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* above 0"):
            Limits(**wrong)
    for wrong in ({"workers": 0}, {"workers": 2.5}, {"servers": 1.5}):
        with pytest.raises(ValueError, match="must be a whole number, at least 1"):
            Sandbox(**wrong)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"timeout": 0}, "wall_seconds=0 must"),
        ({"timeout": math.inf}, "wall_seconds=inf must"),
        ({"timeout": math.nan}, "wall_seconds=nan must"),
        ({"memory_mb": 1.5}, "memory_mb=1.5 must be a whole number"),
        ({"memory_mb": 1 << 50}, "1,000,000,000 at most"),
        ({"files": {"a": b"", "a/b": b""}}, "'a/b' can't lie in 'a'"),
        ({"files": {".stdin": b""}, "stdin": "x"}, "taken where there is stdin"),
        ({"files": {"a": bytes(20 << 20)}, "stdin": "x" * (13 << 20)}, "have 33.0 MB"),
    ],
)
def test_what_can_not_be_asked_is_refused_before_it_reaches_others(
    default_sandbox: Sandbox, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        default_sandbox.run_blocking("1", **asked)
    assert default_sandbox.restarts == 0


def leaks(sandbox: Sandbox, calls: int) -> None:
    """Processes, descriptors, memory and files are where they were, after `calls` calls of every
    outcome.
    """
    programs = [
        "print(1+1)",
        "1/0",
        "open('f', 'w').write('x' * 10000)",
        "import os\nos._exit(3)",
        "import os\nos.fork()",
    ]

    def state() -> tuple[int, int, int]:
        assert settled(sandbox)
        files = 0
        while (
            now := len(os.listdir(f"/proc/{sandbox.pid}/fd"))
        ) != files:  # the server closes a child's a moment after the child is gone
            files = now
            time.sleep(0.2)
        with open(f"/proc/{sandbox.pid}/statm") as file:
            memory = int(file.read().split()[1]) * 4096
        return files, memory, len(os.listdir(sandbox.scratch))

    async def main(count: int) -> None:
        for start in range(0, count, 100):
            results = await asyncio.gather(
                *(
                    sandbox.run(programs[i % len(programs)])
                    for i in range(start, min(start + 100, count))
                )
            )
            assert not [result for result in results if result.status not in ("success", "error")]

    asyncio.run(main(50))
    before = state()
    asyncio.run(main(calls))
    after = state()
    assert after[0] == before[0]
    assert after[1] - before[1] < 8 << 20
    assert after[2] == before[2]


def test_no_leak_over_50_calls(default_sandbox: Sandbox) -> None:
    leaks(default_sandbox, 50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_leak_over_100000_calls(default_sandbox: Sandbox) -> None:
    leaks(default_sandbox, 100_000)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGUSR1", "SIGABRT"])
def test_signals_to_itself_end_a_program(arenas: list[Arena], name: str) -> None:
    """No program is the first of its pid namespace, whom signals pass by."""
    for arena in arenas:
        result = arena.sandbox.run_blocking(
            f"import os, signal\nos.kill(os.getpid(), signal.{name})\nprint('still here')"
        )
        assert (result.status, result.stdout, result.reason) == (
            "error",
            "",
            f"killed by {name}",
        ), arena.mode.name
        again = arena.sandbox.run_blocking(
            "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass"
        )
        assert again.reason == "killed by SIGALRM", arena.mode.name


def test_programs_in_every_mode(arenas: list[Arena]) -> None:
    """What ordinary programs do goes on working, whatever isolates them: event loops, processes of
    their own, signals to those.
    """
    programs = {
        "import sympy\nsympy.sqrt(8)": "2*sqrt(2)\n",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nasyncio.run(f())": "3\n",
        "import multiprocessing as m, time\np = m.get_context('fork').Process(target=time.sleep, args=(60,))\np.start()\np.terminate()\n"
        "p.join()\np.exitcode": "-15\n",
        "import os\nif os.fork() == 0:\n    os.abort()\nos.wait()[1]": "6\n",
        "import os, sqlite3\nc = sqlite3.connect('a.db')\nc.execute('pragma journal_mode=memory')\nc.execute('create table t(x)')\n"
        "c.commit()\nos.path.exists('a.db')": "True\n",
        "import os\n(os.uname().nodename, os.getpriority(os.PRIO_PROCESS, 0))": "('sandbox', 10)\n",
    }
    for arena in arenas:
        for program, printed in programs.items():
            result = arena.sandbox.run_blocking(program)
            assert (result.status, result.stdout) == ("success", printed), (
                arena.mode.name,
                program,
                result,
            )


def test_an_interpreter_behind_a_link_below_the_temporary_folder(tmp_path) -> None:
    """Where a virtual environment is linked into a checkout in /tmp, say."""
    (tmp_path / "venv").symlink_to(sys.prefix)
    with Sandbox(python=str(tmp_path / "venv" / "bin" / "python"), workers=1) as sandbox:
        assert asyncio.run(sandbox.run("import numpy\nprint(numpy.add(1, 1))")).stdout == "2\n"


def test_a_session_and_stdin_in_every_mode(arenas) -> None:
    """What a program leaves is there for the next one, whatever isolates them; the next sandbox but
    one has nothing of it.
    """
    for arena in arenas:
        sandbox = arena.sandbox
        first = sandbox.run_blocking("print(input())", "asked")
        assert first.stdout == "asked\n", arena.mode.name

        async def both(used: Sandbox = sandbox) -> tuple[Result, Result, Result]:
            defined = await used.run("def f(x): return x + a\na = 1", session=b"")
            return (
                defined,
                await used.run("print(f(2))", session=defined.session),
                await used.run("print('a' in globals())", session=b""),
            )

        defined, again, other = asyncio.run(both())
        assert defined.session and again.stdout == "3\n", arena.mode.name
        assert other.stdout == "False\n" and other.session


def test_packages_are_searched_by_their_real_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has a /tmp of its own: links there, an environment's too, lead nowhere."""
    (tmp_path / "real" / "numpy").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    origin = tmp_path / "link" / "numpy" / "__init__.py"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(origin))
    )
    assert spawn.import_path() == [str(tmp_path / "real")]
