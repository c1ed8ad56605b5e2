"""Where ranks find each other before there is a process group: the launcher's store.

[Note: rounds] torchrun starts workers again after a failure, or when a machine comes or goes, and
by default all rounds share one store: a rank would read what a dead one of the round before wrote
there. On one machine torchrun's count of restarts tells the rounds apart. On several each machine
counts its own failures alone, and nothing tells them: there torchrun must be told to open a store
for each round (`OWN_STORES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def meeting_place(environment: Mapping[str, str], timeout_s: float) -> Store:
    """The store of this round's ranks, from the environment's RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT.

    DistError or ValueError where it can't be reached.
    """
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    if not shares_store(environment):
        return store
    round_number = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    machines = environment.get("GROUP_WORLD_SIZE", "1")
    return PrefixStore(f"round {round_number}", store) if machines == "1" else store


def shares_store(environment: Mapping[str, str]) -> bool:
    """Whether this round's ranks meet where those of other rounds did, or will."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def mixes_rounds(environment: Mapping[str, str]) -> bool:
    """Whether a restart would read what another round wrote."""
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    machines = int(environment.get("GROUP_WORLD_SIZE", "1"))
    return shares_store(environment) and restarts > 0 and machines > 1
