"""Fully sharded data parallelism, written from scratch: layout (what is where), unit (gather, use,
reduce), overlap, hooks, wrap.
"""

from retool.parallel.fsdp.layout import Layout, Member, Slot, UnitLayout, local_pieces, make_layout
from retool.parallel.fsdp.wrap import Sharded, shard

__all__ = [
    "Layout",
    "Member",
    "Sharded",
    "Slot",
    "UnitLayout",
    "local_pieces",
    "make_layout",
    "shard",
]
