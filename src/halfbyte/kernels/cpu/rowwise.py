"""The row-wise ops on the native library: what a training step computes between its products.

As in `ops.py`, every argument is checked before a pointer is handed out, and what the library does not cover runs on
the reference: float64, empty tensors, tensors of several dtypes.
"""

from __future__ import annotations

import torch

from halfbyte.errors import ShapeError
from halfbyte.kernels import reference
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.reference.rowwise import check_labels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum hb_dtype


class RowwiseOps:
    """The row-wise ops of one loaded library, as methods with the schemas of `kernels/schema.py`."""

    def __init__(self, native: Native) -> None:
        self.native = native
        functions = native.functions
        self._cross_entropy, self._rotary = functions["hb_cross_entropy"], functions["hb_rotary"]
        self._rms_norm, self._rms_norm_grad = functions["hb_rms_norm"], functions["hb_rms_norm_grad"]
        self._swiglu, self._swiglu_grad = functions["hb_swiglu"], functions["hb_swiglu_grad"]

    def cross_entropy_(self, logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
        """`halfbyte::cross_entropy_`: logits [rows, vocabulary], labels int64 [rows] -> losses float32 [rows].

        Raises:
            IndexError: a label is not in [0, vocabulary).
            ShapeError: there is not one label for each row.
        """
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or not labels.is_cpu:
            raise ShapeError(f"labels {labels.dtype} {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
        number = _DTYPES.get(logits.dtype)
        if number is None or not logits.numel() or not logits.is_contiguous():
            return reference.OPS["cross_entropy_"](logits, labels, gradient)
        check_labels(labels, logits)
        labels = labels.contiguous()
        losses = torch.empty(labels.shape, dtype=torch.float32)
        rows, vocabulary = logits.shape
        self._cross_entropy(
            torch.get_num_threads(),
            logits.data_ptr(),
            number,
            rows,
            vocabulary,
            labels.data_ptr(),
            int(gradient),
            losses.data_ptr(),
        )
        return losses

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`halfbyte::rms_norm`: x [..., n], weight [n] -> y [..., n] and 1 / sqrt(mean(x^2) + eps), float32 [...]."""
        number = _number(x, weight)
        if number is None:
            return reference.OPS["rms_norm"](x, weight, eps)
        n = x.shape[-1]
        if weight.shape != (n,):
            raise ShapeError(f"a norm's weight {tuple(weight.shape)} does not fit rows of {n}")
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:-1], dtype=torch.float32)
        self._rms_norm(
            torch.get_num_threads(),
            x.data_ptr(),
            weight.data_ptr(),
            number,
            rstd.numel(),
            n,
            eps,
            y.data_ptr(),
            rstd.data_ptr(),
        )
        return y, rstd

    def rms_norm_grad(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
    ) -> torch.Tensor:
        """`halfbyte::rms_norm_grad`: the gradient of `x` [..., n] from that of `rms_norm`'s y."""
        number = _number(grad, x, weight)
        if number is None:
            return reference.OPS["rms_norm_grad"](grad, x, weight, rstd)
        n = x.shape[-1]
        if grad.shape != x.shape or weight.shape != (n,) or rstd.shape != x.shape[:-1] or rstd.dtype != torch.float32:
            raise ShapeError(f"gradient {tuple(grad.shape)}, weight or rstd do not fit x {tuple(x.shape)}")
        grad, x, weight, rstd = grad.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm_grad(
            torch.get_num_threads(),
            grad.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            rstd.data_ptr(),
            number,
            rstd.numel(),
            n,
            out.data_ptr(),
        )
        return out

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`halfbyte::swiglu`: gate * sigmoid(gate) * up, all of one shape."""
        number = _number(gate, up)
        if number is None:
            return reference.OPS["swiglu"](gate, up)
        _same_shape(gate, up)
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty(gate.shape, dtype=gate.dtype)
        threads = torch.get_num_threads()
        self._swiglu(threads, gate.data_ptr(), up.data_ptr(), number, gate.numel(), out.data_ptr())
        return out

    def swiglu_grad(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`halfbyte::swiglu_grad`: the gradients of gate and up from that of `swiglu`'s result."""
        number = _number(grad, gate, up)
        if number is None:
            return reference.OPS["swiglu_grad"](grad, gate, up)
        _same_shape(grad, gate, up)
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._swiglu_grad(
            torch.get_num_threads(),
            grad.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            number,
            gate.numel(),
            grad_gate.data_ptr(),
            grad_up.data_ptr(),
        )
        return grad_gate, grad_up

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
        """`halfbyte::rotary`: x [batch, tokens, heads, dim], cos and sin [batch or 1, tokens, dim] -> as x."""
        number = _number(x, cos, sin)
        if number is None:
            return reference.OPS["rotary"](x, cos, sin, inverse)
        batch, tokens, heads, dim = x.shape
        if cos.shape != sin.shape or cos.shape not in ((1, tokens, dim), (batch, tokens, dim)) or dim % 2:
            raise ShapeError(f"angles {tuple(cos.shape)}, {tuple(sin.shape)} do not fit heads {tuple(x.shape)}")
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rotary(
            torch.get_num_threads(),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            number,
            batch * tokens,
            cos.shape[0] * tokens,
            heads,
            dim,
            int(inverse),
            out.data_ptr(),
        )
        return out


def _number(*tensors: torch.Tensor) -> int | None:
    """The dtype's number where all tensors have it, lie on the CPU and hold something; None where they do not."""
    first = tensors[0]
    usable = all(tensor.dtype == first.dtype and tensor.is_cpu and tensor.numel() for tensor in tensors)
    return _DTYPES.get(first.dtype) if usable else None


def _same_shape(*tensors: torch.Tensor) -> None:
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ShapeError(f"shapes differ: {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")
