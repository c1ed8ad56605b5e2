"""The code interpreter's session: what lives on between an answer's calls, what doesn't, and that
answers don't see each other's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools import interpreter
from retool.rl.agent.tools.interpreter import CodeInterpreter, InterpreterConfig
from retool.rl.agent.tools.load import RunLimits, load_tools
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.agent.tools.session import ENDED, UNDONE, InterpreterSession
from retool.rl.preflight.interpreters import row_file_faults
from retool.rl.types import Stop
from tests.rl.agent.test_rollout import called, parts_of, prompt_of
from tests.rl.agent.test_sandboxed import check_played, source_in


@pytest.fixture(scope="module")
def tool() -> Iterator[InterpreterSession]:
    try:
        runs = CodeInterpreter(InterpreterConfig(workers=2, default_timeout=10, session=True))
    except (ValueError, OSError) as error:
        pytest.skip(f"no sandbox here: {error}")
    yield InterpreterSession(runs)
    asyncio.run(runs.close())


def talk(tool: InterpreterSession, *programs: str) -> list[ToolResult]:
    """Answers to the calls of one session."""

    async def main() -> list[ToolResult]:
        state = await tool.open_state({})
        return [await tool.call_state(state, {"code": code}) for code in programs]

    return asyncio.run(main())


def test_variables_files_and_what_they_share_live_on(tool) -> None:
    defines = """
import math
import random
import numpy as np
from dataclasses import dataclass
xs = ys = [1]
def longer(by):
    global last
    last = by
    return len(xs) + by
@dataclass
class Point:
    x: int
    def moved(self):
        return Point(self.x + longer(0))
here = Point(4)
table = np.arange(4)
open("data.txt", "w").write("kept")
drawn = random.random(), np.random.random()
"""
    uses = """
