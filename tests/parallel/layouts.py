"""The layout of a model on another number of ranks."""

from __future__ import annotations

from retool.parallel.fsdp.layout import Layout, SlotSpec, make_layout


def reshard(layout: Layout, shards: int) -> Layout:
    """The same units split over `shards` ranks."""
    units = []
    for unit in layout.units:
        slots = []
        for slot in unit.slots:
            members = [(member.name, member.shape) for member in slot.members]
            slots.append(SlotSpec(slot.name, slot.shape, members, slot.trainable))
        units.append((unit.name, slots))
    return make_layout(units, shards, layout.aliases, layout.order)
