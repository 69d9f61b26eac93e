"""AdamW steps on the native library: one call for any number of tensors.

The call takes an array of structs, one for each slot. What does not change between steps (pointers of states, sizes,
dtypes) is written when the batch is made; in a step only the pointers of parameters and gradients are gathered, and a
parameter is looked at again when it lies somewhere else. As in `ops`, everything the library will touch is checked
here: it trusts its caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.errors import ShapeError
from halfbyte.formats.packing import packed_size
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.slots import BLOCK_4BIT, BLOCK_8BIT, KINDS, Options, Slot

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum hb_dtype

# hb_adamw_tensor and hb_adamw_options of csrc/halfbyte.h.
_POINTERS = ("param", "grad", "master", "state1", "state2", "scale1", "scale2", "scale2_columns")
_TENSOR = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in ("count", "columns", "first")]
    + [("key", np.uint32, 2)]
    + [(name, np.int32) for name in ("param_dtype", "grad_dtype", "state", "options")]
)


class NativeBatch:
    """A `halfbyte.kernels.slots.Batch` on the native library.

    Args:
        native: the loaded library.
        slots: all on the CPU; their states must not be moved while the batch lives.

    Raises:
        ShapeError: a state that does not belong to its parameter.
    """

    def __init__(self, native: Native, slots: Sequence[Slot]) -> None:
        self._adamw, self._norms = native.functions["hb_adamw"], native.functions["hb_adamw_norms"]
        self.slots = slots
        self._table = np.zeros(len(slots), dtype=_TENSOR)
        self._params = [slot.param for slot in slots]
        self._last = np.array([slot.first + slot.count for slot in slots], dtype=np.int64)
        self._sizes = [slot.param.numel() for slot in slots]
        self._addresses = np.zeros(len(slots), dtype=np.uint64)
        for row, slot in zip(self._table, slots, strict=True):
            _check_state(slot)
            tensors = (slot.master, slot.moment1, slot.moment2, slot.scale1, slot.scale2, slot.columns)
            for name, tensor in zip(_POINTERS[2:], tensors, strict=True):
                row[name] = 0 if tensor is None else tensor.data_ptr()
            row["count"], row["first"], row["state"] = slot.count, slot.first, KINDS.index(slot.kind)
            row["columns"] = 0 if slot.columns is None else slot.columns.numel()

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """See `Batch.norms`."""
        table, present, _keep = self._with_gradients(grads)
        sums = np.zeros(len(table), dtype=np.float64)
        _checked(self._norms(torch.get_num_threads(), _address(table), len(table), _address(sums)))
        found = np.zeros(len(grads), dtype=np.float64)
        found[present] = sums
        return found.tolist()

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """See `Batch.step`."""
        numbers = np.array(options, dtype=np.float32)
        positions = np.asarray(which, dtype=np.int32)
        assert len(positions) == len(self.slots) and keys.shape == (len(self.slots), 2)
        assert not len(positions) or 0 <= positions.min() <= positions.max() < len(options)
        copies = self._look_at_params()
        self._table["options"], self._table["key"] = positions, keys
        table, _present, _keep = self._with_gradients(grads)
        _checked(self._adamw(torch.get_num_threads(), _address(table), len(table), _address(numbers)))
        for param, copy in copies:
            param.detach().copy_(copy)

    def _look_at_params(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Write where the parameters lie. One that is not contiguous is stepped in a copy; those are returned."""
        addresses = np.fromiter((param.data_ptr() for param in self._params), np.uint64, len(self._params))
        if not np.array_equal(addresses, self._addresses):
            for row, slot in zip(self._table, self.slots, strict=True):
                row["param_dtype"] = _check_param(slot)
            self._addresses = addresses
            self._strided = [number for number, param in enumerate(self._params) if not param.is_contiguous()]
        self._table["param"] = addresses + self._table["first"].astype(np.uint64) * _item_size(
            self._table["param_dtype"]
        )
        copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number in self._strided:
            param, row = self._params[number], self._table[number]
            _, copy = copies.setdefault(id(param), (param, param.detach().contiguous()))
            row["param"] = copy.data_ptr() + self.slots[number].first * copy.element_size()
        return list(copies.values())

    def _with_gradients(self, grads: Sequence[torch.Tensor | None]) -> tuple[np.ndarray, Any, list[torch.Tensor]]:
        """The rows that have a gradient, with pointers to it; which they are; and what must live during the call."""
        ready, present, dtypes = [], [], []
        for number, (grad, size) in enumerate(zip(grads, self._sizes, strict=True)):
            if grad is None:
                continue
            if grad.numel() != size or not grad.is_cpu or grad.layout != torch.strided:
                _refuse_gradient(grad, self.slots[number])
            dtype = _DTYPES.get(grad.dtype)
            if dtype is None:
                grad, dtype = grad.float(), 0
            ready.append(grad if grad.is_contiguous() else grad.contiguous())
            present.append(number)
            dtypes.append(dtype)
        rows: Any = slice(None) if len(present) == len(grads) else present
        table = self._table[rows]
        table["grad_dtype"] = dtypes
        addresses = np.fromiter((grad.data_ptr() for grad in ready), np.uint64, len(ready))
        table["grad"] = addresses + table["first"].astype(np.uint64) * _item_size(table["grad_dtype"])
        return table, rows, ready


