"""The keys and values of all layers on the device, in pages.

`schedule/pages.py` says which sequence has which page.

Legend: L layers · P tokens of a page · k this rank's kv heads · J = 2k heads, keys before values ·
H head dim · T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

HEAD_DIMS = 16, 32, 64, 128, 256  # H that our own kernels take
PAGES_COPIED_AT_ONCE = 32  # meanwhile they lie in memory a second time


class KVCache:
    """One tensor [L, pages, P, J, H]."""

    def __init__(
        self,
        shape_LPkH: tuple[int, int, int, int],
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, self.page_size, heads, head_dim = shape_LPkH
        shape = layers, pages, self.page_size, 2 * heads, head_dim
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        # Told of every copy: what else is kept of each token
        self.follower: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def write(self, layer: int, slots_T: torch.Tensor, kv_TJH: torch.Tensor) -> None:
        """Store tokens' keys and values at `slots` = page · P + place in the page, int64.

        Slots are distinct, but for those of page 0 that nobody reads.
        """
        with in_any_order():
            self.data[layer].flatten(0, 1).index_copy_(0, slots_T, kv_TJH)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages (from, to), in all layers. The host doesn't wait for it."""
        if not pairs:
            return
        places = torch.tensor(pairs, pin_memory=self.data.is_cuda)
        places = places.to(self.data.device, non_blocking=True)
        for some in places.split(PAGES_COPIED_AT_ONCE):
            sources, targets = some.unbind(1)
            self.data[:, targets] = self.data[:, sources]
            if self.follower is not None:
                self.follower(sources, targets)


def located(
    positions_R: torch.Tensor, tables_RW: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots int64 [R] of the tokens at these positions, lengths int32 [R] with them), on pages of
    `size` tokens. A position beyond the table is the one in its last page.
    """
    width = tables_RW.shape[1]
    place = (positions_R // size).clamp_(max=width - 1)
    slots = tables_RW.gather(1, place[:, None])[:, 0].long() * size + positions_R % size
    return slots, (positions_R + 1).clamp_(max=width * size).to(torch.int32)


@contextmanager
def in_any_order() -> Iterator[None]:
    """For writes to distinct places, which are the same in any order.

    Under `torch.use_deterministic_algorithms(True)` torch would sort the places first, and in some
    releases wait for the device, which a CUDA graph can't record.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
