"""The ops' contract: `torch.ops.halfbyte.*`, their schemas and their fakes.

A packed weight travels through the dispatcher as the nine fields of `PackedWeight`, in that order, in every op. `start`
and `scale_start` are what makes a slice of rows a view: it shares its parent's bytes, its parent's blocks and its
parent's offset, and says how much of the first block is not its own (traps 7 and 8 of the design).

Every op has a reference for any device (`reference/`), and may have native versions, which `registry` chooses from. The
fakes here give shapes and dtypes to torch.compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from halfbyte.errors import ShapeError
from halfbyte.formats import SCALE_BLOCK, get_codebook
from halfbyte.formats.packing import packed_size

NAMESPACE = "halfbyte"


class PackedWeight(NamedTuple):
    """A quantized tensor as the ops see it.

    Attributes:
        codes: uint8, packed; begins with a block's first code.
        scales: float32 [blocks]; with `scale_bits` > 0 uint8, packed codes of the second level, beginning with a
            second-level block's first code.
        scale_absmax: float32 [second-level blocks], or None.
        scale_offset: float32 [], or None.
        format: "nf4", ...
        block_size: weights that share a scale.
        scale_bits: 0 (scales are float32), 8, 6 or 4.
        start: weights of the first block that come before this tensor.
        scale_start: scales of the first second-level block that come before this tensor.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale_absmax: torch.Tensor | None
    scale_offset: torch.Tensor | None
    format: str
    block_size: int
    scale_bits: int
    start: int
    scale_start: int

    def span(self, first: int, count: int) -> PackedWeight:
        """Elements [first, first + count) of the flattened tensor, as views of the same bytes."""
        bits = get_codebook(self.format).bits
        block, start = divmod(self.start + first, self.block_size)
        blocks = -(-(start + count) // self.block_size)
        code_at = block * self.block_size * bits // 8
        codes = self.codes[code_at : code_at + packed_size(start + count, bits)]
        if not self.scale_bits:
            return self._replace(codes=codes, scales=self.scales[block : block + blocks], start=start)
        assert self.scale_absmax is not None
        second, scale_start = divmod(self.scale_start + block, SCALE_BLOCK)
        seconds = -(-(scale_start + blocks) // SCALE_BLOCK)
        scale_at = packed_size(second * SCALE_BLOCK, self.scale_bits)
        return self._replace(
            codes=codes,
            scales=self.scales[scale_at : scale_at + packed_size(scale_start + blocks, self.scale_bits)],
            scale_absmax=self.scale_absmax[second : second + seconds],
            start=start,
            scale_start=scale_start,
        )


_PACKED = (
    "Tensor codes, Tensor scales, Tensor? scale_absmax, Tensor? scale_offset, "
    "str format, int block_size, int scale_bits, SymInt start, SymInt scale_start"
)

SCHEMAS = {
    "quantize": "(Tensor w, str format, int block_size) -> (Tensor codes, Tensor scales)",
    "quantize_scales": "(Tensor scales, int bits) -> (Tensor codes, Tensor absmax, Tensor offset)",
    "dequantize": f"({_PACKED}, SymInt[] shape, ScalarType dtype) -> Tensor",
    "dequantize_rows": f"({_PACKED}, SymInt columns, Tensor rows, ScalarType dtype) -> Tensor",
    "linear": f"({_PACKED}, SymInt out_features, Tensor x, Tensor? bias) -> Tensor",
    "linear_lora": (
        f"({_PACKED}, SymInt out_features, Tensor x, Tensor? bias, "
        "Tensor[] a, Tensor[] b, float[] scaling, SymInt[] rows) -> Tensor"
    ),
    "linear_grad_input": f"({_PACKED}, SymInt in_features, Tensor grad) -> Tensor",
    "grouped_linear": f"({_PACKED}, SymInt out_features, Tensor x, Tensor ends) -> Tensor",
    "grouped_linear_grad_input": f"({_PACKED}, SymInt in_features, Tensor grad, Tensor ends) -> Tensor",
    "cross_entropy_": "(Tensor(a!) logits, Tensor labels, bool gradient) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    "rms_norm_grad": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_grad": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def split_packed(args: tuple[Any, ...]) -> tuple[PackedWeight, tuple[Any, ...]]:
    """An op's arguments as its packed weight and the rest."""
    fields = len(PackedWeight._fields)
    return PackedWeight(*args[:fields]), args[fields:]


def check_grouped(x: torch.Tensor, ends: torch.Tensor) -> None:
    """Refuse rows or ends that a grouped product cannot take; what the ends say is not looked at here.

    Raises:
        ShapeError: x is no matrix, or `ends` no int32 vector beside it.
    """
    if x.dim() != 2:
        raise ShapeError(f"a grouped product takes rows [rows, features], not {tuple(x.shape)}")
    if ends.dim() != 1 or ends.dtype != torch.int32 or ends.device != x.device:
        raise ShapeError(
            f"the groups' ends are {ends.dtype} {tuple(ends.shape)} on {ends.device}; "
            f"a grouped product takes int32 [experts] on {x.device}"
        )


def group_bounds(x: torch.Tensor, ends: torch.Tensor) -> list[tuple[int, int]]:
    """Each expert's rows of x, [first, last). Reads `ends`, so it waits for the device.

    Raises:
        ShapeError: see `check_grouped`; or the ends are not ascending, or pass the last row.
    """
    check_grouped(x, ends)
    last = [int(end) for end in ends.tolist()]
    bounds = list(zip([0, *last], last, strict=False))
    if any(end < begin for begin, end in bounds) or (last and last[-1] > x.shape[0]):
        raise ShapeError(f"the groups of {x.shape[0]} rows cannot end at {last}")
    return bounds


@torch.library.register_fake(f"{NAMESPACE}::quantize", lib=LIBRARY)
def _quantize(w: torch.Tensor, format: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = w.new_empty((packed_size(w.numel(), get_codebook(format).bits),), dtype=torch.uint8)
    return codes, w.new_empty((-(-w.numel() // block_size),), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::quantize_scales", lib=LIBRARY)
def _quantize_scales(scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = scales.new_empty((packed_size(scales.numel(), bits),), dtype=torch.uint8)
    return codes, scales.new_empty((-(-scales.numel() // SCALE_BLOCK),)), scales.new_empty(())


@torch.library.register_fake(f"{NAMESPACE}::dequantize", lib=LIBRARY)
def _dequantize(*args: Any) -> torch.Tensor:
    packed, (shape, dtype) = split_packed(args)
    return packed.codes.new_empty(shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::dequantize_rows", lib=LIBRARY)
def _dequantize_rows(*args: Any) -> torch.Tensor:
    packed, (columns, rows, dtype) = split_packed(args)
    return packed.codes.new_empty((*rows.shape, columns), dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::linear", lib=LIBRARY)
def _linear(*args: Any) -> torch.Tensor:
    _, (out_features, x, _bias) = split_packed(args)
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


@torch.library.register_fake(f"{NAMESPACE}::linear_lora", lib=LIBRARY)
def _linear_lora(*args: Any) -> torch.Tensor:
    _, (out_features, x, *_rest) = split_packed(args)
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


@torch.library.register_fake(f"{NAMESPACE}::linear_grad_input", lib=LIBRARY)
def _linear_grad_input(*args: Any) -> torch.Tensor:
    _, (in_features, grad) = split_packed(args)
    return torch.empty((*grad.shape[:-1], in_features), dtype=grad.dtype, device=grad.device)


@torch.library.register_fake(f"{NAMESPACE}::grouped_linear", lib=LIBRARY)
@torch.library.register_fake(f"{NAMESPACE}::grouped_linear_grad_input", lib=LIBRARY)
def _grouped_linear(*args: Any) -> torch.Tensor:
    _, (features, x, _ends) = split_packed(args)
    return torch.empty((x.shape[0], features), dtype=x.dtype, device=x.device)


@torch.library.register_fake(f"{NAMESPACE}::cross_entropy_", lib=LIBRARY)
def _cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm", lib=LIBRARY)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_grad", lib=LIBRARY)
def _rms_norm_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::swiglu", lib=LIBRARY)
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake(f"{NAMESPACE}::swiglu_grad", lib=LIBRARY)
def _swiglu_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.register_fake(f"{NAMESPACE}::rotary", lib=LIBRARY)
def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    return x.new_empty(x.shape)
