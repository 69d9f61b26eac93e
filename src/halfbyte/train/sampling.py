"""The order of training rows by length: batches of rows that are about equally long have next to no padding.

transformers' own sampler of the kind draws its order from the global generator, whose state at the beginning of an
epoch is not that of a resumed run: the rest of the epoch would be other rows. Here the order follows from seed and
epoch alone, as that of its random sampler does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Shuffled; then the rows of each 50 steps are sorted by length. The longest row of all comes first.

    Args:
        rows: of a step.
        lengths: of each row, in tokens.
        seed: of the order.
    """

    def __init__(self, rows: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(rows, lengths=list(lengths))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()
