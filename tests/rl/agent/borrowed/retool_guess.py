"""A taskset of the package verifiers whose environment is the model's partner: guess a number."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    number: int
    raises: bool = False


class GuessTask(vf.Task[GuessData]):
    async def finalize(self, trace: vf.Trace) -> None:
        if self.data.raises:
            raise OSError("the referee is away")


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"})
    second: vf.AgentConfig = vf.AgentConfig()
    most: int = 4
    pairs: bool = False


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        score = 0.0
        async with agents.player.interaction(task) as talk:
            said = await talk.turn()
            for _ in range(self.config.most):
                if said.terminated:
                    break
                if said.last_reply == str(task.data.number):
                    score = 1.0
                    break
                said = await talk.turn("It is another one.")
        talk.trace.record_reward("guessed", score + talk.trace.num_turns / 100)
        if self.config.pairs:
            await agents.second.run(task)


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for number in (3, 7):
            yield GuessTask(GuessData(prompt="Guess my number.", number=number), self.config.task)
