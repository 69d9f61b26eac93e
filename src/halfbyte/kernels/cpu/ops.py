"""The ops on the native library: every argument is checked here, and nothing is checked after.

The library trusts its caller: a wrong size would read or write past the end of a buffer. So each function below proves,
before it hands out a pointer, that the tensor is on the CPU, has the dtype and the number of elements the call will
touch, is contiguous and aligned; what does not fit raises, in the words of the request.

What the library does not cover runs on the reference, on purpose: float64 (gradient checks), empty tensors. Products
whose rows are not whole blocks, or of 8-bit codes, go panel by panel through torch's GEMM, and so do products of many
rows where the library has no GEMM of its own (it has one for bfloat16 on AMX).

Speed of the calls themselves matters, since a one-row product takes 0.2 ms: no tensor is created that is not returned,
pointers are passed as integers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.errors import FormatError, ShapeError
from halfbyte.formats import BLOCK_SIZES, CODEBOOKS, FORMATS, SCALE_BLOCK, double_quant, get_codebook
from halfbyte.formats.packing import packed_size
from halfbyte.kernels import reference
from halfbyte.kernels.cpu.library import FEW_ROWS, Lora, Native, Weight
from halfbyte.kernels.cpu.rowwise import RowwiseOps
from halfbyte.kernels.reference.linear import add_branches, check_adapters
from halfbyte.kernels.schema import PackedWeight, group_bounds
from halfbyte.kernels.tuning import TUNING

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum hb_dtype
_FORMATS = {name: (number, CODEBOOKS[name].bits) for number, name in enumerate(FORMATS)}
_GROUP = 64  # columns that the few-row kernels take at once


class Ops(RowwiseOps):
    """The ops of one loaded library, as methods with the schemas of `kernels/schema.py`."""

    def __init__(self, native: Native) -> None:
        super().__init__(native)
        functions = native.functions
        self._quantize, self._quantize_scales = functions["hb_quantize"], functions["hb_quantize_scales"]
        self._dequantize, self._dequantize_rows = functions["hb_dequantize"], functions["hb_dequantize_rows"]
        self._linear, self._grad_input = functions["hb_linear"], functions["hb_linear_grad_input"]
        self._linear_lora = functions["hb_linear_lora"]
        self._grouped_linear = functions["hb_grouped_linear"]
        self._grouped_grad_input = functions["hb_grouped_linear_grad_input"]
        self._panels = threading.local()

    def table(self) -> dict[str, Callable[..., Any]]:
        """Op name -> implementation."""
        return {name: getattr(self, name) for name in reference.OPS}

    def quantize(self, w: torch.Tensor, format: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`halfbyte::quantize`; see `formats.blockwise.quantize`."""
        bits = get_codebook(format).bits
        _check_block_size(block_size)
        if w.dtype == torch.float64:
            w = w.float()
        if w.dtype not in _DTYPES:
            raise FormatError(f"cannot quantize a tensor of {w.dtype}; choose float32, bfloat16, float16 or float64")
        flat = _ready(w.detach())
        count = flat.numel()
        codes = torch.empty(packed_size(count, bits), dtype=torch.uint8)
        scales = torch.empty(-(-count // block_size), dtype=torch.float32)
        self._quantize(
            torch.get_num_threads(),
            flat.data_ptr(),
            _DTYPES[flat.dtype],
            count,
            _FORMATS[format][0],
            block_size,
            codes.data_ptr(),
            scales.data_ptr(),
        )
        return codes, scales

    def quantize_scales(self, scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`halfbyte::quantize_scales`; see `formats.double_quant.quantize_scales`."""
        if scales.dtype != torch.float32 or bits not in (8, 6, 4) or not scales.numel():
            return double_quant.quantize_scales(scales, bits)
        offset = double_quant.mean(scales)
        centred = _ready(scales - offset)
        count = centred.numel()
        codes = torch.empty(packed_size(count, bits), dtype=torch.uint8)
        absmax = torch.empty(-(-count // SCALE_BLOCK), dtype=torch.float32)
        threads = torch.get_num_threads()
        self._quantize_scales(threads, centred.data_ptr(), count, bits, codes.data_ptr(), absmax.data_ptr())
        return codes, absmax, offset

    def dequantize(self, *args: Any) -> torch.Tensor:
        """`halfbyte::dequantize`: packed weight, shape, dtype -> `dtype` [*shape]."""
        shape, dtype = args[9:]
        number, count = _DTYPES.get(dtype), math.prod(shape)
        if number is None or not count:
            return reference.OPS["dequantize"](*args)
        if min(shape, default=0) < 0:
            raise ShapeError(f"a weight cannot have the shape {list(shape)}")
        weight, keep = packed_weight(args, count)
        out = torch.empty(shape, dtype=dtype)
        self._dequantize(torch.get_num_threads(), weight, count, 0, 1, 0, count, number, out.data_ptr())
        del keep
        return out

    def dequantize_rows(self, *args: Any) -> torch.Tensor:
        """`halfbyte::dequantize_rows`: packed [N, columns], rows int64 [...], dtype -> `dtype` [..., columns]."""
        columns, rows, dtype = args[9:]
        number, count = _DTYPES.get(dtype), rows.numel()
        if number is None or not count or columns < 1 or rows.dtype not in (torch.int64, torch.int32):
            return reference.OPS["dequantize_rows"](*args)
        index = _ready(rows.long())
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0:
            # Indexing would count from the end: an ignored label (-100) looked up by mistake would pass for a token.
            raise IndexError(f"row {low} is out of range")
        try:
            weight, keep = packed_weight(args, (high + 1) * columns)
        except ShapeError as error:
            raise IndexError(f"row {high} is out of range: {error}") from None
        out = torch.empty((*rows.shape, columns), dtype=dtype)
        threads = torch.get_num_threads()
        self._dequantize_rows(threads, weight, columns, index.data_ptr(), count, number, out.data_ptr())
        del keep
        return out

    def linear(self, *args: Any) -> torch.Tensor:
        """`halfbyte::linear`: packed [out_features, K], x [..., K], bias [out_features] or None -> [..., out], as x."""
        n, x, bias = args[9:]
        dtype, shape = x.dtype, x.shape
        number, k = _DTYPES.get(dtype), shape[-1]
        count = x.numel()
        if number is None or not count or not n:
            return reference.OPS["linear"](*args)
        _check_on_cpu(x)
        _check_bias(bias, n, dtype)
        weight, keep = packed_weight(args, n * k)
        rows = count // k
        tuning = TUNING[self.native.isa]
        most = tuning.linear_rows if number == 1 else tuning.linear_rows_float
        if rows > most or k % _GROUP or not _whole_rows(args, k):
            if number and tuning.float_panels:
                return self._linear_by_panels(weight, n, x.float(), None if bias is None else bias.float()).to(dtype)
            return self._linear_by_panels(weight, n, x, bias)
        x = _ready(x)
        out = torch.empty((*shape[:-1], n), dtype=dtype)
        bias = None if bias is None else _ready(bias)  # by this name: a copy has to live as long as the call
        at_bias = None if bias is None else bias.data_ptr()
        failed = self._linear(
            torch.get_num_threads(), weight, n, k, x.data_ptr(), rows, number, at_bias, out.data_ptr()
        )
        del keep
        return _checked(out, failed)

    def linear_lora(self, *args: Any) -> torch.Tensor:
        """`halfbyte::linear_lora`: packed, out_features, x [..., K], bias, then A, B, scaling and rows of each adapter.

        A few rows are one call of the library, which multiplies A and B as they are; where torch multiplies them they
        are rounded to `x`'s dtype first.
        """
        n, x, bias, a, b, scaling, rows = args[9:]
        check_adapters(x, n, a, b, scaling, rows)
        dtype, shape = x.dtype, x.shape
        number, k = _DTYPES.get(dtype), shape[-1]
        batch = shape[:-1].numel()
        tuning = TUNING[self.native.isa]
        most = min(tuning.linear_rows if number == 1 else tuning.linear_rows_float, FEW_ROWS)
        few = number is not None and n and k and 0 < batch <= most and not k % _GROUP and _whole_rows(args, k)
        if not few or any(A.dtype != B.dtype or A.dtype not in _DTYPES for A, B in zip(a, b, strict=True)):
            return add_branches(self.linear(*args[:12]), x, a, b, scaling, rows)
        _check_on_cpu(x)
        _check_bias(bias, n, dtype)
        weight, keep = packed_weight(args, n * k)
        x, a, b = _ready(x), [_ready(one) for one in a], [_ready(one) for one in b]
        out = torch.empty((*shape[:-1], n), dtype=dtype)
        bias = None if bias is None else _ready(bias)
        adapters, first = (Lora * len(a))(), 0
        for i, one in enumerate(a):
            at_a, at_b = one.data_ptr(), b[i].data_ptr()
            adapters[i] = Lora(at_a, at_b, len(one), first, rows[i], _DTYPES[one.dtype], scaling[i])
            first += rows[i]
        failed = self._linear_lora(
            torch.get_num_threads(),
            weight,
            n,
            k,
            x.data_ptr(),
            batch,
            number,
            None if bias is None else bias.data_ptr(),
            adapters,
            len(a),
            out.data_ptr(),
        )
        del keep
        return _checked(out, failed)

    def linear_grad_input(self, *args: Any) -> torch.Tensor:
        """`halfbyte::linear_grad_input`: packed [N, K], grad [..., N] -> grad.dtype [..., K]."""
        k, grad = args[9:]
        dtype, shape = grad.dtype, grad.shape
        number, n = _DTYPES.get(dtype), shape[-1]
        count = grad.numel()
        if number is None or not count or not k:
            return reference.OPS["linear_grad_input"](*args)
        _check_on_cpu(grad)
        weight, keep = packed_weight(args, n * k)
        rows = count // n
        tuning = TUNING[self.native.isa]
        most = tuning.grad_rows if number == 1 else tuning.grad_rows_float
        if rows > most or k % _GROUP or not _whole_rows(args, k):
            if number and tuning.float_panels:
                return self._grad_by_panels(weight, k, grad.float()).to(dtype)
            return self._grad_by_panels(weight, k, grad)
        grad = _ready(grad)
        out = torch.empty((*shape[:-1], k), dtype=dtype)
        failed = self._grad_input(torch.get_num_threads(), weight, n, k, grad.data_ptr(), rows, number, out.data_ptr())
        del keep
        return _checked(out, failed)

    def grouped_linear(self, *args: Any) -> torch.Tensor:
        """`halfbyte::grouped_linear`: packed [experts, out, K], x [rows, K], ends int32 [experts] -> [rows, out]."""
        tuning = TUNING[self.native.isa]
        return self._grouped("grouped_linear", args, (tuning.linear_rows_float, tuning.linear_rows))

    def grouped_linear_grad_input(self, *args: Any) -> torch.Tensor:
        """`halfbyte::grouped_linear_grad_input`: packed [experts, N, K], grad [rows, N], ends -> [rows, K]."""
        tuning = TUNING[self.native.isa]
        return self._grouped("grouped_linear_grad_input", args, (tuning.grad_rows_float, tuning.grad_rows))

    def _grouped(self, op: str, args: tuple[Any, ...], limits: tuple[int, int]) -> torch.Tensor:
        """One call for all experts of as many rows as the library's kernels take, and one for each other.

        `limits`: how many that are, of other types and of bfloat16.
        """
        forward = op == "grouped_linear"
        features, x, ends = args[9:]
        bounds = group_bounds(x, ends)
        number = _DTYPES.get(x.dtype)
        if number is None or not x.numel() or not features or not bounds:
            return reference.OPS[op](*args)
        _check_on_cpu(x)
        n, k = (features, x.shape[1]) if forward else (x.shape[1], features)
        weight, keep = packed_weight(args, len(bounds) * n * k)
        x, ends = _ready(x), _ready(ends)
        out = torch.empty((x.shape[0], features), dtype=x.dtype)
        most = 0 if k % _GROUP or not _whole_rows(args, k) else limits[number == 1]
        if most:
            call = self._grouped_linear if forward else self._grouped_grad_input
            threads, at_x, at_ends = torch.get_num_threads(), x.data_ptr(), ends.data_ptr()
            _checked(out, call(threads, weight, len(bounds), n, k, at_x, at_ends, most, number, out.data_ptr()))
        del keep
        for expert, (first, last) in enumerate(bounds):
            if last - first > most:
                of_expert = PackedWeight(*args[:9]).span(expert * n * k, n * k)
                rows = (n, x[first:last], None) if forward else (k, x[first:last])
                out[first:last] = (self.linear if forward else self.linear_grad_input)(*of_expert, *rows)
        out[bounds[-1][1] :] = 0
        return out

    def _linear_by_panels(self, weight: Weight, n: int, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Rows of W decoded into a buffer that stays in the cache, multiplied by torch's GEMM, panel by panel."""
        k = x.shape[-1]
        flat = x.reshape(-1, k)
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        products = out.view(-1, n)  # what is returned must not be a view: autograd forbids writing to one in place
        threads, number = torch.get_num_threads(), _DTYPES[x.dtype]
        step = self._panel_step(n, k * x.element_size())
        buffer = self._panel(step * k, x.dtype)
        for row in range(0, n, step):
            rows = min(step, n - row)
            panel = buffer[: rows * k].view(rows, k)
            self._dequantize(threads, weight, k, row, rows, 0, k, number, panel.data_ptr())
            target = products[:, row : row + rows]
            if bias is None:
                torch.mm(flat, panel.t(), out=target)
            else:
                torch.addmm(bias[row : row + rows], flat, panel.t(), out=target)
        return out

    def _grad_by_panels(self, weight: Weight, k: int, grad: torch.Tensor) -> torch.Tensor:
        """The same over panels of columns: each holds whole sums, so nothing is rounded in between."""
        n = grad.shape[-1]
        flat = grad.reshape(-1, n)
        out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype)
        products = out.view(-1, k)
        threads, number = torch.get_num_threads(), _DTYPES[grad.dtype]
        step = self._panel_step(k, n * grad.element_size())
        buffer = self._panel(step * n, grad.dtype)
        for column in range(0, k, step):
            columns = min(step, k - column)
            panel = buffer[: n * columns].view(n, columns)
            self._dequantize(threads, weight, k, 0, n, column, columns, number, panel.data_ptr())
            torch.mm(flat, panel, out=products[:, column : column + columns])
        return out

    def _panel_step(self, total: int, nbytes: int) -> int:
        """Rows (or columns) of `nbytes` each that a panel holds: a multiple of 64, or all."""
        return min(total, max(TUNING[self.native.isa].panel_bytes // nbytes // _GROUP, 1) * _GROUP)

    def _panel(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """This Python thread's buffer: `dtype` [count]. Kept between calls, so that its pages stay mapped."""
        nbytes = count * dtype.itemsize
        buffer: torch.Tensor | None = getattr(self._panels, "buffer", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._panels.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes].view(dtype)


def packed_weight(args: tuple[Any, ...], count: int) -> tuple[Weight, tuple[torch.Tensor, ...]]:
    """A packed weight of `count` elements as the library takes it, and the tensors to keep alive during the call.

    Raises:
        FormatError: the format, block size or width of the scales is not offered.
        ShapeError: a tensor is too short, of another dtype or on another device.
    """
    codes, scales, absmax, offset, format, block_size, scale_bits, start, scale_start = args[:9]
    number, bits = _FORMATS.get(format) or (0, get_codebook(format).bits)
    _check_block_size(block_size)
    if count < 0:
        raise ShapeError(f"a packed weight cannot have {count} elements")
    if start < 0 or scale_start < 0:
        raise ShapeError(f"a packed weight cannot start at {start} of a block, {scale_start} of its scales")
    total = start + count
    blocks = -(-total // block_size)
    codes = _field(codes, "codes", torch.uint8, packed_size(total, bits))
    if scale_bits == 0:
        scales = _field(scales, "scales", torch.float32, blocks)
        weight = Weight(codes.data_ptr(), scales.data_ptr(), None, None, number, block_size, 0, start, 0)
        return weight, (codes, scales)
    if scale_bits not in (8, 6, 4) or absmax is None or offset is None:
        raise FormatError(f"scale_bits {scale_bits} with a second level is not offered; choose 0, 8, 6 or 4")
    last = scale_start + blocks
    scales = _field(scales, "scales", torch.uint8, packed_size(last, scale_bits))
    absmax = _field(absmax, "scale_absmax", torch.float32, -(-last // SCALE_BLOCK))
    offset = _field(offset, "scale_offset", torch.float32, 1)
    if offset.numel() != 1:
        raise ShapeError(f"scale_offset of a packed weight has {offset.numel()} elements; it is one number")
    weight = Weight(
        codes.data_ptr(),
        scales.data_ptr(),
        absmax.data_ptr(),
        offset.data_ptr(),
        number,
        block_size,
        scale_bits,
        start,
        scale_start,
    )
    return weight, (codes, scales, absmax, offset)


def _field(tensor: torch.Tensor, name: str, dtype: torch.dtype, least: int) -> torch.Tensor:
    """`tensor`, proven to be on the CPU, of `dtype`, contiguous, aligned, with at least `least` elements."""
    if tensor.dtype != dtype or not tensor.is_cpu or tensor.numel() < least:
        raise ShapeError(
            f"{name} of a packed weight is {tensor.dtype} [{tensor.numel()}] on {tensor.device}; "
            f"this weight needs {dtype} [{least}] on the CPU"
        )
    return _ready(tensor)


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous and aligned to its elements, copied only if it is not (a view into a file can be neither).

    Raises:
        ShapeError: it is on another device.
    """
    _check_on_cpu(tensor)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _check_on_cpu(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        raise ShapeError(f"a tensor on {tensor.device} cannot go to the native kernels, which run on the CPU")


def _check_bias(bias: torch.Tensor | None, n: int, dtype: torch.dtype) -> None:
    if bias is not None and (bias.dtype != dtype or bias.shape != (n,) or not bias.is_cpu):
        raise ShapeError(f"the bias is {bias.dtype} {tuple(bias.shape)}, the product needs {dtype} ({n},)")


def _whole_rows(args: tuple[Any, ...], k: int) -> bool:
    """Whether every row is whole blocks of 4-bit codes and begins with one: what the few-row kernels take."""
    return k % args[5] == 0 and args[7] == 0 and _FORMATS[args[4]][1] == 4


def takes_few_rows(weight: PackedWeight, k: int) -> bool:
    """Whether the few-row products take a packed weight of `k` columns."""
    return k % _GROUP == 0 and _whole_rows(tuple(weight), k)


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise FormatError(
            f"block size {block_size!r} is not offered; choose one of: {', '.join(map(str, BLOCK_SIZES))}"
        )


def _checked(out: torch.Tensor, failed: int) -> torch.Tensor:
    if failed:
        raise MemoryError("no memory for the activations' copy of a quantized product")
    return out
