"""The networks of a machine: which one the ranks talk over, and which other machines it reaches."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

GLOO = "GLOO_SOCKET_IFNAME"
DISCARD_PORT = 9  # nobody needs to listen there: a refusal comes from a machine that is up
ANSWER_S = 2.0  # that a machine has to refuse
MOST_AT_ONCE = 64  # machines that are asked


@dataclass(frozen=True)
class Place:
    """The machine of a rank: its name, and its address on the network that reaches rank 0's."""

    host: str
    address: str


def own_place(environment: Mapping[str, str]) -> Place:
    """Where this process is."""
    return Place(socket.gethostname(), own_address(environment.get("MASTER_ADDR", "localhost")))


def own_address(other: str) -> str:
    """This machine's address on the network that reaches `other`; loopback's where none does.

    Nothing is sent: the kernel looks up the route.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            other, DISCARD_PORT, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Have gloo talk over the network that reaches MASTER_ADDR, where its own choice would reach
    nobody.

    gloo takes the address that the machine's own name means. The names of containers often mean
    none, and those of Debian 127.0.1.1: ranks on other machines would wait for half an hour. What
    the user has set in GLOO_SOCKET_IFNAME stays.
    """
    if GLOO in environment or not all(map(_is_loopback, _addresses(socket.gethostname()))):
        return
    address = own_address(environment.get("MASTER_ADDR", "localhost"))
    name = interface_of(address)
    if name is not None and not _is_loopback(address):
        environment[GLOO] = name


def interface_of(address: str) -> str | None:
    """The name of the interface with this address; None where no interface has it."""
    wanted = address.partition("%")[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == wanted for entry in entries):
            return name
    return None


def unreachable(places: Iterable[Place], own: Place) -> list[Place]:
    """The other machines among `places` that don't answer."""
    others = {place.address: place for place in places if place.address != own.address}
    if not others:
        return []
    with ThreadPoolExecutor(min(len(others), MOST_AT_ONCE)) as pool:
        answers = list(pool.map(_answers, others))
    return [place for place, answer in zip(others.values(), answers, strict=True) if not answer]


def _answers(address: str) -> bool:
    """Whether a machine accepts or refuses a connection, rather than being silent."""
    try:
        socket.create_connection((address, DISCARD_PORT), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _addresses(name: str) -> list[str]:
    """What a machine's name means; nothing where it means nothing."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None)]
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
