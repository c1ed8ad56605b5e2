"""Samples of one prompt share its keys and values: one computes them, the others refer to the same
pages.

All but the prompt's last token is shared. Each sample computes that one itself (in its own copy of
the last, partly filled page) and draws from its own logits, so what it draws doesn't depend on who
computed the rest.
"""

from __future__ import annotations

from collections.abc import Hashable

from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.sequence import Group, Sequence
from retool.engine.types import Stats


class Groups:
    """Groups by key, and the pages that they keep for samples that didn't get their prompt yet.

    The scheduler tells what becomes of a sample: `join` → (`attach` → `computed`)… → `leave`, with
    `forgot` wherever it loses its KV.
    """

    def __init__(self, pool: PagePool, stats: Stats) -> None:
        self.pool = pool
        self.stats = stats
        self.by_key: dict[Hashable, Group] = {}

    def join(self, key: Hashable, group: Hashable | None, ids: list[int]) -> Group | None:
        """A new sample. ValueError if its prompt isn't the group's."""
        if group is None:
            return None
        shared = self.by_key.setdefault(group, Group(group, list(ids)))
        if shared.ids != ids:
            raise ValueError(
                f"sequence {key!r} has another prompt than its group {group!r}: samples of a group share one."
            )
        shared.live += 1
        shared.unserved += 1
        return shared

    def leave(self, sequence: Sequence) -> None:
        """A sample was dropped."""
        group = sequence.group
        if group is None:
            return
        self.forgot(sequence)
        self._serve(sequence, group)
        group.live -= 1
        if group.live == 0:
            del self.by_key[group.key]

    def attach(self, sequence: Sequence) -> None:
        """Give a sequence without KV its group's, or make it the one that computes it."""
        group = sequence.group
        if sequence.computed or group is None or group.prefix == 0:
            return
        # Nobody has computed it yet, or what was kept of it was let go
        if not group.pages:
            group.leader = sequence
            return
        self.pool.share(group.pages)
        sequence.pages = list(group.pages)
        sequence.computed = group.prefix
        self.stats.shared_tokens += group.prefix
        self._serve(sequence, group)

    def computed(self, sequence: Sequence) -> None:
        """A leader has computed the prompt: it is kept for the samples that wait for it."""
        group = sequence.group
        if group is None or group.leader is not sequence or sequence.computed < group.prefix:
            return
        group.leader = None
        # The last may be filled in part: who writes on in it gets a copy (`PagePool.extend`)
        group.pages = sequence.pages[: self.pool.pages_for(group.prefix)]
        self.pool.share(group.pages)
        self._serve(sequence, group)

    def forgot(self, sequence: Sequence) -> None:
        """A sequence gave up its KV: another may become the leader."""
        if sequence.group is not None and sequence.group.leader is sequence:
            sequence.group.leader = None

    def _serve(self, sequence: Sequence, group: Group) -> None:
        """The sample has the prompt, or needs it no more; after the last one nobody keeps it."""
        if not sequence.served:
            sequence.served = True
            group.unserved -= 1
        if group.unserved == 0:
            self.pool.release(group.pages)

    # ── what the scheduler asks

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether the sample's prompt is being computed by another."""
        group = sequence.group
        return sequence.computed == 0 and group is not None and group.leader is not None

    def missing(self, sequence: Sequence) -> int:
        """Free pages that a waiting sequence needs for all its tokens, a shared prompt taken into
        account.
        """
        group = self._offering(sequence)
        if group is None:
            return self.pool.missing(sequence.pages, sequence.computed, len(sequence.tokens))
        copied = group.prefix % self.pool.page_size > 0  # the last page, which it goes on in
        return self.pool.pages_for(len(sequence.tokens)) - len(group.pages) + copied

    def left(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence has to compute, a shared prompt taken into account."""
        group = self._offering(sequence)
        return len(sequence.tokens) - (sequence.computed if group is None else group.prefix)

    def _offering(self, sequence: Sequence) -> Group | None:
        """The sequence's group if it has a prompt for it, and the sequence has none."""
        group = sequence.group
        if sequence.computed == 0 and group is not None and group.pages:
            return group
        return None

    def let_go(self, useful: bool) -> bool:
        """Release one group's kept pages; with `useful`, only where that frees one.

        False if there is no such group.
        """
        for group in self.by_key.values():
            # A page that sequences hold, too, isn't free when the group lets go
            if group.pages and (not useful or self._frees_a_page(group)):
                self.pool.release(group.pages)
                return True
        return False

    def _frees_a_page(self, group: Group) -> bool:
        return any(self.pool.counts[page] == 1 for page in group.pages)