ys.append(2)
print(xs, longer(10), last, here.moved(), isinstance(here, Point), table.sum(), math.floor(2.5))
print(open("data.txt").read(), random.random() not in drawn, np.random.random() not in drawn)
xs
"""
    first, second = talk(tool, defines, uses)
    assert first.text == "[no output]"
    assert second.text.splitlines() == [
        "[1, 2] 12 10 Point(x=6) True 6 2",
        "kept True True",
        "[1, 2]",
    ]


def test_a_row_s_files_are_there_when_a_session_begins(tool) -> None:
    row = of_row({"data.csv": "town,price\nRiga,5\n", "of_other_rows.csv": None})

    async def main() -> list[ToolResult]:
        state = await tool.open_state(row)
        programs = (
            "import os\nprint(open('data.csv').read(), 'of_other_rows.csv' in os.listdir())",
            "open('data.csv', 'a').write('Rome,7\\n')\nprint(len(open('data.csv').readlines()))",
            "print(open('data.csv').read().split()[-1])\nopen('data.csv', 'w').close()\nos._exit(0)",
            "print(len(open('data.csv').readlines()))",
        )
        return [await tool.call_state(state, {"code": code}) for code in programs]

    first, changes, last, after = [result.text for result in asyncio.run(main())]
    assert first.split() == ["town,price", "Riga,5", "False"]
    assert changes.splitlines()[-1] == "3"
    assert last.startswith("Rome,7\n") and last.endswith(UNDONE) and after == "3"


def test_without_a_session_a_row_s_files_are_there_in_each_call(tool) -> None:
    files = of_row({"a.txt": "ä"})["extra_info"]["tools_kwargs"]["code_interpreter"][
        "execute_kwargs"
    ]
    call = {"code": "print(open('a.txt').read())\nopen('a.txt', 'w').close()", **files}
    results = [asyncio.run(tool.interpreter.call(call)).text for _ in range(2)]
    assert results == ["ä", "ä"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["data.csv"], "execute_kwargs.files is a list: give a mapping from file names to texts"),
        ({"data.csv": 5}, "'data.csv' is a int: give its text"),
        ({"../data.csv": ""}, "file name '../data.csv' must be a relative path"),
    ],
)
def test_a_row_s_files_of_another_form_are_refused(tool, files, said) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        asyncio.run(tool.open_state(of_row(files)))


def test_a_row_s_files_of_another_form_are_told_before_the_run(tool) -> None:
    rows = [{"row": f"rows.jsonl, row {i}"} for i in range(3)]
    rows[1] |= of_row({"data.csv": ""})["extra_info"]
    rows[2] |= of_row(["data.csv"])["extra_info"]
    prompts = [SimpleNamespace(extra_info=row) for row in rows]
    report: Any = SimpleNamespace(tools=(tool,), train=SimpleNamespace(prompts=prompts), val=None)
    (fault,) = row_file_faults(report)
    assert str(fault).startswith("data.train_files: rows.jsonl, row 2: extra_info.tools_kwargs.")
    assert "give a mapping from file names to texts" in fault.problem


def of_row(files: object) -> dict[str, Any]:
    """A row with `files` for the interpreter."""
    kwargs = {"code_interpreter": {"execute_kwargs": {"files": files}}}
    return {"extra_info": {"tools_kwargs": kwargs}}


def test_what_was_there_before_an_error_is_kept(tool) -> None:
    broken, exits, after = talk(tool, "a = 1\n1 / 0", "import sys\nb = 2\nsys.exit(3)", "a + b")
    assert broken.status == exits.status == "error" and ENDED not in broken.text + exits.text
    assert after.text == "3"


def test_what_can_t_be_kept_is_told_and_the_rest_is_kept(tool) -> None:
    first, second, third = talk(
        tool,
        "a = [1]\nb = a\ng = (i for i in a)",
        "b.append(2)\nprint(a)\ng",
        "try:\n    g\nexcept NameError:\n    g = 3\nother",
    )
    assert "[not kept for the next call: g (generator)]" in first.text
    assert second.text.startswith("[1, 2]\n") and "NameError: name 'g'" in second.text
    told = "[g (generator) was defined by an earlier call, and couldn't be kept]"
    assert second.text.endswith(told)
    assert "NameError: name 'other'" in third.text and "couldn't" not in third.text


def test_what_was_shown_last_lives_on_or_is_not_missed(tool) -> None:
    texts = [result.text for result in talk(tool, "[1, [2]]", "_ + [3]", "(i for i in [])", "_")]
    assert texts[:2] == ["[1, [2]]", "[1, [2], 3]"]
    assert texts[2].startswith("<generator") and "kept" not in texts[2]
    assert "NameError: name '_' is not defined" in texts[3]


def test_what_is_lost_is_told_although_the_program_floods_its_output(tool) -> None:
    (only,) = talk(tool, "g = (i for i in [])\nprint('x' * 200_000)\ng")
    assert only.text.endswith("[not kept for the next call: g (generator)]")


def test_what_runs_or_leads_out_of_the_program_is_not_kept(tool) -> None:
    runs = """
import gzip, sqlite3, subprocess, sys, threading, time, types
waits = threading.Thread(target=time.sleep, args=(60,), daemon=True)
waits.start()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
table = sqlite3.connect(":memory:")
packed = gzip.open("a.gz", "wb")
lines = gzip.open("a.gz", "rt")
sys.modules["made"] = types.ModuleType("made")
sys.modules["made"].part = part = [1, [2]]
done = threading.Thread(target=len, args=("",))
done.start()
"""
    first, second = talk(tool, runs, "print(done.is_alive(), part)\nwaits")
    lost = "waits (Thread), child (Popen), table (Connection), packed (GzipFile), lines (TextIOWrapper)"
    assert first.text == f"[not kept for the next call: {lost}]"
    assert second.text.startswith("False [1, [2]]\n")


def test_classes_files_and_what_libraries_are_set_to_live_on(tool) -> None:
    """What dill alone would lose, or bring back as something else, without a word."""
    defines = """
import decimal, enum, mpmath, os, sys, typing, warnings
import numpy as np
from sympy import *
x = symbols("x")
known = {(i, i + 1): x for i in range(100)}
os.makedirs("below/empty")
os.chdir("below")
class Colour(enum.Enum):
    RED = 1
    ALIAS = 1
    BLUE = "b"
    def shout(self): return self.name + "!"
class Planet(enum.Enum):
    EARTH = (2, 3)
    def __init__(self, mass, radius): self.mass = mass
T = typing.TypeVar("T", bound=int)
class Box(typing.Generic[T]):
    pass
