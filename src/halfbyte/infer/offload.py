"""Models that do not fit into the memory: some layers stay there, the others are read from the file at each step.

Every step needs all layers in the same order. Where they do not fit, a cache that gives up what was used longest ago
gives up exactly what is needed next, and each step reads the whole file. So what stays is a choice, made here, and
every other layer is read while the one before it computes, and released after it: a step costs (file - kept) / rate of
the disk. The layers that are read lie evenly between those that stay, so that the disk never waits for a buffer.

The choice follows the memory that is available, at the beginning and again each second: the cache of keys and values
grows, and other programs come and go. Nothing here can change a result: whatever is not in memory when it is read is
brought by the system, as without this.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import torch

from halfbyte.device import available_memory
from halfbyte.kernels.decoder import Matrix, Network
from halfbyte.kernels.schema import PackedWeight
from halfbyte.models.mapping import Part, expect_rows, expect_whole, fetch_parts, mapped_parts, release
from halfbyte.tensor import QuantizedTensor

_LOOK = 1.0  # seconds from one look at the memory to the next
# Memory that comes and goes between two looks: the tensors of a prompt, logits, what Python makes.
_RESERVE = 32 << 20
_RESERVED_SHARE = 1 / 32


class Plan(NamedTuple):
    """Which units of a model stay in memory.

    Attributes:
        read: numbers of those that do not, in order: they are read at each step.
        ahead: whether there is room to read the next of them while one computes.
    """

    read: tuple[int, ...]
    ahead: bool


def make_plan(sizes: Sequence[int], budget: int) -> Plan:
    """Choose what stays.

    Args:
        sizes: bytes of the units in the order in which a step needs them: the layers, then the head. 0: not in a file.
        budget: bytes that they may take up together.

    Returns:
        As few bytes to be read as the budget allows, the head among them last, and all where it allows for no choice.
    """
    total = sum(sizes)
    if total <= budget:
        return Plan((), False)
    *layers, head = range(len(sizes))
    layers, ends = [unit for unit in layers if sizes[unit]], [head] if sizes[head] else []
    for also in ([], ends):
        for count in range(1, len(layers) + 1):
            spread = [layers[(2 * index + 1) * len(layers) // (2 * count)] for index in range(count)]
            read = (*spread, *also)
            # While one of them computes, the next one comes; behind the last one that is the first.
            at_once = max(sizes[unit] + sizes[after] for unit, after in zip(read, (*read[1:], read[0]), strict=True))
            if len(read) > 2 and total - sum(sizes[unit] for unit in read) + at_once <= budget:
                return Plan(read, True)
    return Plan((*layers, *ends), False)


def memory_for_weights() -> int | None:
    """Bytes that weights may take up now; None: the system does not say."""
    available = available_memory()
    return None if available is None else available - _RESERVE - int(available * _RESERVED_SHARE)


class Offload:
    """Has the layers of a mapped file in memory when a step gets to them.

    Args:
        units: where the layers' weights, and then the head's, are mapped; see `mapped_units`.
        max_memory: bytes that they may take up; None: what is available.
        rows: where the embeddings are mapped, of which a step reads single rows.

    Attributes:
        nbytes: of the weights that each step reads, as far as they are mapped.
        waited: seconds that steps waited for the disk.
        reading: seconds that were spent reading.
        read: bytes that were asked for meanwhile.
    """

    def __init__(
        self, units: Sequence[Sequence[Part]], max_memory: int | None = None, rows: Iterable[Part] = ()
    ) -> None:
        self._units = units
        self._sizes = [sum(part.nbytes for part in unit) for unit in units]
        self._max_memory = max_memory
        self.nbytes = sum(self._sizes)
        self.waited = self.reading = 0.0
        self.read = 0
        self._plan = make_plan(self._sizes, self._budget())
        self._look_at = time.monotonic() + _LOOK if self._plan.read else math.inf
        self._threads = ThreadPoolExecutor(2, "halfbyte-offload")  # one reads, one releases
        self._coming: dict[int, Future[None]] = {}
        self._there: set[int] = set()  # of those that do not stay
        if self._plan.read:
            expect_rows(rows)
            for unit in units:
                expect_whole(unit)
            self._change(range(len(units)))

    @property
    def offloaded(self) -> int:
        """Bytes that do not stay in memory, which each step reads; 0: the model fits."""
        return sum(self._sizes[unit] for unit in self._plan.read)

    @property
    def rate(self) -> float:
        """Bytes a second of reading so far; 0 where nothing was read."""
        return self.read / self.reading if self.reading else 0.0

    def enter(self, number: int) -> int:
        """Wait until a unit's weights are there, and have the next one read. See `kernels.decoder.Enter`."""
        if number == 0 and time.monotonic() >= self._look_at:
            self._look()
        read = self._plan.read
        at = bisect_left(read, number)
        if at < len(read) and read[at] == number:
            self._turn_to(number, read[(at + 1) % len(read)])
            at += 1
        return read[at] if at < len(read) else len(self._units)

    def close(self) -> None:
        """Stop reading."""
        self._threads.shutdown(cancel_futures=True)

    def _turn_to(self, number: int, following: int) -> None:
        ahead = self._plan.ahead
        if ahead:
            began = time.perf_counter()
            self._ask_for(number).result()
            self.waited += time.perf_counter() - began
            self._coming.pop(number, None)
            self._ask_for(following)
        staying = {number, following} if ahead else {number}
        for unit in self._there - staying:
            self._coming.pop(unit, None)
            self._threads.submit(release, self._units[unit])
        self._there = staying

    def _ask_for(self, unit: int) -> Future[None]:
        if unit not in self._coming:
            self._coming[unit] = self._threads.submit(self._read, unit)
        return self._coming[unit]

    def _read(self, unit: int) -> None:
        began = time.perf_counter()
        fetch_parts(self._units[unit])
        self.reading += time.perf_counter() - began
        self.read += self._sizes[unit]

    def _look(self) -> None:
        """See whether another plan fits the memory that is available now."""
        self._look_at = time.monotonic() + _LOOK
        plan, before = make_plan(self._sizes, self._budget()), self._plan
        # What one layer more would gain is not worth going to and fro.
        if plan.ahead == before.ahead and len(before.read) - 1 <= len(plan.read) <= len(before.read):
            return
        self._plan = plan
        self._change(set(before.read) ^ set(plan.read))

    def _change(self, units: Iterable[int]) -> None:
        """Bring units to where the plan has them: those that stay are read, and others released."""
        for unit in units:
            stays = unit not in self._plan.read
            self._there.discard(unit)
            self._threads.submit(fetch_parts if stays else release, self._units[unit])

    def _budget(self) -> int:
        budget = memory_for_weights() if self._max_memory is None else self._max_memory
        return self.nbytes if budget is None else budget


def make_offload(network: Network, max_memory: int | None) -> Offload:
    """The offload of a network whose weights are mapped from a file, as far as they are."""
    groups: list[Iterable[Matrix]] = [layer.matrices.values() for layer in network.layers]
    units = [_parts(matrix.weight for matrix in group) for group in [*groups, [network.head]]]
    rows = [part for part in _parts([network.table]) if part not in units[-1]]  # the head's may be the same tensor
    return Offload(units, max_memory, rows)


def _parts(weights: Iterable[PackedWeight | torch.Tensor]) -> list[Part]:
    """Where weights, packed or dense, lie in mapped files."""
    inner = (weight.packed() if isinstance(weight, QuantizedTensor) else weight for weight in weights)
    fields = chain.from_iterable((weight,) if isinstance(weight, torch.Tensor) else weight for weight in inner)
    return mapped_parts(field for field in fields if isinstance(field, torch.Tensor))
