"""Tools of an MCP server: what it lists, the model may call.

A server is a process that retool starts (stdio), or one that runs somewhere (streamable HTTP). The
package `mcp` speaks with it.
"""

from __future__ import annotations

import asyncio
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from retool.rl.agent.extras import import_failed
from retool.rl.agent.tools.protocol import TRAJECTORY, AnyTool, ToolResult, check_schema
from retool.rl.agent.tools.state import run_alone

CONNECT_SECONDS = 30.0  # that a server has to answer for the first time
ASK_SECONDS = 5.0  # that it has to show it is still there, after an error


@dataclass(frozen=True)
class McpServer:
    """How a server is reached, and what of it the model gets.

    `command`, `args` and `cwd` start one, with `env` and next to nothing else of the run's
    environment; `url` and `headers` name one that runs. `tools` are the names of those that are
    wanted; None: all. `connection` is one for each trajectory that calls it, or one that all of a
    process share.
    """

    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] | None = None
    connection: Literal["shared", "trajectory"] = "shared"

    def __post_init__(self) -> None:
        if (self.command is None) == (self.url is None):
            raise ValueError("it needs a command, or a url, and not both.")
        if self.connection not in ("shared", "trajectory"):
            raise ValueError(f"connection={self.connection}: use shared or trajectory.")

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.url or " ".join([str(self.command), *self.args])

    def client(self) -> Any:
        """What connects to it, as a context. ValueError without the package."""
        try:
            from mcp import Client, StdioServerParameters, stdio_client
        except ImportError as error:
            raise import_failed("mcp", error) from error
        if self.command is not None:
            process = StdioServerParameters(
                command=self.command, args=list(self.args), env=dict(self.env), cwd=self.cwd
            )
            return Client(stdio_client(process, errlog=sys.__stderr__ or sys.stderr))
        assert self.url is not None
        if not self.headers:
            return Client(self.url)
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        http = httpx2.AsyncClient(headers=dict(self.headers))
        return Client(streamable_http_client(self.url, http_client=http))


def read_server(given: Any) -> McpServer:
    """A server as a tool config file names it. ValueError for what can't be."""
    if not isinstance(given, dict):
        raise ValueError(f"mcp is a {type(given).__name__}, not a mapping with a command or a url.")
    known = [entry.name for entry in fields(McpServer)]
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown key {key!r} of mcp{hint} Known: {', '.join(known)}.")
    values = dict(given)
    for key in ("args", "tools"):
        if values.get(key) is not None:
            values[key] = tuple(map(str, values[key]))
    return McpServer(**values)


class Connection:
    """A connection to a server, which a task of its own holds: whoever calls may come and go.

    It is made by the first call, and again by the first call after it broke.
    """

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._client: Any = None
        self._opening: asyncio.Task[None] | None = None
        self._holder: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """What a tool answers. ConnectionError where the server is away."""
        client = await self._connected()
        try:
            result = await client.call_tool(name, dict(arguments))
        except Exception as error:
            # The client raises alike for a call that failed and a server that died: asking for its
            # tools tells which.
            if await self._answers(client):  # then it is what the server says to this call
                return ToolResult(f"{type(error).__name__}: {error}", "error")
            await self._drop(client)
            raise ConnectionError(
                f"the MCP server {self._server.where} is away: {error}"
            ) from error
        return ToolResult(text_of_result(result), "error" if result.is_error else "success")

    async def tools(self) -> list[Any]:
        """What the server lists. ConnectionError where it is away."""
        client = await self._connected()
        found: list[Any] = []
        cursor = None
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found

    async def close(self) -> None:
        """End the connection, and the process that was started for it."""
        self._ending.set()
        if self._holder is not None:
            await asyncio.wait({self._holder})

    async def _connected(self) -> Any:
        """The client; many that ask at once wait for one connection."""
        if self._client is None:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open())
            # Shielded: one caller that gives up must not cancel the connection that others wait
            # for.
            await asyncio.shield(self._opening)
        return self._client

    async def _open(self) -> None:
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # A new one for each connection: the old one's holder may still be on its way out.
        self._ending = asyncio.Event()
        self._holder = asyncio.create_task(_hold(self._server, ready, self._ending))
        await asyncio.wait({ready}, timeout=CONNECT_SECONDS)
        if not ready.done():
            self._ending.set()
            self._holder.cancel()
            raise ConnectionError(
                f"the MCP server {self._server.where} gave no answer within {CONNECT_SECONDS:g} s"
            )
        self._client = ready.result()

    async def _answers(self, client: Any) -> bool:
        """Whether the server is still there."""
        try:
            await asyncio.wait_for(client.list_tools(cache_mode="bypass"), ASK_SECONDS)
        except Exception:
            return False
        return True

    async def _drop(self, client: Any) -> None:
        """Forget a connection that broke; what is called next makes another."""
        if self._client is client:
            self._client = None
            self._ending.set()


