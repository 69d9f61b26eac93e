"""What a training step computes between its products, row by row.

Every op computes in float32 (float64 for float64) and rounds its result once to the dtype of its input.
"""

from __future__ import annotations

import torch


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
    """`halfbyte::cross_entropy_`: logits [rows, vocabulary], labels int64 [rows] -> losses float32 [rows].

    With `gradient`, the logits are overwritten by the gradient of each row's loss: softmax minus one-hot.

    Raises:
        IndexError: a label is not in [0, vocabulary).
    """
    check_labels(labels, logits)
    wide = _wide(logits)
    at = labels.long()[:, None]
    log_sum = wide.logsumexp(-1, keepdim=True)
    losses = (log_sum - wide.gather(-1, at)).squeeze(-1)
    if gradient:
        share = (wide - log_sum).exp()
        logits.copy_(share.scatter_add_(-1, at, share.new_full(at.shape, -1.0)))
    return losses.float()


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise IndexError for a label that no row of logits has: read natively, it would be memory of something else."""
    if labels.is_cpu and labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= logits.shape[-1]:
            wrong = low if low < 0 else high
            raise IndexError(f"label {wrong} is out of range for a vocabulary of {logits.shape[-1]}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`halfbyte::rms_norm`: x [..., n], weight [n] -> y [..., n] and 1 / sqrt(mean(x^2) + eps), float32 [...]."""
    wide = _wide(x)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (_wide(weight) * (wide * rstd)).to(x.dtype), rstd.squeeze(-1).float()


def rms_norm_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """`halfbyte::rms_norm_grad`: the gradient of `x` [..., n] from that of `rms_norm`'s y."""
    wide, scale = _wide(x), rstd[..., None].to(_wide(x).dtype)
    weighted = _wide(grad) * _wide(weight)
    along = (weighted * wide).mean(-1, keepdim=True) * scale * scale
    return ((weighted - wide * along) * scale).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`halfbyte::swiglu`: gate * sigmoid(gate) * up, all of one shape.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    wide = _wide(gate)
    return (wide * wide.sigmoid() * _wide(up)).to(gate.dtype)


def swiglu_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`halfbyte::swiglu_grad`: the gradients of gate and up from that of `swiglu`'s result."""
    wide, upstream = _wide(gate), _wide(grad)
    sigmoid = wide.sigmoid()
    grad_gate = upstream * _wide(up) * (sigmoid * (1 + wide * (1 - sigmoid)))
    return grad_gate.to(gate.dtype), (upstream * (wide * sigmoid)).to(gate.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """`halfbyte::rotary`: x [batch, tokens, heads, dim], cos and sin [batch or 1, tokens, dim] -> as x.

    x cos + (-x2, x1) sin, where x1 and x2 are the halves of a head; `inverse`: the transposed map, which is the way
    back of the gradient.

    Source: RoFormer, arXiv 2104.09864, in the arrangement of GPT-NeoX.
    """
    wide, cosine, sine = _wide(x), _wide(cos)[:, :, None], _wide(sin)[:, :, None]
    if inverse:
        first, second = (wide * sine).chunk(2, dim=-1)
        turned = torch.cat((second, -first), dim=-1)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1) * sine
    return (wide * cosine + turned).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
