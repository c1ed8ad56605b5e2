"""Finds the OpenEnv environment that a configuration names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import httpx

from retool.rl.agent.environments.openenv.interface import Interface, name_of_tool
from retool.rl.agent.environments.openenv.worlds import LocalWorld, RemoteWorld
from retool.rl.agent.extras import import_failed
from retool.rl.agent.tools.given import named_object

SECONDS_TO_ANSWER = 10.0  # that a server has to tell its schemas
KEYS = ("base_url", "make", "text", "tool", "to_action", "to_messages")


class Source:
    """Called, it makes the world of a trajectory.

    `name` is a server's address, or a class at `file.py/NAME` or a dotted path: an environment,
    which is made here with `make`, or a client of one at `base_url`. See `Interface` for the other
    keys of `kwargs`. ValueError where there is none, or it can't be used so.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        _check_keys(kwargs)
        try:
            from openenv.core import EnvClient, Environment, GenericEnvClient
        except ImportError as error:
            raise import_failed("openenv", error) from error
        self.classes: tuple[type, ...] = ()
        self._make: Callable[[], Any]
        if name.startswith(("http://", "https://")):
            action = None
            schema = _schema_of_server(name)
            self._make = partial(GenericEnvClient, base_url=name)
            self._local = False
        else:
            found = named_object(name)
            if not isinstance(found, type) or not issubclass(found, (Environment, EnvClient)):
                raise ValueError(
                    f"{name} is neither a subclass of OpenEnv's Environment nor of its EnvClient."
                )
            self.classes = (found,)
            self._local = issubclass(found, Environment)
            action = _action_of(found)
            if action is None and not kwargs.get("to_action"):
                raise ValueError(
                    f"{name} names no class of its actions, as in Environment[MyAction, "
                    "MyObservation, MyState]: name it, or give a function to_action."
                )
            schema = action.model_json_schema() if action is not None else {}
            self._make = self._made_of(found, kwargs)
        self._interface = _interface(schema, kwargs)
        self._to_action = None if action is None else partial(_typed, action)

    def _made_of(self, found: type, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
        """What makes the environment, or its client."""
        address = kwargs.get("base_url")
        if self._local == (address is not None):
            wants = "an environment, which is run here" if self._local else "a client: it needs one"
            raise ValueError(f"base_url={address}: {found.__name__} is {wants}.")
        if not self._local:
            return partial(found, base_url=address)
        if not getattr(found, "SUPPORTS_CONCURRENT_SESSIONS", False):
            raise ValueError(
                f"{found.__name__} doesn't say that several of it may play in one process, as the "
                "trajectories of a step do: set SUPPORTS_CONCURRENT_SESSIONS = True in it, where its "
                "objects share nothing, or serve it and name its address."
            )
        return partial(found, **(kwargs.get("make") or {}))

    def __call__(self) -> LocalWorld | RemoteWorld:
        if self._local:
            return LocalWorld(self._make, self._interface, self._to_action or _as_it_is)
        return RemoteWorld(self._make, self._interface, self._to_action)


def _interface(schema: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Interface:
    functions = {
        key: named_object(str(kwargs[key])) if kwargs.get(key) else None
        for key in ("to_action", "to_messages")
    }
    text = kwargs.get("text")
    fields = schema.get("properties", {})
    if text is not None and fields and text not in fields:
        raise ValueError(f"text={text}: the action has {', '.join(fields)}.")
    tool = kwargs.get("tool") or name_of_tool(str(schema.get("title", "")))
    return Interface(schema, str(tool), text, functions["to_action"], functions["to_messages"])


def _check_keys(kwargs: Mapping[str, Any]) -> None:
    for key in kwargs:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown key {key!r} of kwargs{hint} Known: {', '.join(KEYS)}.")


def _schema_of_server(address: str) -> dict[str, Any]:
    """The JSON schema of a server's actions. ValueError where it isn't there."""
    url = f"{address.rstrip('/')}/schema"
    try:
        response = httpx.get(url, timeout=SECONDS_TO_ANSWER)
        response.raise_for_status()
        return response.json()["action"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"no OpenEnv server answers at {url}: {told}.") from error


def _action_of(found: type) -> Any:
    """The class of the actions that a class of OpenEnv names in its brackets, or MCP's where its
    tools are; None for none.
    """
    from openenv.core.env_server import Action, CallToolAction, MCPEnvironment

    for parent in found.__mro__:
        for bracketed in getattr(parent, "__orig_bases__", ()):
            for argument in get_args(bracketed):
                if isinstance(argument, type) and issubclass(argument, Action):
                    return argument
    # It isn't there without the package fastmcp
    if MCPEnvironment is not None and issubclass(found, MCPEnvironment):
        return CallToolAction
    return None


def _typed(kind: Any, action: Any) -> Any:
    """An action as its class has it; MCP's are classes of their own. ValueError where it doesn't
    fit.
    """
    from openenv.core.env_server.serialization import deserialize_action

    return deserialize_action(action, kind) if isinstance(action, Mapping) else action


def _as_it_is(action: Any) -> Any:
    return action