async def _hold(server: McpServer, ready: asyncio.Future[Any], ending: asyncio.Event) -> None:
    """Keep a connection until `ending`: whoever enters its context has to leave it."""
    try:
        async with server.client() as client:
            ready.set_result(client)
            await ending.wait()
    except Exception as error:
        if not ready.done():
            told = ConnectionError(
                f"the MCP server {server.where} can't be reached: {_innermost(error)}"
            )
            ready.set_exception(told)


def _innermost(error: BaseException) -> str:
    """What an error says; of a group of them, what the first does."""
    inner = getattr(error, "exceptions", None)
    return _innermost(inner[0]) if inner else f"{type(error).__name__}: {error}"


def text_of_result(result: Any) -> str:
    """What a tool answered, as the model reads it; what isn't text is named."""
    parts = []
    for content in result.content:
        text = getattr(content, "text", None)
        if text is None:
            text = getattr(getattr(content, "resource", None), "text", None)
        parts.append(text if text is not None else f"[{content.type}]")
    return "\n".join(parts)


def schema_of_tool(tool: Any) -> dict[str, Any]:
    """The schema of a tool that a server lists."""
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.input_schema,
    }
    schema = {"type": "function", "function": function}
    check_schema(tool.name, schema)
    return schema


class McpTool:
    """A tool of a server, over a connection that all trajectories of this process share."""

    def __init__(self, server: McpServer, connection: Connection, schema: dict[str, Any]) -> None:
        self.server = server
        self.schema = schema
        self.name = str(schema["function"]["name"])
        self._connection = connection

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        return await self._connection.call(self.name, arguments)

    async def close(self) -> None:
        await self._connection.close()


class Connections:
    """Connections to a server, one for each trajectory that calls any of its tools."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._open: dict[str, tuple[Connection, int]] = {}  # and how many tools have it

    def open(self, trajectory: str) -> Connection:
        """The trajectory's; it connects when it is first called."""
        connection, holders = self._open.get(trajectory, (Connection(self._server), 0))
        self._open[trajectory] = (connection, holders + 1)
        return connection

    async def close(self, trajectory: str) -> None:
        """One of its tools is done with it; the last closes it."""
        connection, holders = self._open.pop(trajectory)
        if holders > 1:
            self._open[trajectory] = (connection, holders - 1)
        else:
            await connection.close()


class McpTrajectoryTool:
    """A tool of a server that keeps something for each trajectory: see `StatefulTool`."""

    def __init__(self, server: McpServer, connections: Connections, schema: dict[str, Any]) -> None:
        self.server = server
        self.schema = schema
        self.name = str(schema["function"]["name"])
        self._connections = connections

    async def open_state(self, row: Mapping[str, Any]) -> tuple[str, Connection]:
        trajectory = str(row[TRAJECTORY])
        return trajectory, self._connections.open(trajectory)

    async def call_state(
        self, state: tuple[str, Connection], arguments: Mapping[str, Any]
    ) -> ToolResult:
        return await state[1].call(self.name, arguments)

    async def close_state(self, state: tuple[str, Connection]) -> None:
        await self._connections.close(state[0])

    async def close(self) -> None:
        """Each trajectory has closed its own."""


def mcp_tools(server: McpServer) -> list[AnyTool]:
    """The tools of a server, which is asked for them over a connection of its own.

    ValueError where it can't be reached, or lacks one that is wanted.
    """
    try:
        listed = run_alone(_listed(server))
    except ConnectionError as error:
        raise ValueError(f"{error}.") from error
    schemas = {tool.name: schema_of_tool(tool) for tool in listed}
    wanted = list(schemas) if server.tools is None else server.tools
    missing = [name for name in wanted if name not in schemas]
    if missing or not schemas:
        raise ValueError(
            f"the MCP server {server.where} has no {', '.join(missing) or 'tool'}; "
            f"it has {', '.join(schemas) or 'none'}."
        )
    if server.connection == "trajectory":
        connections = Connections(server)
        return [McpTrajectoryTool(server, connections, schemas[name]) for name in wanted]
    connection = Connection(server)
    return [McpTool(server, connection, schemas[name]) for name in wanted]


async def _listed(server: McpServer) -> list[Any]:
    connection = Connection(server)
    try:
        return await connection.tools()
    finally:
        await connection.close()
