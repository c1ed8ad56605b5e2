"""Fully sharded data parallelism, written from scratch.

layout    which element of which parameter is where
collect   which parameters belong to which unit
buffers   the memory that units take turns in
overlap   the streams, and the order of what is on them (the timeline)
unit      a unit's weights: gather, use, release
reduce    a unit's gradients: the sum over the ranks
sharded   the sharded module: when its units are gathered and reduced
hooks     how it learns that a unit's forward or backward begins or ends
wrap      `shard`: makes all that of a module
"""

from retool.parallel.fsdp.layout import Layout, Member, Slot, UnitLayout, local_pieces, make_layout
from retool.parallel.fsdp.sharded import Sharded
from retool.parallel.fsdp.wrap import shard

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
