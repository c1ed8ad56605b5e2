"""What attention over the paged cache must know of a step: where its tokens are, and what they see.

Legend: T new tokens · S items · W pages of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Seen(NamedTuple):
    """What a layer's queries see of the keys before them.

    `window`: how many tokens, the query itself the last of them; 0 means all. `cap`: scaled scores s
    become cap · tanh(s / cap); 0 leaves them.
    """

    window: int = 0
    cap: float = 0.0


ALL = Seen()


class Keys(NamedTuple):
    """The keys of some items: `tables` int32 [S, W], their pages; `lengths` int32 [S], how many."""

    tables: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Pages:
    """Where a step's tokens are and what they see. Items are in order, decode items first.

    Of tokens: `slots` int64 [T], where their KV goes. Of items: `tables` int32 [S, W], `lengths`
    int32 [S] with the new tokens. The first `decode` of them are decode items.

    Of the chunk items alone: `offsets` int32 [chunks + 1] of their queries, `key_offsets` of their
    keys, and on the host `counts` of new tokens and `host_lengths`.

    `each_alone`: no item's numbers may depend on another one's length; torch then needs the decode
    items' `host_lengths`.
    """

    slots: Tensor
    tables: Tensor
    lengths: Tensor
    decode: int
    offsets: Tensor | None = None
    key_offsets: Tensor | None = None
    counts: tuple[int, ...] = ()
    host_lengths: tuple[int, ...] = ()
    each_alone: bool = False

    def of_decode(self) -> Keys:
        return Keys(self.tables[: self.decode], self.lengths[: self.decode])

    def of_chunks(self) -> Keys:
        return Keys(self.tables[self.decode :], self.lengths[self.decode :])
