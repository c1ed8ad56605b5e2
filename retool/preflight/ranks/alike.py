"""What must be the same on all ranks, compared by one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from retool.config import Fault

MOST_NAMES = 3  # that a fault tells of a key


@dataclass(frozen=True)
class Shared:
    """Something that all ranks must have alike: what it is called, and this rank's value in a word.

    `where` is the key that decides it. `name` is empty where that says all.
    """

    where: str
    name: str
    value: str
    way_out: str


def unlike(
    hosts: Sequence[str], said: Sequence[Iterable[Shared]], known: Iterable[str] = ()
) -> Iterator[Fault]:
    """A fault for each key of which ranks have different things, with who has what.

    `said` is what each rank has. What a rank couldn't find out isn't compared, and the keys in
    `known` aren't either: they are wrong for another reason.
    """
    owners: dict[tuple[str, str], dict[str, list[int]]] = {}
    ways_out: dict[str, str] = {}
    for rank, shared in enumerate(said):
        for one in shared:
            values = owners.setdefault((one.where, one.name), {})
            values.setdefault(one.value, []).append(rank)
            ways_out.setdefault(one.where, one.way_out)
    found: dict[str, list[str]] = {}
    for (where, name), values in owners.items():
        if len(values) > 1 and where not in set(known):
            found.setdefault(where, []).append(_in_words(name, values, hosts))
    for where, words in found.items():
        more = f"; and {len(words) - MOST_NAMES} more" if len(words) > MOST_NAMES else ""
        listed = "; ".join(words[:MOST_NAMES])
        yield Fault(where, f"isn't the same on all ranks: {listed}{more}.", ways_out[where])


def _in_words(name: str, values: dict[str, list[int]], hosts: Sequence[str]) -> str:
    parts = [f"{value} ({who(ranks, hosts)})" for value, ranks in values.items()]
    return f"{name} {', '.join(parts)}" if name else ", ".join(parts)


def who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """These ranks in words; a machine by its name alone where all of its ranks are meant."""
    machines = list(dict.fromkeys(hosts[rank] for rank in ranks))
    whole = all(rank in ranks for rank, host in enumerate(hosts) if host in machines)
    numbers = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return f"on {', '.join(machines)}" if whole else f"{numbers} on {', '.join(machines)}"
