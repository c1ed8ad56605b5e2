"""A taskset of the package verifiers: sums, with a tool that a server of its own has."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumData(vf.TaskData):
    answer: int


class SumState(vf.State):
    calls: int = 0


class Adder(vf.Toolset[vf.ToolsetConfig, SumState]):
    TOOL_PREFIX = "sums"

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Adds two numbers."""
        self.state.calls += 1
        return str(a + b)


class SumTask(vf.Task[SumData, SumState]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in (trace.last_reply or ""))

    @vf.reward(weight=0.5)
    async def called(self, trace: vf.Trace) -> float:
        return float(trace.state.calls)

    @vf.stop
    async def begs(self, trace: vf.Trace) -> bool:
        return "please" in (trace.last_reply or "")

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [Adder(vf.ToolsetConfig())]


class SumsTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            number += 1
            prompt = f"What is {number} + {2 * number}?"
            data = SumData(prompt=prompt, system_prompt="Add.", answer=3 * number)
            yield SumTask(data, self.config.task)


if __name__ == "__main__":
    Adder.run()
