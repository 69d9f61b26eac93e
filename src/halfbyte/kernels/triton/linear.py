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
    return multiply(args, n, x, bias)


def linear_lora(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_lora`: packed, out_features, x [..., K], bias, then A, B, scaling and rows of each adapter.

    The branch of a single adapter for all rows is added before few rows are rounded; other branches are products of
    their own.
    """
    n, x, bias, a, b, scaling, rows = args[9:]
    check_adapters(x, n, a, b, scaling, rows)
    have = x.shape[:-1].numel()
    if len(a) == 1 and rows[0] == have and 0 < len(a[0]) <= _MOST_RANK:
        inputs = x.reshape(have, x.shape[-1]) @ a[0].to(x.dtype).t()
        return multiply(args, n, x, bias, Branch(inputs, b[0], scaling[0]))
    return add_branches(multiply(args, n, x, bias), x, a, b, scaling, rows)


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


def multiply(
    args: tuple[Any, ...], n: int, x: torch.Tensor, bias: torch.Tensor | None, branch: Branch | None = None
) -> torch.Tensor:
    """x [..., k] W^T + bias, and an adapter's branch -> [..., n], as x.

    Args:
        args: begins with the nine fields of the packed W [n, k].
        n: rows of W.
        x: any floating dtype, on W's device.
        bias: [n], x's dtype, or None.
        branch: of all rows; rank 1 or more. Where the kernel does not take it, it is added to the rounded product.

    Raises:
        ShapeError: the bias does not fit.
    """
    dtype, k, rows = x.dtype, x.shape[-1], x.shape[:-1].numel()
    if not takes(dtype, x.device) or not x.numel() or not n:
        return _with_branch(reference.OPS["linear"](*args[:9], n, x, bias), branch)
    weight = weight_beside(args, n * k, x)
    if bias is not None and (bias.dtype != dtype or bias.shape != (n,) or bias.device != x.device):
        raise ShapeError(f"the bias is {bias.dtype} {tuple(bias.shape)}, the product needs {dtype} ({n},)")
    tuning = gpu_tuning(x.device)
    group = shared_scales(weight, k)
    by_vector = rows <= tuning.vector_rows
    if not group or not (by_vector or (rows <= tuning.linear_rows and dtype != torch.float32)):
        return _with_branch(torch.nn.functional.linear(x, decode(weight, n * k, dtype).view(n, k), bias), branch)
    bias = None if bias is None else bias.contiguous()
    later = None
    if branch is not None and branch.b.shape[-1] > _MOST_RANK:
        branch, later = None, branch
    if branch is not None:
        b = branch.b if takes(branch.b.dtype, x.device) else branch.b.to(dtype)
        branch = branch._replace(b=b.contiguous())
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    by_pairs = tuning.pairs and dtype == torch.bfloat16 and not torch.version.hip
    kernel = (pairs if by_pairs else vector) if by_vector else tiles
    kernel.multiply(Product(weight, group, rows, n, k, x.contiguous(), out, bias, branch), tuning)
    return _with_branch(out, later)


def _with_branch(y: torch.Tensor, branch: Branch | None) -> torch.Tensor:
    if branch is not None:
        y.view(len(branch.inputs), y.shape[-1]).addmm_(branch.inputs, branch.b.to(y.dtype).t(), alpha=branch.scaling)
    return y
