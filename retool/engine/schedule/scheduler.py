"""Which sequences are computed next. Runs on the host and touches no tensors.

    start ──> WAITING ──admit──> RUNNING ──stop / length──> PARKED ──extend──> WAITING
                 ^                  │
                 └───── preempt ────┘   no page was free for an older sequence: KV is given up and
                                        computed again later

    drop: from anywhere

[Note: progress] Sequences have arrival numbers. In every step running sequences are served oldest
first, and one that finds no free page takes it from, in this order: prompts kept for samples that
wait, finished turns and waiting ones that kept their KV, the youngest running sequence; never from
an older one. The oldest running sequence therefore always advances. A sequence is admitted if its
whole backlog fits beside a page for each running one, or if nothing runs: then everything else
makes room. One that needs more pages than there are ends with reason "capacity", so nothing waits
for what can't come.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable

from retool.engine.kernels.draws import seed_key
from retool.engine.schedule.groups import Groups
from retool.engine.schedule.pages import PageCopy, PagePool
from retool.engine.schedule.sequence import Item, Sequence, State, Step
from retool.engine.types import Reason, SamplingParams, Stats, TurnDone


class Scheduler:
    """Queues, pages and groups. `max_tokens` of one forward, `max_length` of a sequence."""

    def __init__(self, pool: PagePool, max_num_seqs: int, max_tokens: int, max_length: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_tokens = max_tokens
        self.max_length = min(max_length, pool.capacity * pool.page_size)
        self.sequences: dict[Hashable, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.refused: list[TurnDone] = []
        self.stats = Stats()
        self.arrivals = 0
        # Whether who waits could be admitted now: something changed since the last one that couldn't
        self.may_admit = False
        self.steps_ahead = 0  # since the last plan, or the last one admitted
        self.groups = Groups(pool, self.stats)

    # ── what the caller asks for

    def start(
        self, key: Hashable, ids: list[int], params: SamplingParams, group: Hashable | None
    ) -> None:
        if key in self.sequences:
            raise ValueError(f"sequence {key!r} was started already: extend it, or drop it first.")
        if not ids:
            raise ValueError(
                f"sequence {key!r} has an empty prompt: at least one token must be given."
            )
        shared = self.groups.join(key, group, ids)
        sequence = Sequence(
            key,
            number=self.arrivals,
            tokens=list(ids),
            params=params,
            draw_key=seed_key(params.seed),
            group=shared,
            turn_start=len(ids),
            given=len(ids),
        )
        self.arrivals += 1
        self.sequences[key] = sequence
        self._queue(sequence)

    def extend(self, key: Hashable, ids: list[int], params: SamplingParams) -> None:
        sequence = self._known(key)
        if sequence.state is not State.PARKED:
            raise ValueError(
                f"sequence {key!r} is still {sequence.state.value}: extend it when its turn is done."
            )
        sequence.tokens += ids
        # At least one token is to be computed: the next one is drawn from it
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        sequence.params = params
        sequence.draw_key = seed_key(params.seed)
        sequence.turn_start = len(sequence.tokens)
        # What was given is counted as prefill, what is sampled from here on as decoding.
        sequence.given = len(sequence.tokens)
        sequence.logp = []
        sequence.logp_behaviour = []
        self._queue(sequence)

    def drop(self, key: Hashable) -> None:
        sequence = self._known(key)
        del self.sequences[key]
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.is_running:
            self.running.remove(sequence)
        # The key may be started anew before this is handed out: it isn't the new sequence's
        self.refused = [turn for turn in self.refused if turn.key != key]
        sequence.state = State.DROPPED
        self.may_admit = True
        self.pool.release(sequence.pages)
        self.groups.leave(sequence)

    def _known(self, key: Hashable) -> Sequence:
        if key not in self.sequences:
            raise ValueError(f"sequence {key!r} is unknown: it was never started, or was dropped.")
        return self.sequences[key]

    def _queue(self, sequence: Sequence) -> None:
        """Put a sequence into the queue, by arrival. One that can never be computed is refused."""
        sequence.state = State.WAITING
        self.may_admit = True
        if len(sequence.tokens) <= self.max_length:
            insort(self.waiting, sequence, key=lambda s: s.number)
        else:
            self.refused.append(self._finish(sequence, "capacity"))
            self._forget(sequence)

    # ── one step

    def plan(self) -> Step | None:
        """The next forward's work, or None if there is nothing to compute.

        Counts it as computed.
        """
        items: list[Item] = []
        copies: list[PageCopy] = []
        # Single tokens come first: chunks share what they leave
        budget = self.max_tokens - sum(s.pending == 1 for s in self.running)
        # Oldest first: whoever comes later may lose its pages to one before it, never the other way
        # round.
        for sequence in sorted(self.running, key=lambda s: s.number):
            if not sequence.is_running:  # an older one took its pages a moment ago
                continue
            if sequence.pending == 1:
                count = 1
            else:
                count = min(sequence.pending, budget)
                budget -= count
            room = self._room(sequence, sequence.computed + count) if count else None
            if room is not None:
                copies += room
                items.append(Item(sequence, sequence.computed, count))
        self.may_admit = self.admit(items, copies, budget)
        self.steps_ahead = 0
        for item in items:
            self.count(item)
        # As a batch has them: single tokens before chunks
        items.sort(key=lambda item: item.count > 1)
        return Step(items, copies) if items else None

    def _room(self, sequence: Sequence, stop: int) -> list[PageCopy] | None:
        """Pages for a running sequence up to token `stop`; None if it had to give up its own place."""
        while (copies := self.pool.extend(sequence.pages, sequence.computed, stop)) is None:
            if not self._make_room(sequence):
                assert any(s.number < sequence.number for s in self.running), (
                    "a sequence that fits found no room"
                )
                self._preempt(sequence)
                return None
        return copies

    def admit(
        self, items: list[Item], copies: list[PageCopy], budget: int, apart: bool = False
    ) -> bool:
        """Admit who waits, in order, with up to `budget` tokens; whether the next step may admit
        more although nothing else changes.

        `apart`: the budget is that of chunks alone, so single tokens take nothing of it, and no
        prompt is cut after its first token.
        """
        full = False
        for sequence in self.waiting:
            full = len(self.running) >= self.max_num_seqs
            if full or budget < 1:
                break
            if self.groups.must_wait(sequence):
                continue
            full = not self._make_room_to_admit(sequence)
            if full:
                break
            # It would begin as a row of one token, in the middle of its prompt
            if budget == 1 and apart and self.groups.left(sequence) > 1:
                break
            self.groups.attach(sequence)
            # Pages for all of it, however little is computed now: who is admitted gets to its end
            room = self.pool.extend(sequence.pages, sequence.computed, len(sequence.tokens))
            assert room is not None
            copies += room
            count = min(sequence.pending, budget)
            if not (apart and count == 1):
                budget -= count
            items.append(Item(sequence, sequence.computed, count))
            self.running.append(sequence)
            sequence.state = State.RUNNING
        self.waiting = [s for s in self.waiting if s.state is State.WAITING]
        return bool(self.waiting) and not full

    def _make_room_to_admit(self, sequence: Sequence) -> bool:
        """Whether there are pages for all of a waiting sequence, and one for each that runs. Where
        nothing runs everything else makes room.
        """

        def fits() -> bool:
            return self.groups.missing(sequence) + len(self.running) <= len(self.pool.free)

        while not fits():
            if self.running:
                return False
            made = self._make_room(sequence)
            assert made, "a sequence that fits found no room in an empty cache"
        return True

    def count(self, item: Item) -> None:
        """Book an item as computed."""
        sequence = item.sequence
        sequence.computed += item.count
        given = max(0, min(sequence.computed, sequence.given) - item.start)
        self.stats.prefill_tokens += given
        self.stats.decode_tokens += item.count - given
        self.groups.computed(sequence)

    # ── memory

    def _make_room(self, sequence: Sequence) -> bool:
        """Give up the KV that is missed least, see [Note: progress]; False if there is none that
        `sequence` may take.
        """
        if self.groups.let_go(useful=True):
            return True
        idle = [
            s for s in self.sequences.values() if s.pages and s is not sequence and not s.is_running
        ]
        if idle:
            # Finished turns before waiting ones, and the youngest first: it has waited least.
            self._forget(max(idle, key=lambda s: (s.state is State.PARKED, s.number)))
            self.stats.evicted += 1
            return True
        if self.groups.let_go(useful=False):
            return True
        youngest = max(self.running, key=lambda s: s.number, default=sequence)
        if youngest.number <= sequence.number:
            return False
        self._preempt(youngest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self.running.remove(sequence)
        self._queue(sequence)
        self.stats.preempted += 1

    def _forget(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.computed = 0
        sequence.given = len(sequence.tokens)
        self.groups.forgot(sequence)

    # ── what came out

    def accept(
        self, sequence: Sequence, token: int, logp: float, logp_behaviour: float
    ) -> TurnDone | None:
        """Append a drawn token; the finished turn, if it was its last."""
        self.stats.sampled_tokens += 1
        reason = sequence.append(token, logp, logp_behaviour, self.max_length)
        if reason is None:
            return None
        self.running.remove(sequence)
        return self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: Reason) -> TurnDone:
        sequence.state = State.PARKED
        self.may_admit = True
        return TurnDone(
            sequence.key,
            sequence.tokens[sequence.turn_start :],
            sequence.logp,
            sequence.logp_behaviour,
            reason,
        )