red = Colour.RED
written = open("out.txt", "w")
written.write("first ")
open("in.txt", "w").write("one\\ntwo\\n")
read = open("in.txt")
read.readline()
with open("in.txt") as closed: pass
table = np.arange(6).reshape(2, 3)
row = table[1]
primes = [True] * 1000
same = primes
say = sys.stdout.write
sys.setrecursionlimit(4321)
decimal.getcontext().prec = 5
mpmath.mp.dps = 40
np.set_printoptions(precision=2)
warnings.simplefilter("ignore")
os.environ["TOWN"] = "Riga"
os.symlink("in.txt", "link")
6 * 7
"""
    uses = """
print(_, red is Colour.RED, Colour.ALIAS is red, red.shout(), Colour("b"), Planet.EARTH.mass)
print(Box[int], T.__bound__)
print(written.write("second"), written.flush(), read.readline().strip(), closed.closed)
print(diff(x ** 2), RR.is_Exact, known[7, 8] is x)
row[0] = 9
same[3] = False
say(f"{table[1, 0]} {primes[3]}\\n")
print(sys.getrecursionlimit(), decimal.Decimal(1) / 3, mpmath.mp.dps, np.array([1 / 3]), os.environ["TOWN"])
warnings.warn("nobody is to see this")
print(open("out.txt").read(), open("link").read().split())
print(sorted(os.listdir(".")), os.listdir(".."))
"""
    first, second = talk(tool, defines, uses)
    assert first.text == "42"
    assert second.text.splitlines() == [
        "42 True True RED! Colour.BLUE 2",
        "__main__.Box[int] <class 'int'>",
        "6 None two True",
        "2*x False True",
        "9 False",
        "4321 0.33333 40 [0.33] Riga",
        "first second ['one', 'two']",
        "['empty', 'in.txt', 'link', 'out.txt'] ['below']",
    ]
    assert talk(tool, defines, "pass", uses)[2].text == second.text


@pytest.mark.parametrize(
    ("death", "said"),
    [
        pytest.param("import os; os._exit(0)", "[no output]", marks=pytest.mark.slow),
        ("a = 2\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        pytest.param("b = bytearray(2 << 30)", "MemoryError", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_dies_loses_what_it_did_and_no_more(tool, death, said) -> None:
    defines = "a = 1\nopen('a.txt', 'w').write('kept')"
    _, died, after = talk(tool, defines, death, "print(a, open('a.txt').read())")
    assert said in died.text and died.text.endswith(UNDONE)
    assert after.text == "1 kept"


def test_half_a_snapshot_is_none(tool) -> None:
    """What a program leaves is written when it has ended, and there may be no room for it."""
    no_room = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))"
    _, ended, after = talk(tool, "a = 1", no_room, "print(a)")
    assert ended.text.endswith(UNDONE) and after.text == "1"


def test_where_there_is_too_much_the_largest_are_left_out(tool) -> None:
    """Also a file; and what is larger than a program's own memory would let it be copied."""
    large = """
small = 3
data = b"." * (13 << 20)
huge = bytearray(65 << 20)
with open("data.bin", "wb") as file: file.write(data)
"""
    first, second = talk(tool, large, "import os\nprint(small, os.listdir())\ndata")
    told = first.text
    assert "data (bytes, 13 MB)" in told and "data.bin (a file of 13 MB)" in told
    assert "huge (bytearray, more than 64 MB)" in told
    assert told.endswith("; a session keeps 12 MB at most]")
    assert second.text.startswith("3 []\n") and "[data (bytes, 13 MB) was" in second.text


def test_the_session_s_time_is_bounded_and_so_is_a_call_s(tool) -> None:
    config = InterpreterConfig(workers=2, default_timeout=0.6, session=True, session_timeout=1.0)
    kept = tool.interpreter.config
    tool.interpreter.config = config
    try:
        results = talk(tool, "a = 1", *["import time; time.sleep(5)"] * 3)
    finally:
        tool.interpreter.config = kept
    assert [result.status for result in results[1:]] == ["timeout"] * 3
    assert results[1].text.endswith(UNDONE)
    assert results[-1].text == "TimeoutError: the session's 1 s are used up."


