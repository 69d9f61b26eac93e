"""The loss of a language model's head without its logits: cross-entropy over chunks of tokens.

The logits of 512 tokens over a vocabulary of 32,000 take 33 MB in bfloat16, and the plain loss keeps them twice more in
float32. Here the logits of a chunk exist once, in the products' dtype; softmax and loss are computed from them in
float32, the gradient takes their place, and one product brings it back to the hidden states before the next chunk
begins. So the backward pass has nothing left to do but scale. Tokens whose label is ignored are never projected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Tokens whose logits exist at once: 512 tokens of width 2048 over 32,000 words took 0.23, 0.28 and 0.43 s with 256,
# 128 and 64. A larger vocabulary takes fewer, so that a chunk stays near these bytes.
CHUNK_ROWS, CHUNK_ROWS_LEAST, CHUNK_BYTES = 256, 64, 1 << 25


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    rows: tuple[Sequence[int], torch.Tensor] | None = None,
    summed: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Cross-entropy of `labels` under softmax(hidden W^T + bias), differentiable in hidden, weight and bias.

    Args:
        hidden: [..., width], floating.
        weight: [vocabulary, width].
        labels: int64 [...]; tokens with `ignore_index` do not count and cost nothing.
        bias: [vocabulary] or None.
        num_items: what the sum over tokens is divided by; None: the tokens that count, which makes it their mean.
        ignore_index: the label of tokens that do not count.
        rows: indices of rows, and [indices, width] that stands in for these rows of W; differentiable in that, while
            the gradient of W, which would be as large as W, is not computed.
        summed: another implementation, without `rows`: hidden [rows, width], W, labels [rows], bias, of one dtype ->
            the summed loss, float32 [].

    Returns:
        float32 []. The products, and so the logits, are in autocast's dtype where it is on and else in the weight's;
        softmax and loss are float32. A mean over no tokens is NaN, as torch has it.

    Raises:
        IndexError: a label is neither `ignore_index` nor in [0, vocabulary).
    """
    if torch.compiler.is_compiling():
        return _plain(hidden, weight, labels, bias, num_items, ignore_index, rows)
    device = weight.device  # a model that is split over devices may have its head on another
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    flat, targets = hidden.reshape(-1, hidden.shape[-1]).to(device), labels.reshape(-1).to(device)
    # On a GPU the host waits here for the labels, once a pass: less than projecting tokens for nothing would take.
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    number = len(kept)
    if number < len(targets):
        flat, targets = flat.index_select(0, kept), targets.index_select(0, kept)
    # Outside the function, so that autograd undoes them.
    flat, weight = flat.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    divisor = number if num_items is None else torch.as_tensor(num_items, device=device)
    if summed is not None and rows is None and number:
        return summed(flat, weight, targets, bias) / divisor
    index = values = None
    if rows is not None:
        index, values = torch.tensor(rows[0], device=device), rows[1].to(device, dtype)
        weight = weight.detach().index_copy(0, index, values.detach())
    total: torch.Tensor = _SummedLoss.apply(flat, weight, bias, targets, index, values)
    return total / divisor


def _plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    num_items: torch.Tensor | int | None,
    ignore_index: int,
    rows: tuple[Sequence[int], torch.Tensor] | None,
) -> torch.Tensor:
    """The same for torch.compile, with all logits: it takes no shape that depends on labels, and fuses what follows."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]).to(weight.device), labels.reshape(-1).to(weight.device)
    if rows is not None:
        weight = weight.detach().index_copy(0, torch.tensor(rows[0], device=weight.device), rows[1].to(weight))
    logits = torch.nn.functional.linear(flat.to(weight.dtype), weight, bias).float()
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    count = (targets != ignore_index).sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / count


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """Tokens of a chunk."""
    return min(CHUNK_ROWS, max(CHUNK_ROWS_LEAST, CHUNK_BYTES // (vocabulary * itemsize)))


class _SummedLoss(torch.autograd.Function):
    """The summed loss of [rows, width]; its gradients are computed on the way, for a gradient of 1.

    `values` are the rows of `weight` at `index`, for a gradient of these alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        index: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias, _, _, need_values = ctx.needs_input_grad
        gradient = need_hidden or need_weight or need_bias or need_values
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        step = chunk_rows(vocabulary, weight.element_size())
        buffer = hidden.new_empty((min(step, rows), vocabulary))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Sums over chunks: rounding each of them to 16 bits would lose what the last chunks add.
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if need_weight else None
        grad_bias = weight.new_zeros((vocabulary,), dtype=wide) if need_bias else None
        grad_values = None
        if index is not None and need_values:
            grad_values = weight.new_zeros((len(index), weight.shape[1]), dtype=wide)
        total = hidden.new_zeros((), dtype=torch.float64)
        for row in range(0, rows, step):
            chunk = hidden[row : row + step]
            logits = buffer[: len(chunk)]
            if bias is None:
                torch.mm(chunk, weight.t(), out=logits)
            else:
                torch.addmm(bias, chunk, weight.t(), out=logits)
            losses = torch.ops.halfbyte.cross_entropy_(logits, labels[row : row + step], gradient)
            total += losses.sum(dtype=torch.float64)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[row : row + step])
            if grad_weight is not None:
                grad_weight += logits.t() @ chunk
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
            if grad_values is not None:
                grad_values += logits[:, index].t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_values)
        ctx.dtype = weight.dtype
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, grad_values = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad,  # of no dimension: the dtype stays
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None if grad_bias is None else (grad_bias * grad).to(ctx.dtype),
            None,
            None,
            None if grad_values is None else (grad_values * grad).to(ctx.dtype),
        )
