"""The two commands that faults happen to: what a small run of each is asked, and what it leaves."""

from __future__ import annotations

import importlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.faults import Scene

STEPS = 4
ARR = "actor_rollout_ref."
REWARD = Path(__file__).with_name("reward.py")
PROGRAM = "print(6 * 7)"
FIRST_TURN = 6  # tokens


@dataclass(frozen=True)
class Command:
    """`python -m retool.NAME` as the campaign gives it.

    `make` makes the model and data of all its runs; `data` is the file that each has a copy of,
    and `keys` what a run of `STEPS` steps is asked, a save of each. `shards`: where in a
    checkpoint this command's are. `began` is called in each of its processes.
    """

    name: str
    data: str
    make: Callable[[Path], Path]
    keys: Callable[[Scene, Path, random.Random], dict[str, object]]
    shards: str
    began: Callable[[], None]

    def main(self, words: list[str]) -> int:
        return importlib.import_module(f"retool.{self.name}.__main__").main(words)

    def words(self, scene: Scene, work: Path, chance: random.Random) -> list[str]:
        return [f"{key}={value}" for key, value in self.keys(scene, work, chance).items()]


def _sft_keys(scene: Scene, work: Path, chance: random.Random) -> dict[str, object]:
    return {
        "data.train_files": scene.data,
        "model.partial_pretrain": work / "model",
        "trainer.default_local_dir": scene.out,
        "data.cache_dir": scene.cache,
        "data.train_batch_size": 4,
        "data.micro_batch_size_per_gpu": 2,
        "data.num_workers": 0,
        "optim.lr": 1e-3,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 1,
        "trainer.device": "cpu",
        "trainer.checkpoint.async_save": str(chance.random() < 0.5).lower(),
        **scene.keys,
    }


def _rl_keys(scene: Scene, work: Path, chance: random.Random) -> dict[str, object]:
    if not scene.reward.exists():
        shutil.copy(REWARD, scene.reward)
    return {
        "data.train_files": scene.data,
        f"{ARR}model.path": work / "model",
        "trainer.default_local_dir": scene.out,
        "data.train_batch_size": 4,
        "data.max_prompt_length": 400,
        "data.max_response_length": 60,
        f"{ARR}rollout.n": 2,
        f"{ARR}rollout.max_num_seqs": 8,
        f"{ARR}rollout.multi_turn.enable": "true",
        f"{ARR}rollout.multi_turn.tool_workers": 1,
        f"{ARR}actor.ppo_mini_batch_size": 4,
        f"{ARR}actor.optim.lr": 1e-3,
        f"{ARR}actor.checkpoint.async_save": str(chance.random() < 0.5).lower(),
        "custom_reward_function.path": scene.reward,
        "custom_reward_function.name": "digits",
        "reward_model.num_workers": 1,
        "reward_model.timeout_seconds": 20,  # of a busy machine
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 1,
        "trainer.deterministic": "true",
        "trainer.device": "cpu",
        **scene.keys,
    }


def _make_sft(folder: Path) -> Path:
    from tests.sft.conftest import make

    return make(folder)


def _make_rl(folder: Path) -> Path:
    from tests.rl.conftest import make

    return make(folder)


def _every_answer_calls_a_tool() -> None:
    """A random model writes no calls: each of its first turns ends early, and in one."""
    from retool.rl.agent import loop
    from retool.rl.agent.reading.call import Call

    real = loop.take_turn
    real_episode = loop.run_episode

    def take_turn(episode, turn, agent):
        if episode.assistant_turns or not agent.tools:
            return real(episode, turn, agent)
        episode.add_turn(turn, loop.turn_text(agent.renderer, turn.tokens))
        return None, [Call(next(iter(agent.tools)), {"code": PROGRAM})]

    async def run_episode(prompt, sample, generate, agent, version=0):
        turns = list[int]()

        async def short(ids, max_tokens):
            turns.append(1)
            return await generate(ids, FIRST_TURN if len(turns) == 1 else max_tokens)

        return await real_episode(prompt, sample, short, agent, version)

    loop.take_turn = take_turn
    importlib.import_module("retool.rl.agent.rollout").run_episode = run_episode


def _as_it_is() -> None:
    """Nothing is changed in the command's processes."""


SFT = Command("sft", "train.parquet", _make_sft, _sft_keys, "", _as_it_is)
RL = Command("rl", "train.jsonl", _make_rl, _rl_keys, "actor", _every_answer_calls_a_tool)
