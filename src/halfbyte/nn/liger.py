"""liger-kernel's norm, gate, rotation and loss on a GPU, as halfbyte calls its own.

Its functions are called for the modules that `halfbyte.models.fused` covers; nothing of transformers is replaced by
liger-kernel's own patching, which works on classes and so on every model of the process.

What to know of it: the backward pass of `swiglu` writes over gate and up, so a graph that is kept cannot be gone
through twice; `rotate` writes over its inputs, and over the gradients that it is given; the norm could do that, and is
told not to, since a residual may need them. The loss waits for the device twice, to count its tokens and to see whether
it is scaled.

Importing this module imports triton.
"""

from __future__ import annotations

import torch
from liger_kernel.ops import (
    LigerFusedLinearCrossEntropyFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`halfbyte.nn.rms_norm`, rounded as transformers does: before the weight, and after."""
    result: torch.Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`halfbyte.nn.swiglu`, rounded as transformers does: after silu, and after the product."""
    result: torch.Tensor = LigerSiLUMulFunction.apply(gate, up)
    return result


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, in their own memory.

    Args:
        q: [batch, heads, tokens, dim].
        k: likewise, of as many heads or fewer.
        cos: [batch or 1, tokens, dim].
        sin: likewise.
    """
    with torch.cuda.device_of(q):  # liger-kernel launches this one on the current device
        result: tuple[torch.Tensor, torch.Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
    return result


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The summed loss of [rows, width] under softmax(hidden W^T + bias), all of one dtype; float32 [].

    Labels are in [0, vocabulary); one that is not stops the device, as torch's own loss does.
    """
    torch._assert_async(((labels >= 0) & (labels < weight.shape[0])).all(), "a label is out of range")
    with torch.cuda.device_of(hidden):
        arguments = (hidden, weight, labels, bias, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
        loss: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]
    return loss
