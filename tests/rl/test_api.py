"""`retool.rl(…)`: the command's own run from Python, with functions as reward and tools."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import retool
from retool.metrics import read_jsonl
from retool.rl import RLConfig
from retool.rl.__main__ import main
from retool.rl.agent.tools import FunctionTool, ToolResult
from retool.rl.agent.tools.interpreter import InterpreterConfig
from retool.rl.agent.tools.load import RunLimits, make_tools
from retool.rl.reward.calling import Asked, adapted
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.source import find_reward, own_reward
from tests.rl.test_command import TORCHRUN, words

# As in a notebook: of no module that could be imported, with what it needs around it
CELL = """
import re
WANTED = re.compile(r"[0-9]")

def share(text):
    return len(WANTED.findall(text)) / max(1, len(text))

def digits(completion, extra_info):
    return {"score": share(completion), "turns": extra_info["num_turns"]}
"""
REWARD_FILE = CELL.replace(
    "completion, extra_info", "data_source, solution_str, ground_truth, extra_info"
)
SMALL = {"actor_rollout_ref.rollout.max_num_seqs": 16, "reward_model.num_workers": 1}


def cell(name: str) -> Callable[..., Any]:
    """A function of `CELL`, as a notebook's cell defines it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(CELL, names)
    return names[name]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that a run logged, but for times and what they make of tokens."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(("timing_s", "perf"))}
        for entry in read_jsonl(folder / "metrics.jsonl")
    ]


def rows_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]


def improve(work: Path, out: Path, **more: Any) -> retool.Result:
    """The small run of `words`, for two steps."""
    asked = {
        "prompts": str(work / "train.jsonl"),
        "learning_rate": 1e-2,
        "batch_size": 4,
        "num_generations": 4,
        "max_prompt_length": 400,
        "max_completion_length": 12,
        "max_steps": 2,
        "quiet": True,
        **more,
        "options": {**SMALL, **more.get("options", {})},
    }
    return retool.rl(work / "model", output_dir=out, **asked)


def test_it_is_the_commands_run(work: Path, tmp_path: Path) -> None:
    """With a reward and rows that a notebook holds, inside its event loop, twice."""
    (tmp_path / "reward.py").write_text(
        REWARD_FILE.replace("share(completion)", "share(solution_str)")
    )
    path = f"custom_reward_function.path={tmp_path}/reward.py"
    name = "custom_reward_function.name=digits"
    asked = [*words(work, tmp_path / "command", "trainer.total_training_steps=2"), path, name]
    assert main(asked) == 0
    told: list[tuple[int, Mapping[str, float]]] = []

    async def notebook() -> list[retool.Result]:
        return [
            improve(
                work,
                tmp_path / f"run{number}",
                prompts=rows_of(work),
                reward=cell("digits"),
                on_step=lambda step, metrics: told.append((step, metrics)),
            )
            for number in range(2)
        ]

    first, second = asyncio.run(notebook())
    assert numbers(first.folder) == numbers(second.folder) == numbers(tmp_path / "command")
    assert first.finished and first.model is not None and (first.model / "config.json").is_file()
    assert [step for step, _ in told] == [1, 2, 1, 2]
    assert all("critic/score/mean" in metrics for _, metrics in told)
    # What made it can't be told from a file, so the command doesn't go on from there
    assert "path: <program>" in (first.folder / "config.yaml").read_text()
    other = cell("digits")
    other.__code__ = other.__code__.replace(co_consts=(None, "score", "turn", "turns"))
    with pytest.raises(retool.Refused, match="reward function"):
        improve(work, first.folder, reward=other, prompts=rows_of(work), max_steps=3)


def add(numbers: list[int]) -> int:
    """Adds numbers.

    Args:
        numbers: What to add.
    """
    return sum(numbers)


def test_functions_are_tools(work: Path, tmp_path: Path) -> None:
    """The model is told of them; what it made up is no call; objects are closed at the end."""
    closed: list[str] = []

    class Own(FunctionTool):
        async def close(self) -> None:
            closed.append(self.name)

    rows = rows_of(work)[:4]
    result = improve(
        work,
        tmp_path,
        prompts=rows,
        reward=cell("digits"),
        tools=[Own(add)],
        max_steps=1,
        max_prompt_length=800,
    )
    assert closed == ["add"] and result.last["tool/calls"] == 0
    with retool.LLM(work / "model", device="cpu") as llm:
        longest = max(len(llm.render(row["prompt"], [add])) for row in rows)
    assert result.last["prompt_length/max"] == longest


