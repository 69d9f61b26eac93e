"""A mixture of experts on packed weights: only the experts that tokens are sent to are decoded, in one call for all.

A layer of experts sends each token to `top_k` of its matrices. Here the pairs of token and expert are sorted by expert,
and one grouped product (`halfbyte::grouped_linear`) multiplies each group of rows with its expert's slice of the packed
weight. Nothing reads on the host what the router chose, so a GPU never waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from halfbyte.errors import ShapeError
from halfbyte.tensor import QuantizedTensor


class Routing(NamedTuple):
    """Pairs of token and expert, sorted by expert.

    Attributes:
        expert: integer [pairs], ascending. One that does not exist (the mark of expert parallelism for "elsewhere") is
            last, and its rows give 0.
        order: int64 [pairs], where each pair stood before, row by row of [tokens, top_k].
        place: int64 [tokens, top_k], where each pair stands now.
        ends: int32 [experts], where each expert's pairs end.
    """

    expert: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor
    ends: torch.Tensor

    @property
    def token(self) -> torch.Tensor:
        """int64 [pairs], the token of each."""
        return self.order // self.place.shape[1]


def route(top_k_index: torch.Tensor, experts: int) -> Routing:
    """Sort the pairs of a router's choice, integer [tokens, top_k], by expert; those of one expert stay in order."""
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    each = torch.arange(experts, device=expert.device, dtype=expert.dtype)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(expert, each, right=True, out_int32=True)
    return Routing(expert, order, place.view(-1, top_k_index.shape[-1]), ends)


def pieces(routing: Routing, rows: int) -> Iterator[tuple[slice, Routing]]:
    """Cut the pairs between experts, so that a piece has `rows` of them, or one expert's. Waits for the device.

    Returns:
        Each piece's place among the pairs, and its routing; `place` stays that of all pairs.
    """
    cuts = [0]
    for last in routing.ends.tolist():
        if last - cuts[-1] >= max(rows, 1):
            cuts.append(last)
    if cuts[-1] < len(routing.order):
        cuts.append(len(routing.order))
    for first, last in pairwise(cuts):
        where = slice(first, last)
        ends = (routing.ends - first).clamp(0, last - first)
        yield where, Routing(routing.expert[where], routing.order[where], routing.place, ends)


