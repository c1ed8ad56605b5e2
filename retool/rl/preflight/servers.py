"""What is wrong with `rollout.name=server`: keys that don't fit, addresses where nothing answers."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from retool.config import Fault
from retool.rl.config import RLConfig
from retool.rl.preflight.memory import SERVER
from retool.sandbox.fusion_client import unreachable

_ROLLOUT = "actor_rollout_ref.rollout"
URLS = f"{_ROLLOUT}.server.urls"


def server_faults(config: RLConfig, reach: bool) -> Iterator[Fault]:
    """Faults of the servers and their keys. `reach`: also try the addresses, which one process of a
    machine does for all.
    """
    rollout = config.actor_rollout_ref.rollout
    urls = rollout.server.urls
    if rollout.name != SERVER:
        if urls:
            problem = f"is given, but {_ROLLOUT}.name is {rollout.name}."
            yield Fault(URLS, problem, f"Use {_ROLLOUT}.name=server, or leave it out.")
        return
    if not urls:
        yield Fault(URLS, "names no server.", "Give addresses such as http://host:8000.")
    if len(set(urls)) < len(urls):
        yield Fault(URLS, "names a server twice.", "Give each address once.")
    if rollout.tensor_model_parallel_size != 1:
        where = f"{_ROLLOUT}.tensor_model_parallel_size={rollout.tensor_model_parallel_size}"
        problem = "is for an engine in the training processes, and servers sample."
        yield Fault(where, problem, "Leave it out, and give each server its GPUs when it starts.")
    yield from filter_faults(config, "servers don't")
    for url in dict.fromkeys(urls):
        yield from _address(url, reach)


def filter_faults(config: RLConfig, who: str) -> Iterator[Fault]:
    """The fault of sampling from a part of the vocabulary, with a backend (`who`) whose
    log-probabilities are of that part alone.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.top_p < 1 or rollout.top_k > 0:
        where = f"{_ROLLOUT}.top_p={rollout.top_p:g}, top_k={rollout.top_k}"
        problem = f"leaves out tokens, and {who} tell log-probabilities among the others alone."
        yield Fault(where, problem, "Use top_p=1 top_k=-1 in training; val_kwargs may have others.")


def _address(url: str, reach: bool) -> Iterator[Fault]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        yield Fault(f"{URLS}: {url}", "is no address.", "Write it as http://host:8000.")
    elif reach and (reason := unreachable(url)):
        problem = f"can't be reached: {reason}."
        yield Fault(f"{URLS}: {url}", problem, "Start the server, or take it out of the list.")
