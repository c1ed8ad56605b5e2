"""The servers of a run: which are there, which are left out and why, and which is asked next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from retool.rl.server.dialects import Dialect

SERVER_KEY = "RETOOL_API_KEY"  # in the environment, where servers want one
MAX_AHEAD = 8  # requests that a server may have more than another because of its prompts


@dataclass(frozen=True)
class ServerOptions:
    """`urls` of the servers; `dialect` a name or auto. A request may take `timeout_s`, and is tried
    again `retries` times; each rank has at most `at_once` of them under way at a server. A sequence
    has at most `max_length` tokens; those that are trained on are drawn at `temperature`. `key` is
    sent as a bearer token.
    """

    urls: tuple[str, ...]
    dialect: str = "auto"
    timeout_s: float = 600.0
    retries: int = 3
    at_once: int = 256
    max_length: int = 0
    temperature: float = 1.0
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request says of itself."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class ServersGone(RuntimeError):
    """No server is left."""


class ServerRefused(RuntimeError):
    """A server finds something wrong with what it is asked: another would, too."""


@dataclass(eq=False)
class Server:
    """A server. `lost` is why it is left out, "" while it isn't; `dialect` and `model` are known once
    it has been met, and `mark` once it has weights. `tells`: its answers have held that mark.
    """

    url: str
    dialect: Dialect | None = None
    model: str = ""
    lost: str = ""
    mark: str = ""
    tells: bool = False
    under_way: int = 0


@dataclass
class Fleet:
    """All servers, in the order of the configuration."""

    servers: list[Server]
    fresh_losses: list[Server] = field(default_factory=list)  # that nobody has been told of

    @staticmethod
    def of(urls: Sequence[str]) -> Fleet:
        """Servers that nobody has met yet."""
        return Fleet([Server(url.rstrip("/")) for url in urls])

    @property
    def there(self) -> list[Server]:
        """Those that are asked."""
        return [server for server in self.servers if not server.lost]

    def choose(self, group: Hashable) -> Server:
        """The server for a request. Those of one group go to one server, which then computes their
        prompt once, unless it has much more to do than another.

        ServersGone where none is left, with the reason of each.
        """
        there = self.there
        if not there:
            raise self.gone()
        least = min(there, key=lambda server: server.under_way)
        usual = there[hash(group) % len(there)]
        return usual if usual.under_way <= least.under_way + MAX_AHEAD else least

    def leave_out(self, server: Server, why: str) -> None:
        """Ask this server no more."""
        if not server.lost:
            server.lost = why
            self.fresh_losses.append(server)

    def gone(self) -> ServersGone:
        """The end of it."""
        reasons = "; ".join(f"{server.url}: {server.lost}" for server in self.servers)
        return ServersGone(
            f"rollout.server.urls: no server is left ({reasons}). Start them again, and the run with "
            "the same command: it goes on from its last checkpoint."
        )