def dispatch(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """x [tokens, features] -> the row of each pair's token, [pairs, features]."""
    result: torch.Tensor = _Dispatch.apply(x, routing.token, routing.place)
    return result


def combine(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """y [pairs, features] -> each token's sum over its pairs, [tokens, features], rounded once."""
    result: torch.Tensor = _Combine.apply(y, routing.token, routing.place)
    return result


class _Dispatch(torch.autograd.Function):
    """Each is the way back of the other: torch's own for an index adds row by row, and rounds after each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Combine.apply(grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token, place)
        # The rows of `place`, summed in float32 where y has 16 bits, and never gathered into a tensor of their own.
        return torch.nn.functional.embedding_bag(place, y, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Dispatch.apply(grad, *ctx.saved_tensors), None, None


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, routing: Routing, *, transposed: bool = False
) -> torch.Tensor:
    """Each row times the matrix of its expert.

    Args:
        x: [pairs, in], in the order of `routing`.
        weight: [experts, out, in], a frozen QuantizedTensor or dense.
        routing: from `route`.
        transposed: the weight is [experts, in, out].

    Returns:
        [pairs, out], in x's dtype (autocast's where that is on and the weight is packed).

    Raises:
        ShapeError: the weight does not fit the rows or the routing.
    """
    if weight.dim() != 3 or weight.shape[1 if transposed else 2] != x.shape[-1] or len(weight) != len(routing.ends):
        raise ShapeError(f"cannot multiply {tuple(x.shape)} by {len(routing.ends)} experts of {tuple(weight.shape)}")
    if not isinstance(weight, QuantizedTensor):
        return _dense(x, weight if transposed else weight.transpose(1, 2), routing.ends)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    packed = QuantizedTensor.packed(weight)  # torch.compile traces calls of torch.Tensor's methods only
    op = torch.ops.halfbyte.grouped_linear_grad_input if transposed else torch.ops.halfbyte.grouped_linear
    result: torch.Tensor = op(*packed, weight.shape[2 if transposed else 1], x, routing.ends)
    return result


class GroupedLora(NamedTuple):
    """A LoRA adapter for each expert: row x of expert e gets scaling (x a[e]^T) b[e]^T beside its product.

    Attributes:
        a: [experts, rank, in], any floating dtype and strides, as b.
        b: [experts, out, rank].
        scaling: lora_alpha / rank, usually.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def grouped_lora(
    x: torch.Tensor, adapter: GroupedLora, routing: Routing, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """What an adapter adds to a grouped product.

    Args:
        x: [pairs, in], in the order of `routing`. A and B are rounded to its dtype.
        adapter: of as many experts as the routing.
        routing: from `route`.
        tokens: [tokens, in], of which x is the `dispatch`: autograd keeps them and not x, which has a row for each
            expert of a token.

    Returns:
        [pairs, out], in x's dtype.
    """
    a, b, scaling = adapter
    if len(x) < len(a):
        # Of these rows' experts only: casting and transposing all of them takes longer than the products.
        expert = routing.expert.clamp(max=len(a) - 1)
        inner = torch.bmm(a[expert].to(x.dtype), x[:, :, None]) * scaling
        return torch.bmm(b[expert].to(x.dtype), inner)[:, :, 0]
    down = a.to(x.dtype)
    if tokens is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        inner = _dense(x, down.transpose(1, 2), routing.ends)
    else:
        inner = _DownFromTokens.apply(x, tokens.to(x.dtype), down, routing)
    inner = inner * scaling
    return _dense(inner, b.to(x.dtype).transpose(1, 2), routing.ends)


class _DownFromTokens(torch.autograd.Function):
    """x A^T by expert, where x is gathered again on the way back. Gradients of x go to the tokens at once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, a: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.save_for_backward(tokens, a, routing.token, routing.place, routing.ends)
        return _dense(x, a.transpose(1, 2), routing.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, a, token, place, ends = ctx.saved_tensors
        _, wants_tokens, wants_a, _ = ctx.needs_input_grad
        of_tokens = _Combine.apply(_dense(grad, a, ends), token, place) if wants_tokens else None
        of_a = _by_group(grad.contiguous(), tokens.index_select(0, token), ends) if wants_a else None
        return None, of_tokens, of_a, None


def _by_group(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """left [rows, m] and right [rows, n] -> [experts, m, n], each expert's left^T right over its rows."""
    if _has_grouped_mm(right, (left.shape[1], right.shape[1])):
        return torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
    result = left.new_zeros((len(ends), left.shape[1], right.shape[1]))
    for matrix, (first, last) in zip(result, pairwise([0, *ends.tolist()]), strict=True):
        torch.mm(left[first:last].t(), right[first:last], out=matrix)
    return result


def _has_grouped_mm(x: torch.Tensor, sizes: Sequence[int]) -> bool:
    whole_reads = all(size % 8 == 0 for size in sizes)  # of 16 bytes
    return x.is_cuda and x.dtype == torch.bfloat16 and whole_reads and hasattr(torch.nn.functional, "grouped_mm")


def _dense(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times weight [experts, in, out]; on a GPU without waiting for it where torch can."""
    if _has_grouped_mm(x, weight.shape[1:]):
        return _by_grouped_mm(x, weight, ends)
    sizes = [end - begin for begin, end in pairwise([0, *ends.tolist(), x.shape[0]])]
    *groups, rest = x.split(sizes)
    # Unbound at once: the gradient of weight[e] would be a tensor of all experts for each of them.
    products = [rows @ matrix for rows, matrix in zip(groups, weight.unbind(), strict=True)]
    return torch.cat([*products, rest.new_zeros((rest.shape[0], weight.shape[2]))])


def _by_grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    y = torch.nn.functional.grouped_mm(x, weight, offs=ends)
    has_expert = torch.arange(len(x), device=x.device) < ends[-1]
    return torch.where(has_expert[:, None], y, 0)  # torch leaves the other rows as they were
