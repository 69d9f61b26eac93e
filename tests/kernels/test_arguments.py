"""Wrong arguments for the native ops: an error that says so or the right result, and never a crash.

The library checks nothing, so kernels/cpu/ops.py has to. Its methods are called directly, past the dispatcher and its
schema, with valid arguments of which hypothesis breaks one to three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import FormatError, ShapeError
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.schema import PackedWeight

pytestmark = pytest.mark.skipif(not isinstance(cpu.native_library(), Native), reason="there is no native library")
N, K = 9, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.complex64)
# Beside zero, beside the sizes in use, and large enough to overflow 64 bits when multiplied.
NUMBERS = (-(2**62), -K, -1, 0, 1, 2, 63, 64, 65, N, K - 1, K + 1, 2 * K, N * K, 2**40, 2**62)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one byte behind an aligned address."""
    nbytes = tensor.numel() * tensor.element_size()
    memory = torch.zeros(nbytes + 1, dtype=torch.uint8)
    memory[1:] = tensor.contiguous().view(-1).view(torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1).view(tensor.shape)


def broken_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every way in which a tensor of the right kind can be another one."""
    flat = tensor.reshape(-1)
    broken = {f"as {dtype}": tensor.to(dtype) for dtype in DTYPES}
    broken |= {
        "strided": torch.stack([tensor, tensor], dim=-1)[..., 0],
        "on meta": tensor.to("meta"),
        "empty": flat[:0],
        "one short": flat[:-1],
        "half": flat[: flat.numel() // 2],
        "longer": torch.cat([flat, flat]),
        "one value, expanded": flat[:1].expand(flat.numel()),
        "another dimension": tensor.unsqueeze(0),
        "no dimension": tensor.new_ones(()),
        "behind others": torch.cat([flat.new_zeros(1), flat])[1:].view(tensor.shape),
    }
    if flat.numel():
        broken["misaligned"] = misaligned(tensor)
    return broken


def broken_lists(sizes: list[int]) -> list[list[int]]:
    """Other shapes: wrong in one number or in both signs, of another length, or of as many elements."""
    changed = [[*sizes[:at], number, *sizes[at + 1 :]] for at in range(len(sizes)) for number in NUMBERS]
    return [*changed, [], [-size for size in sizes], [K, N], [N * K], [1, *sizes]]


def broken(argument: Any) -> st.SearchStrategy[Any]:
    """Wrong values of the argument's own type, as the schema lets them through."""
    if isinstance(argument, torch.Tensor):
        changed = broken_tensors(argument)
        return st.sampled_from(sorted(changed)).map(changed.__getitem__)
    if isinstance(argument, list):
        return st.sampled_from(broken_lists(argument))
    if isinstance(argument, str):
        return st.sampled_from(["nf4", "fp4", "int8", "nf5", ""])
    if isinstance(argument, torch.dtype):
        return st.sampled_from(DTYPES)
    if argument is None:
        return st.sampled_from([torch.ones(1), torch.ones(N, dtype=torch.uint8)])
    return st.sampled_from(NUMBERS) | st.sampled_from([4, 6, 8, 32, 256, 4096])


OPTIONAL = (2, 3)  # scale_absmax, scale_offset


@dataclass
class Call:
    """An op and its arguments, printed in one line."""

    op: str
    args: list[Any]

    def __repr__(self) -> str:
        words = [f"{a.dtype} {list(a.shape)} {a.device}" if isinstance(a, torch.Tensor) else str(a) for a in self.args]
        return f"{self.op}({', '.join(words)})"


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """An op on packed weights and its arguments, one to three of them broken."""
    torch.manual_seed(0)
    dtype = draw(st.sampled_from(DTYPES[:3]))
    w = torch.randn(N, K, dtype=dtype)
    packed = (
        draw(st.sampled_from(["nf4", "int8"])),
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from([None, 8, 6])),
    )
    weight = list(hb.quantize(w, *packed).packed())
    experts = list(hb.quantize(w.view(3, 3, K), *packed).packed())
    x, grad = torch.randn(draw(st.sampled_from([1, 3, 40])), K, dtype=dtype), torch.randn(2, N, dtype=dtype)
    arguments: dict[str, list[Any]] = {
        "quantize": [w, *packed[:2]],
        "quantize_scales": [torch.rand(300), draw(st.sampled_from([8, 6, 4]))],
        "dequantize": [*weight, [N, K], dtype],
        "dequantize_rows": [*weight, K, torch.tensor([0, N - 1, 3]), dtype],
        "linear": [*weight, N, x, draw(st.sampled_from([None, torch.randn(N, dtype=dtype)]))],
        "linear_grad_input": [*weight, K, grad],
        "grouped_linear": [*experts, 3, x, torch.tensor([0, 1, len(x)], dtype=torch.int32)],
        "grouped_linear_grad_input": [*experts, K, grad[:, :3], torch.tensor([1, 1, 2], dtype=torch.int32)],
    }
    op = draw(st.sampled_from(sorted(arguments)))
    args = arguments[op]
    for at in draw(st.sets(st.integers(0, len(args) - 1), min_size=1, max_size=3)):
        if len(args) > len(PackedWeight._fields) and at in OPTIONAL and args[at] is not None and draw(st.booleans()):
            args[at] = None
        else:
            args[at] = draw(broken(args[at]))
    return Call(op, args)


def as_the_reference(op: str, args: list[Any], found: Any) -> bool:
    """Equal to the bit; a product, within the rounding errors of both."""
    expected = reference.OPS[op](*args)
    pairs = list(zip(found, expected, strict=True)) if isinstance(found, tuple) else [(found, expected)]
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    if "linear" not in op:
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    # Each errs by at most the bound of tests/kernels/test_cpu.py. This is twice that bound or more: of a weight's
    # rounding, the sum's and the result's, for sums of the largest weight times the largest factor, and a bias.
    x = args[10]
    matrices = args[11].numel() if op.startswith("grouped") else 1
    if not x.numel() or not found.numel() or not matrices or x.dtype not in DTYPES[:3]:
        return True  # the reference itself has run
    length, count = x.shape[-1], matrices * math.prod(found.shape[-1:]) * x.shape[-1]
    largest = reference.OPS["dequantize"](*args[:9], [count], torch.float32).abs().max() * x.abs().max()
    bias = args[11].abs().max() if op == "linear" and args[11] is not None else 0
    eps = torch.finfo(x.dtype).eps
    allowed = 2 * ((2 * eps + length * 2.0**-23) * length * largest + eps * bias)
    return bool(((found - expected).abs() <= allowed).all())


@given(calls())
@settings(max_examples=1000, deadline=None)
def test_wrong_arguments_raise_or_give_the_right_result(call):
    """What the library does not cover runs on the reference, and may raise what that raises."""
    op, args = call.op, call.args
    flat = [arg.reshape(-1) if isinstance(arg, torch.Tensor) and at < 4 else arg for at, arg in enumerate(args)]
    try:
        found = getattr(cpu.native_ops(), op)(*args)
    except (ShapeError, FormatError, IndexError):
        return
    except Exception as error:
        with pytest.raises(type(error)):
            reference.OPS[op](*args)
        return
    assert as_the_reference(op, flat if op != "quantize" else args, found)
