"""What a process keeps of a verifiers environment for all of its trajectories."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from retool.rl.agent.environments.loop_thread import LoopThread
from retool.rl.agent.environments.verifiers.conversation import Conversation
from retool.rl.agent.environments.verifiers.world import VerifiersWorld
from retool.rl.agent.extras import import_failed
from retool.rl.types import truth_as_text

HARNESS = "retool_in_process"  # what verifiers imports as the policy's program
SECONDS_TO_END = 20.0


class House:
    """An environment by its id, with `kwargs` as its configuration (verifiers' `EnvConfig`).

    `name` is a taskset's, or ENVIRONMENT+TASKSET where one plays the other's tasks. Called, it
    makes the world of a trajectory. Its servers start with the first, and end with `let_go`.
    ValueError where there is no such environment, or it can't be made so.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        try:
            from verifiers.v1 import ModelContext, TrainClientConfig, load_environment

            from retool.rl.agent.environments.verifiers import seat
        except ImportError as error:
            raise import_failed("verifiers", error) from error
        # verifiers finds programs by the name of a module that needs no folder
        sys.modules.setdefault(HARNESS, seat)
        self._client = seat.PolicyClient()
        # Nothing is ever sent there. A training client's answers are whole, streamed or not.
        config = TrainClientConfig(base_url="http://127.0.0.1:1", api_key_var="RETOOL_UNUSED")
        self._context = ModelContext("policy", config)
        try:
            self._env = load_environment(configured(name, kwargs))
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        self._thread = LoopThread("retool-verifiers")
        self._holder: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._ending = asyncio.Event()

    def __call__(self) -> VerifiersWorld:
        return VerifiersWorld(self.play, self._thread)

    @property
    def classes(self) -> tuple[type, ...]:
        """Whose code decides what happens there."""
        taskset = type(self._env.taskset)
        return type(self._env), taskset, taskset.task_type()

    def tasks(self) -> Iterator[Any]:
        """The taskset's, in its order."""
        return iter(self._env.taskset)

    def let_go(self) -> None:
        """End what was started. Worlds are closed before."""
        if self._thread.started:
            with suppress(TimeoutError):
                self._thread.wait(self._end(), SECONDS_TO_END)
            self._thread.end()

    # --- on the house's own event loop ---

    async def _serve(self) -> None:
        """Have the servers run; many that ask at once wait for one start."""
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._holder = asyncio.create_task(self._hold(self._ready))
        await asyncio.shield(self._ready)

    async def play(self, row: Mapping[str, Any], conversation: Conversation) -> Any:
        """An episode of the row's task: verifiers' record of it."""
        await self._serve()
        task = task_of(row, self._env)
        traces: list[str] = []

        def known(trace: Any) -> None:
            conversation.add_trace(trace)
            traces.append(trace.id)
            self._client.conversations[trace.id] = conversation

        try:
            return await self._env.run_episode(task, self._context, on_trace=known)
        finally:
            for trace in traces:
                self._client.conversations.pop(trace, None)

    async def _hold(self, ready: asyncio.Future[None]) -> None:
        """Whoever enters the servers' context has to leave it."""
        self._ending = asyncio.Event()
        try:
            async with self._env.serving():
                # The server makes a client for each configuration, once: for ours it has one
                clients = self._env._interception.clients
                clients[self._context.client.model_dump_json()] = self._client
                ready.set_result(None)
                await self._ending.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _end(self) -> None:
        self._ending.set()
        if self._holder is not None:
            await asyncio.wait({self._holder})


def configured(name: str, kwargs: Mapping[str, Any]) -> Any:
    """verifiers' configuration of an environment.

    A seat whose program nobody chose, and one that only chats, has ours: it runs here. A runtime
    that nobody chose is a process of this machine, not one of verifiers' cloud.
    """
    from verifiers.v1 import PrimeConfig, default_harness_id, env_config_type, resolve_env_config
    from verifiers.v1.configs.agent import agent_config_fields

    environment, _, taskset = name.rpartition("+")
    given = {**kwargs, "id": environment, "interception": {"type": "server"}}
    given["taskset"] = {**(kwargs.get("taskset") or {}), "id": taskset}
    kind = env_config_type(taskset, environment)
    for seat, usual in agent_config_fields(kind()).items():
        chosen = dict(given.get(seat) or {})
        program = (chosen.get("harness") or {}).get("id") or getattr(usual.harness, "id", None)
        if program is None and default_harness_id(taskset) == "bash":  # the taskset brings none
            program = "null"
        if program == "null":
            chosen["harness"] = {**(chosen.get("harness") or {}), "id": HARNESS}
        if usual.runtime == PrimeConfig():
            chosen.setdefault("runtime", {"type": "subprocess"})
        given[seat] = chosen
    return resolve_env_config(given)


def task_of(row: Mapping[str, Any], env: Any) -> Any:
    """The task that a row holds: `extra_info.task`, as `rows` writes it. What isn't there is the
    row's own: its prompt, and its ground truth as the answer.
    """
    kind = type(env.taskset).task_type()
    fields = kind.data_type().model_fields
    given = (row.get("extra_info") or {}).get("task") or {}
    told = dict(json.loads(given) if isinstance(given, str) else given)
    if not given:
        told["prompt"] = row["prompt"]
    if "answer" in fields and "answer" not in told:
        told["answer"] = truth_as_text(row["reward_model"]["ground_truth"])
    return kind(kind.data_type().model_validate(told), env.taskset.config.task)
