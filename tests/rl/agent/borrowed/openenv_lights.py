"""Environments written with OpenEnv: lights to be switched on, and words to be echoed."""

from __future__ import annotations

import random
from uuid import uuid4

from openenv.core import EnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_server import Action, Environment, Observation, State
from openenv.core.env_server.mcp_environment import MCPEnvironment
from pydantic import Field


class PressAction(Action):
    """Presses a light's button."""

    light: int = Field(ge=0, le=2, description="Which of the three lights.")


class LightsObservation(Observation):
    lights: str = ""


class LightsEnvironment(Environment[PressAction, LightsObservation, State]):
    """Done when all three are on. `dark` is how many are off at first."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, dark: int = 3) -> None:
        super().__init__()
        self._dark = dark
        self._state = State(episode_id=str(uuid4()), step_count=0)

    def reset(self, seed=None, episode_id=None, broken="", **kwargs):
        off = random.Random(seed).sample(range(3), self._dark)
        self._on = [number not in off for number in range(3)]
        self._broken = broken
        self._state = State(episode_id=episode_id, step_count=0)
        return LightsObservation(lights=self._shown())

    def step(self, action, timeout_s=None, **kwargs):
        if self._broken:
            raise OSError(self._broken)
        news = not self._on[action.light]
        self._on[action.light] = True
        self._state.step_count += 1
        return LightsObservation(
            lights=self._shown(), reward=1.0 if news else -0.5, done=all(self._on)
        )

    @property
    def state(self):
        return self._state

    def _shown(self):
        return " ".join("on" if light else "off" for light in self._on)


class LightsClient(EnvClient[PressAction, LightsObservation, State]):
    def _step_payload(self, action):
        return action.model_dump()

    def _parse_result(self, payload):
        seen = LightsObservation(**payload["observation"])
        return StepResult(seen, payload["reward"], payload["done"])

    def _parse_state(self, payload):
        return State(**payload)


class OneAtATime(LightsEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = False


class Echo(MCPEnvironment):
    """Its only tool is MCP's."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        from fastmcp import FastMCP

        server = FastMCP("echo")

        @server.tool
        def echo(words: str) -> str:
            """Says it again."""
            return words.upper()

        super().__init__(server)

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Observation()

    def _step_impl(self, action, timeout_s=None, **kwargs):
        raise ValueError("only tools")

    @property
    def state(self):
        return State()


def serve(port: int) -> None:
    """Serve the lights, and nothing else, until the process ends."""
    import uvicorn
    from openenv.core.env_server import create_fastapi_app

    app = create_fastapi_app(
        LightsEnvironment, PressAction, LightsObservation, max_concurrent_envs=64
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    import sys

    serve(int(sys.argv[1]))
