"""Activations in host memory: parked in the forward, fetched a block ahead in the backward, on a
CUDA stream of their own.

    compute   | block 0 | block 1 | block 2 |     …     | block 2 back | block 1 back | block 0 back |
    copies              | 0 ↓     | 1 ↓                 | 1 ↑          | 0 ↑

The last blocks' may stay, the last one's always: the backward begins with them. Of the others the
device holds one block's at a time, besides those in use.

[Note: memory that two streams use] Device memory always comes from the compute stream and goes back
to it. A tensor that is copied is held until the compute stream waits for its copy: out, one block
later; in, where it is used, or in the next forward if a backward has failed. A tensor to copy into
is made by the compute stream, and the copy starts after what that stream had enqueued. Host pages
are reused in the order of the one copy stream. So nothing needs `record_stream`, under which a host
that runs ahead of the device would find no memory free; and the host never waits. Pages are pinned
when they are first needed, so the first step of the longest pack takes longer (some 0.3 s/GB).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retool.parallel.streams import current_stream, start_copies, wait_for

# bytes. Pinned memory comes in powers of two; pages of one size fit tensors of any length
PAGE = 16 << 20


class Parked:
    """Some tensors of one block, in host memory (or staying `here`) until `fetch`.

    `before`: the block before it, wanted next.
    """

    def __init__(self, offload: Offload, before: Parked | None, tensors: Sequence[Tensor]) -> None:
        self.offload = offload
        self.before = before
        self.shapes = [(t.shape, t.dtype) for t in tensors]
        self.pages: list[list[Tensor]] = []  # of each tensor; empty while `here` has them
        self.here: list[Tensor] | None = None
        self.moved = False  # back to the device, when it has arrived

    def fetch(self) -> list[Tensor]:
        """The tensors on the device, once: they are let go of here.

        Starts to fetch the block before.
        """
        tensors = self.start_fetch()
        if self.moved:
            self.offload.settle()
        before = self.before
        self.before = None
        self.here = None
        if before is not None:
            before.start_fetch()
        return tensors

    def start_fetch(self) -> list[Tensor]:
        """Begin the copy to the device, unless it has begun."""
        if self.here is None:
            if not self.pages:
                raise RuntimeError(
                    "activations in host memory are there for one backward: with retain_graph=True use "
                    "recompute='full'."
                )
            self.here = [
                torch.empty(shape, dtype=dtype, device=self.offload.device)
                for shape, dtype in self.shapes
            ]
            self.offload.copy_in(self.here, self.pages)
            self.pages = []
            self.moved = True
        return self.here


class Offload:
    """The copy stream (None on the CPU, where copies are done at once) and the host pages of a
    model.

    The first `parked` of its `blocks` blocks are parked, the others' activations stay on the
    device.
    """

    def __init__(self, device: torch.device, blocks: int, parked: int) -> None:
        self.device, self.blocks, self.parked = device, blocks, min(parked, blocks - 1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[Tensor] = []
        self.newest: Parked | None = None
        self.held: list[Tensor] = []  # being copied, until `done`
        self.done: torch.cuda.Event | None = None

    def park(self, tensors: Sequence[Tensor], index: int) -> Parked:
        """Start to copy the tensors of block `index` out, if they don't stay."""
        self.settle()
        parked = Parked(self, self.newest if index > 0 else None, tensors)
        # A chain from the last block to the first: the backward walks it, fetching one block ahead.
        # The last block begins a new one, so that a forward that had no backward keeps nothing
        # alive.
        self.newest = parked if index + 1 < self.blocks else None
        if index >= self.parked:
            parked.here = list(tensors)
            return parked
        self.held = [t.contiguous() for t in tensors]
        parked.pages = [[self._page() for _ in range(-(-t.nbytes // PAGE))] for t in self.held]
        self._copy(parked.pages, out=True)
        return parked

    def settle(self) -> None:
        """What the compute stream does next comes after the last copy: its tensors can be used, and
        let go of.
        """
        wait_for(self.done)
        self.held = []
        self.done = None

    def copy_in(self, tensors: list[Tensor], pages: list[list[Tensor]]) -> None:
        """Start to fill `tensors`; the pages are free for what is copied out later."""
        self.settle()
        self.held = list(tensors)
        self._copy(pages, out=False)
        self.free += [page for several in pages for page in several]

    def _page(self) -> Tensor:
        return (
            self.free.pop()
            if self.free
            else torch.empty(PAGE, dtype=torch.uint8, pin_memory=self.stream is not None)
        )

    def _copy(self, pages: list[list[Tensor]], out: bool) -> None:
        """Copy what is held on the copy stream, after what the compute stream has now."""
        pairs = [
            (page[: len(part)], part) if out else (part, page[: len(part)])
            for tensor, several in zip(self.held, pages, strict=True)
            for part, page in zip(
                tensor.flatten().view(torch.uint8).split(PAGE), several, strict=True
            )
        ]
        if self.stream is not None:
            self.stream.wait_stream(current_stream())
        self.done = start_copies(self.stream, pairs, None)
