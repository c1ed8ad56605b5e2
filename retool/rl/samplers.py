"""Which engines sample. One whose machine fails is left out for a while, and its prompts go to the
others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from retool.rl.types import Prompt, Scored, Stop

# An engine fails where it raises, or where more of its samples are lost to infrastructure (its
# machine's sandbox, its tools, its judges) than a run may lose. If all fail it isn't one machine's
# fault: samples are lost as ever. What an engine samples is a function of the weights, the prompt and
# the sample's number, so others make the same samples.

Request = tuple[Prompt, int]  # a prompt, and which of its samples

REST_STEPS = 10  # that an engine stands back before it is tried again


class EngineFailed(RuntimeError):
    """No engine can sample any more; what one of them raised is the message."""


@dataclass(frozen=True)
class Share:
    """What one engine made of its requests, and on which machine.

    `scored` is None where the run was asked to stop. `error` is what it raised instead.
    """

    engine: int
    host: str
    scored: list[Scored] | None
    error: str = ""

    @property
    def sound(self) -> list[Scored]:
        """The samples that weren't lost to the machine."""
        return [one for one in self.made if not _is_gone(one)]

    @property
    def made(self) -> list[Scored]:
        return self.scored or []

    def fails(self, max_lost_share: float) -> bool:
        """Whether so much went wrong that other engines should sample instead."""
        if self.error:
            return True
        gone = len(self.made) - len(self.sound)
        return gone > max_lost_share * len(self.made)

    @property
    def cause(self) -> str:
        """What went wrong, in a few words."""
        if self.error:
            return self.error
        made = len(self.made)
        gone = made - len(self.sound)
        return f"{gone} of its {made} samples were lost"


def _is_gone(one: Scored) -> bool:
    return one.trajectory.stop is Stop.INFRASTRUCTURE


def by_engine(said: Sequence[Share]) -> list[Share]:
    """One share of each engine from those of its ranks, of which the first has the samples."""
    first: dict[int, Share] = {}
    for share in said:
        known = first.setdefault(share.engine, share)
        if share.error and not known.error:
            first[share.engine] = replace(known, error=share.error)
    return [*first.values()]


@dataclass
class Samplers:
    """The engines of a run; the same on every rank.

    `back` says until which step an engine stands back. `moved` counts the samples of a step that
    another engine took over.
    """

    engines: int
    back: dict[int, int] = field(default_factory=dict)
    moved: int = 0

    def ready(self, step: int) -> list[int]:
        """The engines that sample now."""
        for engine, end in [*self.back.items()]:
            if end <= step:
                del self.back[engine]
        return [engine for engine in range(self.engines) if engine not in self.back]

    def left(self, sampled: Iterable[int], failed: Sequence[Share]) -> list[int]:
        """Who may take over from engines that failed in this step: those that have `sampled` in it,
        or else those that stood back before.
        """
        gone = {share.engine for share in failed}
        # Those that stood back failed lately: they are asked only when nobody else is left.
        fresh = [engine for engine in sampled if engine not in gone]
        return fresh or [engine for engine in self.back if engine not in gone]

    def rest(self, failed: Sequence[Share], ready: Sequence[int], step: int) -> None:
        """Engines that failed stand back from now on; those that are ready don't."""
        for engine in ready:
            self.back.pop(engine, None)
        for share in failed:
            self.back[share.engine] = step + REST_STEPS

    def recall(self, failed: Sequence[Share]) -> None:
        """Take engines back into service: others lose their samples as well. Those that raised
        still stand back.
        """
        for share in failed:
            if not share.error:
                self.back.pop(share.engine, None)


def deal(
    prompts: Sequence[Prompt],
    n: int,
    engines: Sequence[int],
) -> dict[int, list[Request]]:
    """The `n` samples of each prompt, by engine."""
    requests = [[(prompt, sample) for sample in range(n)] for prompt in prompts]
    return _in_turn(requests, engines)


def deal_again(
    shares: Mapping[int, Sequence[Request]],
    failed: Sequence[Share],
    engines: Sequence[int],
) -> dict[int, list[Request]]:
    """What engines that failed still owe, by engine; the samples of a prompt stay together."""
    owed: dict[int, list[Request]] = {}
    for share in failed:
        there = {_key(one) for one in share.sound}
        for prompt, sample in shares[share.engine]:
            if (prompt.index, sample) in there:
                continue
            of_prompt = owed.setdefault(prompt.index, [])
            of_prompt.append((prompt, sample))
    return _in_turn([*owed.values()], engines)


def _key(one: Scored) -> tuple[int, int]:
    trajectory = one.trajectory
    return trajectory.prompt.index, trajectory.sample


def _in_turn(
    groups: Sequence[list[Request]],
    engines: Sequence[int],
) -> dict[int, list[Request]]:
    dealt = dict[int, list[Request]]()
    # In turn, not in blocks: neighbours in a file are often alike, and one engine would get all the
    # long ones.
    for place, engine in enumerate(engines):
        mine = groups[place :: len(engines)]
        dealt[engine] = [request for group in mine for request in group]
    return dealt
