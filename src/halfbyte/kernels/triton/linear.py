"""Products with a packed weight on a GPU, forward and backward: three ways, by the number of rows.

A single row is bound by reading the weight (`vector.py`); some rows decode it into the tiles of a product on tensor
cores (`tiles.py`); for many rows the whole weight is decoded and multiplied by the vendor's GEMM. The caching allocator
gives the decoded weight the same memory at each call, in the order of the stream. Where one way takes over from another
is data (`tuning.GpuTuning`).

Weights whose rows share blocks within 32 columns, codes of 8 bits and some rows of float32 go the last way.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.errors import ShapeError
from halfbyte.kernels import reference
from halfbyte.kernels.reference.linear import add_branches, check_adapters
from halfbyte.kernels.triton import pairs, tiles, vector
from halfbyte.kernels.triton.dequantize import decode
from halfbyte.kernels.triton.products import Branch, Product
from halfbyte.kernels.triton.weights import shared_scales, takes, weight_beside
from halfbyte.kernels.tuning import gpu_tuning

_MOST_RANK = 128  # of an adapter whose branch is added in registers


def linear(*args: Any) -> torch.Tensor:
    """`halfbyte::linear`: packed [out_features, K], x [..., K], bias [out_features] or None -> [..., out], as x."""
    n, x, bias = args[9:]
    return _forward(args, n, x, bias)


def linear_lora(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_lora`: packed, out_features, x [..., K], bias, then A, B, scaling and rows of each adapter.

    The branch of a single adapter for all rows is added before few rows are rounded; other branches are products of
    their own.
    """
    n, x, bias, a, b, scaling, rows = args[9:]
    check_adapters(x, n, a, b, scaling, rows)
    if len(a) == 1 and rows[0] == x.shape[:-1].numel() and 0 < len(a[0]) <= _MOST_RANK:
        return _forward(args, n, x, bias, (a[0], b[0], scaling[0]))
    return add_branches(_forward(args, n, x, bias), x, a, b, scaling, rows)


def linear_grad_input(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_grad_input`: packed [N, K], grad [..., N] -> grad.dtype [..., K]."""
    k, grad = args[9:]
    n, dtype = grad.shape[-1], grad.dtype
    if not takes(dtype, grad.device) or not grad.numel() or not k:
        return reference.OPS["linear_grad_input"](*args)
    weight = weight_beside(args, n * k, grad)
    rows, tuning = grad.shape[:-1].numel(), gpu_tuning(grad.device)
    group = shared_scales(weight, k)
    if not group or rows > tuning.grad_rows or dtype == torch.float32:
        return grad @ decode(weight, n * k, dtype).view(n, k)
    out = torch.empty((*grad.shape[:-1], k), dtype=dtype, device=grad.device)
    tiles.multiply(Product(weight, group, rows, n, k, grad.contiguous(), out, gradient=True), tuning)
    return out


def _forward(
    args: tuple[Any, ...],
    n: int,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """y = x W^T + bias, and scaling * (x A^T) B^T of `adapter` (A, B, scaling)."""
    dtype, k = x.dtype, x.shape[-1]
    if not takes(dtype, x.device) or not x.numel() or not n:
        y = reference.OPS["linear"](*args[:9], n, x, bias)
        return y if adapter is None else _with_branch(y, x, *adapter)
    weight = weight_beside(args, n * k, x)
    if bias is not None and (bias.dtype != dtype or bias.shape != (n,) or bias.device != x.device):
        raise ShapeError(f"the bias is {bias.dtype} {tuple(bias.shape)}, the product needs {dtype} ({n},)")
    rows, tuning = x.shape[:-1].numel(), gpu_tuning(x.device)
    group = shared_scales(weight, k)
    by_vector = rows <= tuning.vector_rows
    if not group or not (by_vector or (rows <= tuning.linear_rows and dtype != torch.float32)):
        y = torch.nn.functional.linear(x, decode(weight, n * k, dtype).view(n, k), bias)
        return y if adapter is None else _with_branch(y, x, *adapter)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    branch = None
    if adapter is not None:
        a, b, scaling = adapter
        b = b if takes(b.dtype, x.device) else b.to(dtype)
        branch = Branch(x.view(rows, k) @ a.to(dtype).t(), b.contiguous(), scaling)
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    by_pairs = tuning.pairs and dtype == torch.bfloat16 and not torch.version.hip
    kernel = (pairs if by_pairs else vector) if by_vector else tiles
    kernel.multiply(Product(weight, group, rows, n, k, x, out, bias, branch), tuning)
    return out


def _with_branch(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    return add_branches(y, x, [a], [b], [scaling], [x.shape[:-1].numel()])
