"""Random samples in the place of a data set."""

from __future__ import annotations

import numpy as np

from retool.batch import Sample


class Rows:
    """So many samples of 2 tokens up to the `longest`'s, the same each time."""

    def __init__(self, longest: int = 30, count: int = 64) -> None:
        rng = np.random.default_rng(0)
        self.samples = [
            Sample(rng.integers(0, 61, n).astype(np.int32), rng.random(n) < 0.6)
            for n in rng.integers(2, longest + 1, count)
        ]
        self.lengths = np.array([len(s) for s in self.samples])
        self.trained = np.array([s.trained for s in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]
