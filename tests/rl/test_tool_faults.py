"""A run on two ranks whose tool breaks in every way: it goes on, everything is counted, and every
state that was opened is closed once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import warm
from tests.rl.test_command import ARR, TORCHRUN, steps, words

# What breaks depends on which of the four answers to a question it is. Every turn that ends calls.
TOOL = """
import asyncio
import os
from pathlib import Path

from retool.rl.agent.reading.call import Call

LOG = Path(__file__).with_suffix(".log")
SCHEMA = {"type": "function", "function": {"name": "flaky", "description": "Breaks.",
    "parameters": {"type": "object", "properties": {}}}}


def note(*words):
    with LOG.open("a") as file:
        file.write(" ".join(map(str, words)) + "\\n")


def always(text, tools):
    return [Call("flaky", {})]


class Flaky:
    schema = SCHEMA

    def open(self, row):
        key = f"{os.getpid()}-{row['index']}-{row['sample']}"
        if row["sample"] == 0:
            note("failed-open", key)
            raise OSError("no room for another")
        note("open", key)
        return {"key": key, "sample": row["sample"], "calls": 0}

    async def call(self, state, arguments):
        state["calls"] += 1
        if state["sample"] == 1:
            note("failed-call", state["key"])
            raise RuntimeError("broken")
        if state["sample"] == 3:
            note("hung", state["key"])
            await asyncio.sleep(600)
        return "fine", 0.5, state["calls"] == 2

    def close(self, state):
        note("close", state["key"])
        if state["sample"] == 2:
            note("failed-close", state["key"])
            raise ValueError("it is stuck")
"""


@pytest.mark.slow
def test_a_tool_that_breaks_on_two_ranks(work: Path, tmp_path: Path) -> None:
    file = tmp_path / "flaky.py"
    file.write_text(TOOL)
    more = [
        "trainer.total_training_steps=2",
        "data.max_response_length=600",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tools=[{file}/Flaky]",
        f"{ARR}rollout.multi_turn.format={file}/always",
        f"{ARR}rollout.multi_turn.tool_timeout_seconds=0.5",
        f"{ARR}rollout.max_lost_share=1.0",
    ]
    done = warm.run([*TORCHRUN, *words(work, tmp_path / "run", *more)], timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    events = [line.split() for line in file.with_suffix(".log").read_text().splitlines()]
    happened = Counter(event for event, _ in events)
    opened = Counter(key for event, key in events if event == "open")
    closed = Counter(key for event, key in events if event == "close")
    assert opened == closed and opened
    found = steps(tmp_path / "run")
    assert len(found) == 2
    counted = {
        "failed-open": "tool/failed_opens",
        "failed-call": "tool/failed_calls",
        "failed-close": "tool/failed_closes",
        "hung": "tool/timeouts",
    }
    for event, name in counted.items():
        assert sum(entry[name] for entry in found) == happened[event] > 0, event
    assert sum(entry["stop/done"] for entry in found) > 0
    assert sum(entry["stop/infrastructure"] for entry in found) == happened["failed-open"]
    assert len({key.split("-")[0] for key in opened}) == 2, "both ranks opened some"