def test_a_function_answers_calls() -> None:
    threads: set[int | None] = set()

    def where(x: int, scale: float = 1.0) -> dict[str, float]:
        """Says where.

        Args:
            x: Place.
            scale: Of it.
        """
        threads.add(threading.current_thread().ident)
        if x < 0:
            raise LookupError("nowhere")
        return {"x": x * scale}

    async def slow(x: int) -> str:
        """Waits.

        Args:
            x: How often.
        """
        await asyncio.sleep(0)
        return "é" * x

    def whole(x: int) -> ToolResult:
        """All of it.

        Args:
            x: Any.
        """
        return ToolResult(str(x), "error")

    async def ask() -> None:
        tool = FunctionTool(where)
        answers = await asyncio.gather(*(tool.call({"x": x, "scale": 2}) for x in range(3)))
        assert [answer.text for answer in answers] == ['{"x": 0}', '{"x": 2}', '{"x": 4}']
        assert {answer.status for answer in answers} == {"success"}
        assert threading.current_thread().ident not in threads
        wrong = await tool.call({"x": 1, "y": 2})
        assert wrong.status == "bad_arguments" and "'y'" in wrong.text
        with pytest.raises(LookupError):
            await tool.call({"x": -1})
        assert (await FunctionTool(slow).call({"x": 2})).text == "éé"
        assert (await FunctionTool(whole).call({"x": 2})).status == "error"

    asyncio.run(ask())


def test_what_tools_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    (function, given) = make_tools([add, FunctionTool(add, schema_named("sum"))])
    assert (function.name, given.name) == ("add", "sum")
    made: list[InterpreterConfig] = []

    def interpreter(config: InterpreterConfig, _schema: Any) -> FunctionTool:  # no sandbox
        made.append(config)
        return FunctionTool(add, schema_named("code_interpreter"))

    monkeypatch.setattr("retool.rl.agent.tools.load.CodeInterpreter", interpreter)
    (tool,) = make_tools(["code_interpreter"], RunLimits(workers=3))
    assert tool.name == "code_interpreter" and made[0].workers == 3
    for wrong, said in (
        ([add, add], "names must differ"),
        ([3], "3 is no tool"),
        ([lambda x: x], "def"),
    ):
        with pytest.raises(ValueError, match=said):
            make_tools(wrong)


def schema_named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {}}}


def test_a_reward_takes_what_it_names() -> None:
    given = {
        "data_source": "s",
        "solution_str": "text",
        "ground_truth": "4",
        "extra_info": {"a": 1},
    }

    def everything(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Any
    ) -> float:
        return 1.0

    assert adapted(everything, "it", "everything") is everything
    assert adapted(lambda completion: completion, "it", "f")(**given) == "text"  # type: ignore[arg-type]
    assert adapted(lambda ground_truth, k=3: (ground_truth, k), "it", "f")(**given) == ("4", 3)  # type: ignore[arg-type]

    async def later(completion: str) -> str:
        return completion

    assert asyncio.run(adapted(later, "it", "later")(**given)) == "text"  # type: ignore[arg-type]
    for wrong in (lambda: 1.0, lambda completion, prompt: 1.0):
        with pytest.raises(ValueError, match="leave some of these out"):
            adapted(wrong, "it", "wrong")


def test_a_programs_function_is_judged_by_in_another_process() -> None:
    """With what it refers to, and none of it the program's."""
    source = own_reward(cell("digits"))
    assert source.is_users and source.name == "digits"
    with RewardPool(source, workers=1) as pool:
        assert pool.problem() == ""
        judged = asyncio.run(pool.score(Asked("s", "a1b2", "", {"num_turns": 2})))
    assert (judged.score, judged.info["turns"]) == (0.5, 2)
    endless = iter(int, 1)
    going = (number for number in endless)
    with pytest.raises(ValueError, match="can't be sent to the processes that judge"):
        RewardPool(own_reward(lambda completion: float(next(going))))
    with pytest.raises(ValueError, match="started by a program"):
        find_reward(None, "<program>", "digits")


def test_all_faults_are_raised_at_once(work: Path, tmp_path: Path) -> None:
    with pytest.raises(retool.Refused) as caught:
        improve(
            work,
            tmp_path / "run",
            reward=lambda answer: 1.0,
            tools=[add, add],
            options={"actor_rollout_ref.rollout.temprature": 0},
            learning_rate=-1,
        )
    text = str(caught.value)
    for part in ("temprature", "optim.lr=-1", "names must differ", "leave some of these out"):
        assert part in text, text
    with pytest.raises(TypeError, match=r"reward_funcs: did you mean reward\?"):
        retool.rl(reward_funcs=[])  # pyright: ignore[reportCallIssue]
    assert RLConfig().data.train_batch_size == 512


SCRIPT = """
import retool

def vowels(completion):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))

result = retool.rl({model!r}, {prompts!r}, reward=vowels, output_dir={out!r}, batch_size=4, max_steps=1,
                   num_generations=2, max_prompt_length=400, max_completion_length=8, quiet=True)
print("once", result.step)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TORCHRUN[1:-2]], ids=["alone", "torchrun"])
def test_a_script_needs_no_main_guard(work: Path, tmp_path: Path, launcher: list[str]) -> None:
    script = tmp_path / "script.py"
    out = tmp_path / "run"
    paths = {"model": str(work / "model"), "prompts": str(work / "train.jsonl"), "out": str(out)}
    script.write_text(SCRIPT.format(**paths))
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["once", "1"] * (2 if launcher else 1)
