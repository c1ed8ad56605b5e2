"""A function on ranks of several machines: forks of the warm server, without a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tests.hosts.network import Host
from tests.ranks import run_ranks


def run_on(hosts: Sequence[Host], function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on one rank of each machine; the results by rank."""
    return run_ranks(_there, len(hosts), tuple(hosts), function, args)


def _there(hosts: Sequence[Host], function: Callable[..., Any], args: Sequence[Any]) -> Any:
    rank = int(os.environ["RANK"])
    hosts[rank].enter()
    os.environ |= {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "MASTER_ADDR": hosts[0].address,
    }
    return function(*args)