def _item_size(dtypes: np.ndarray) -> np.ndarray:
    return np.where(dtypes == 0, 4, 2).astype(np.uint64)


def _address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("an optimizer step got no memory for its tables; nothing was changed")


def _check_param(slot: Slot) -> int:
    param = slot.param
    if param.dtype not in _DTYPES or not param.is_cpu or param.numel() < slot.first + slot.count:
        raise ShapeError(
            f"a parameter is {param.dtype} {tuple(param.shape)} on {param.device} after its state was made"
        )
    if slot.master is not None and param.dtype != torch.bfloat16:
        raise ShapeError(f"a parameter with a float32 master is {param.dtype}, not bfloat16")
    return _DTYPES[param.dtype]


def _refuse_gradient(grad: torch.Tensor, slot: Slot) -> None:
    raise ShapeError(
        f"a gradient is {grad.layout} {tuple(grad.shape)} on {grad.device}, its parameter {tuple(slot.param.shape)}"
    )


def _check_state(slot: Slot) -> None:
    """Every tensor of a state has the size that the library will touch."""
    count, matrix = slot.count, slot.columns is not None
    sizes: dict[str, tuple[torch.dtype, int] | None]
    if slot.kind == "float32":
        sizes = {"moment1": (torch.float32, count), "moment2": (torch.float32, count), "scale1": None, "scale2": None}
    elif slot.kind == "8bit":
        blocks = (torch.float32, -(-count // BLOCK_8BIT))
        sizes = {"moment1": (torch.uint8, count), "moment2": (torch.uint8, count), "scale1": blocks, "scale2": blocks}
    else:
        codes, blocks = (torch.uint8, packed_size(count, 4)), (torch.float32, -(-count // BLOCK_4BIT))
        sizes = {"moment1": codes, "moment2": codes, "scale1": blocks, "scale2": blocks}
    if slot.columns is not None and slot.scale2 is not None:
        rows = slot.scale2.numel()
        if slot.kind != "4bit" or rows * slot.columns.numel() != count:
            raise ShapeError(f"a second moment of {count} elements has {rows} rows, {slot.columns.numel()} columns")
        sizes |= {"scale2": (torch.float32, rows), "columns": (torch.float32, slot.columns.numel())}
    sizes |= {"master": None if slot.master is None else (torch.float32, count)}
    sizes.setdefault("columns", None)
    if slot.first % BLOCK_8BIT or (matrix and slot.first):
        raise ShapeError(f"a slot begins at element {slot.first}, inside a block")
    for name, size in sizes.items():
        tensor = getattr(slot, name)
        found = None if tensor is None else (tensor.dtype, tensor.numel())
        if found != size or (tensor is not None and not (tensor.is_cpu and tensor.is_contiguous())):
            raise ShapeError(f"{name} of a {slot.kind} state of {count} elements is {found}, which has to be {size}")
