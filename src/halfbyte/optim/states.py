"""What an optimizer keeps for a parameter: which tensors, of which dtypes and shapes, in which kind of state.

| kind | tensors | bytes a parameter, for a large matrix |
|---|---|---|
| `float32` | `exp_avg`, `exp_avg_sq`, as torch's AdamW | 8 |
| `8bit` | `state1`, `state2` (codes), `absmax1`, `absmax2` (a float32 for 256), as bitsandbytes' AdamW8bit | 2.03 |
| `4bit` | `codes1`, `codes2` (two a byte), `absmax1` (a float32 for 128), `row_max`, `column_max` or `absmax2` | 1.03 |

and `master` in float32 for a bfloat16 parameter that is rounded from one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from halfbyte.formats.packing import packed_size
from halfbyte.kernels.slots import BLOCK_4BIT, BLOCK_8BIT, Slot

# Parameters below this many elements keep float32 states: they cost little, and rounding them costs most (bitsandbytes'
# min_8bit_size, and the limit of arXiv 2309.01507).
MIN_LOW_BIT_SIZE = 4096

Spec = tuple[torch.dtype, tuple[int, ...]]
State = dict[str, torch.Tensor]
Allocate = Callable[[torch.dtype, Sequence[int], torch.device], torch.Tensor]

# The tensor of each kind that fills each field of a slot; "absmax2" and "row_max" exclude each other.
_FIELDS = {
    "float32": {"moment1": "exp_avg", "moment2": "exp_avg_sq"},
    "8bit": {"moment1": "state1", "moment2": "state2", "scale1": "absmax1", "scale2": "absmax2"},
    "4bit": {"moment1": "codes1", "moment2": "codes2", "scale1": "absmax1", "scale2": "absmax2"},
}


def state_specs(kind: str, shape: Sequence[int], *, master: bool = False) -> dict[str, Spec]:
    """Names, dtypes and shapes of a state's tensors.

    Args:
        kind: "float32", "8bit" or "4bit".
        shape: of the parameter.
        master: whether it has a float32 master.
    """
    whole, count = tuple(shape), math.prod(shape)
    specs: dict[str, Spec]
    if kind == "float32":
        specs = {"exp_avg": (torch.float32, whole), "exp_avg_sq": (torch.float32, whole)}
    elif kind == "8bit":
        blocks = (torch.float32, (-(-count // BLOCK_8BIT),))
        specs = {"state1": (torch.uint8, whole), "absmax1": blocks, "state2": (torch.uint8, whole), "absmax2": blocks}
    else:
        codes = (torch.uint8, (packed_size(count, 4),))
        blocks = (torch.float32, (-(-count // BLOCK_4BIT),))
        specs = {"codes1": codes, "absmax1": blocks, "codes2": codes}
        rows = whole[0] if len(whole) > 1 else 1
        columns = count // rows if rows else 0
        if rows > 1 and columns > 1:
            specs |= {"row_max": (torch.float32, (rows,)), "column_max": (torch.float32, (columns,))}
        else:
            specs |= {"absmax2": blocks}
    if master:
        specs["master"] = (torch.float32, whole)
    return specs


def kind_of(state: State) -> str:
    """The kind of a state, by the names of its tensors."""
    return next(kind for kind, fields in _FIELDS.items() if fields["moment1"] in state)


def new_state(param: torch.Tensor, kind: str, *, master: bool, allocate: Allocate) -> State:
    """The state before the first step: zeros, and a master that is the parameter.

    Args:
        param: float32 or bfloat16.
        kind: of the state.
        master: whether to keep a float32 master.
        allocate: gives a tensor of zeros of a dtype and shape.
    """
    specs = state_specs(kind, param.shape, master=master)
    state = {name: allocate(dtype, shape, param.device) for name, (dtype, shape) in specs.items()}
    if master:
        state["master"].copy_(param.detach())
    return state


def slot_of(param: torch.Tensor, state: State, number: int, first: int = 0, count: int | None = None) -> Slot:
    """The slot of a range of a parameter; its tensors are views of the state's.

    Args:
        param: the whole parameter.
        state: its state.
        number: its position in the optimizer.
        first: the range's first element, the beginning of a block.
        count: elements of the range; None: to the end.
    """
    kind = kind_of(state)
    count = param.numel() - first if count is None else count
    block = {"float32": 1, "8bit": BLOCK_8BIT, "4bit": BLOCK_4BIT}[kind]
    codes = slice(first, first + count) if kind != "4bit" else slice(first // 2, (first + count + 1) // 2)
    scales = slice(first // block, -(-(first + count) // block))
    names = dict(_FIELDS[kind])
    slot = Slot(
        param, first, count, kind, state[names["moment1"]].view(-1)[codes], state[names["moment2"]].view(-1)[codes]
    )
    slot.number = number
    if kind != "float32":
        slot.scale1 = state["absmax1"][scales]
        if "row_max" in state:
            slot.scale2, slot.columns = state["row_max"], state["column_max"]
        else:
            slot.scale2 = state["absmax2"][scales]
    if "master" in state:
        slot.master = state["master"].view(-1)[first : first + count]
    return slot


def state_bytes(state: State) -> int:
    """Bytes that a state's tensors take."""
    return sum(tensor.nbytes for tensor in state.values() if isinstance(tensor, torch.Tensor))


def can_be_split(state: State) -> bool:
    """Whether ranges of the parameter can be stepped one after the other; scales by row and column need all of it."""
    return "row_max" not in state


def allocate_plain(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Zeros where the parameter lies."""
    return torch.zeros(tuple(shape), dtype=dtype, device=device)
