"""The KV cache's pages on the host: which are free, and how many users each of the others has.

    sequence A   pages 3 7 9         tokens 0…15 | 16…31 | 32…40
    sequence B   pages 3 7 12
                           └ own copy, made when A or B first wrote to the shared page 9

A page is freed in `PagePool.release`, when the last sequence or group lets go of it. Page 0 is never
given out: rows that pad a batch write there.
"""

from __future__ import annotations

PageCopy = tuple[int, int]  # (from, to)


class PagePool:
    """`counts` has the references to each page: of sequences, and of groups that keep a prompt."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = pages - 1
        # Taken from the end, so the lowest first
        self.free = list(range(pages - 1, 0, -1))
        self.counts = [0] * pages

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def share(self, pages: list[int]) -> None:
        """One reference more to each."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free"
            self.counts[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each, and those with none left are free. The list is emptied."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free already"
            self.counts[page] -= 1
            if self.counts[page] == 0:
                self.free.append(page)
        pages.clear()

    def missing(self, pages: list[int], start: int, stop: int) -> int:
        """How many free pages it takes to write tokens [start, stop): new ones at the end, and
        copies of pages that others read, too.
        """
        copies = sum(self.counts[page] > 1 for page in pages[start // self.page_size :])
        return max(0, self.pages_for(stop) - len(pages)) + copies

    def extend(self, pages: list[int], start: int, stop: int) -> list[PageCopy] | None:
        """Make tokens [start, stop) writable: lengthen `pages`, and replace shared ones.

        Returns the pages that the device must copy before; None, and nothing is changed, if too few
        pages are free.
        """
        if self.missing(pages, start, stop) > len(self.free):
            return None
        copies = []
        for place in range(start // self.page_size, len(pages)):
            shared = pages[place]
            # Copy on write: another sequence reads this page, or a group keeps it.
            if self.counts[shared] > 1:
                own = self._take()
                copies.append((shared, own))
                # It has another reader: this frees nothing that the copy still reads
                self.release([shared])
                pages[place] = own
        while len(pages) < self.pages_for(stop):
            pages.append(self._take())
        return copies

    def _take(self) -> int:
        page = self.free.pop()
        self.counts[page] = 1
        return page