def test_what_can_t_be_restored_costs_no_other(tool) -> None:
    """Also where it is read first, and those after it are made by the same functions."""
    defines = """
import sys, types
made = types.ModuleType("made")
sys.modules["made"] = made
class Breaks:
    def __setstate__(self, state): raise ValueError("half made")
inner = [Breaks, 1]
part = Breaks()
part.inner = inner
class Later:
    pass
later = Later()
def seven(): return 7
holds = {"part": part}
"""
    first, second = talk(tool, defines, "print(inner, isinstance(later, Later), seven())\nholds")
    assert first.text == "[no output]"
    lines = second.text.splitlines()
    assert lines[0] == "[<class '__main__.Breaks'>, 1] True 7"
    assert lines[1].startswith("[made can't be restored: ModuleNotFoundError:")
    assert lines[2] == "[part can't be restored: ValueError: half made]"
    assert lines[3] == "[holds can't be restored: it shares something with what can't be restored]"


def test_objects_that_do_harm_when_they_are_kept_or_restored_harm_their_session(tool) -> None:
    leaves = """
class Exits:
    def __reduce__(self):
        return (exit, (7,))
bad = Exits()
a = 1
"""
    first, second, third = talk(tool, leaves, "print(a)\nbad", "print(3)")
    assert first.text == "[no output]"
    assert "[bad can't be restored: SystemExit: 7]" in second.text
    assert second.text.startswith("1\n") and "NameError: name 'bad'" in second.text
    assert third.text == "3"
    dies = leaves.replace("exit, (7,)", "__import__('os')._exit, (7,)")
    _, died, anew = talk(tool, dies, "a", "print('a' in globals())")
    assert died.text.endswith(ENDED) and anew.text == "False"
    stays = "class Sits:\n    def __reduce__(self): exit(7)\nbad = Sits()\na = 1"
    first, second = talk(tool, stays, "a")
    assert "not kept for the next call: bad (Sits)" in first.text and second.text == "1"


def test_a_program_may_break_its_own_output(tool) -> None:
    broken, after = talk(tool, "import sys\nsys.stdout = None\na = 1\ng = (i for i in [])", "a")
    assert "[not kept for the next call: g (generator)]" in broken.text and after.text == "1"


def test_in_a_rollout_each_answer_has_its_own(tool, renderer_of) -> None:
    renderer = renderer_of("hermes")
    script = {
        0: [called("a = 6"), called("print(a * 7)"), "42"],
        1: [called("print('a' in globals())"), "7"],
    }
    parts, _ = parts_of(renderer, script, tool)
    requests = [(prompt_of(renderer, i), k) for i in range(2) for k in range(2)]
    found = asyncio.run(roll_out(parts, requests, Sampling(), 0))
    assert found is not None
    texts = [renderer.tokenizer.decode(s.trajectory.tokens) for s in found]
    assert all(s.trajectory.stop is Stop.NO_CALL for s in found)
    assert ["\n42\n</tool_response>" in text for text in texts] == [True, True, False, False]
    assert all("\nFalse\n</tool_response>" in text for text in texts[2:])


def test_it_is_asked_for_by_a_key_or_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "_open_backend", lambda config: None)  # starts no sandbox
    (one,) = load_tools(None, RunLimits(workers=1, isolation="best_effort", session=True))
    file = tmp_path / "tools.yaml"
    entry = (
        "{class_name: retool.rl.agent.tools.CodeInterpreter, config: {workers: 1, session: true}}"
    )
    file.write_text(f"tools: [{entry}]")
    (two,) = load_tools(file, RunLimits(isolation="best_effort"))
    for made in (one, two):
        assert isinstance(made, InterpreterSession) and made.name == "code_interpreter"
        assert "Variables and files live on" in made.schema["function"]["description"]
    (stateless,) = load_tools(None, RunLimits(workers=1, isolation="best_effort"))
    assert "live on" not in str(stateless.schema)
    with pytest.raises(ValueError, match="session=true needs the sandbox of this machine"):
        InterpreterConfig(session=True, sandbox_fusion_url="http://localhost:1")


def test_an_environment_lives_on_in_the_sandbox(tool, tmp_path) -> None:
    make = source_in(tmp_path).load()
    make._interpreter = tool.interpreter
    check_played(make)
