"""QuantizedTensor: a frozen weight that looks like a tensor and is stored in about half a byte an element.

It is a traceable wrapper subclass: to Python, transformers and peft it has a shape, a dtype and a device, and its bytes
live in inner tensors (`codes`, `scales` and, with double quantization, `scale_absmax` and `scale_offset`). Put into a
plain `nn.Linear` it multiplies through `halfbyte::linear`; sharding, state dicts, 3-D experts and embeddings work
because they only slice, detach, copy and move it, and it knows how to do those on packed bytes.

Three rules, each of which has broken a well-known project when it did not hold:

* **Packed bytes are never cast.** `.to(bfloat16)`, `.half()`, `.float()` and mixed-precision policies change the
  *logical* dtype, the one that decoded values have; the bytes stay as they are. Use `dequantize()` to get numbers.
* **A slice of rows is a view that knows its parent.** The offset of double quantization is a number of the whole
  original tensor, and a row may begin inside a block; a slice keeps both facts. Columns cannot be sliced without
  decoding.
* **Nothing is changed in place, silently or otherwise.** An operation that would write into packed storage raises.

Any other operation sees the decoded values: that is what lets peft's variants (DoRA, PiSSA, ...), which do arithmetic
on the weight, work without knowing about packing. It costs one decoded copy each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from halfbyte.errors import FormatError, ShapeError
from halfbyte.formats import QuantSpec
from halfbyte.kernels import PackedWeight

aten = torch.ops.aten
_INNER = ("codes", "scales", "scale_absmax", "scale_offset")
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedTensor(torch.Tensor):
    """A frozen tensor stored blockwise in 4 (or 8) bits. Make one with `halfbyte.quantize`.

    Attributes:
        codes: uint8, packed, one dimension.
        scales: float32 [blocks], or uint8 when the scales are quantized too.
        scale_absmax: float32 [second-level blocks] or None.
        scale_offset: float32 [] or None; one number of the original tensor, kept by its slices.
        spec: format, block size and scale bits.
        start: elements of the first block that come before this tensor (0 but for slices).
        scale_start: scales of the first second-level block that come before this tensor (0 but for slices).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale_absmax: torch.Tensor | None
    scale_offset: torch.Tensor | None
    spec: QuantSpec
    start: int
    scale_start: int

    @staticmethod
    def __new__(
        cls,
        inner: dict[str, torch.Tensor | None],
        spec: QuantSpec,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        start: int = 0,
        scale_start: int = 0,
    ) -> QuantizedTensor:
        """Wrap inner tensors; use `quantize` or a slice to get consistent ones."""
        codes = inner["codes"]
        assert codes is not None
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        for name in _INNER:
            setattr(self, name, inner.get(name))
        self.spec, self.start, self.scale_start = spec, start, scale_start
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor takes no arguments here; everything was set in __new__.
        super().__init__()

    # What traceable subclasses (torch.compile, FSDP2, DTensor) are taken apart and put together with.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [name for name in _INNER if getattr(self, name) is not None]
        return names, (self.spec, self.dtype, self.start, self.scale_start)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], meta: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        spec, dtype, start, scale_start = meta
        return cls({name: inner.get(name) for name in _INNER}, spec, outer_size, dtype, start, scale_start)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        scales = "" if self.spec.scale_bits is None else f", scale_bits={self.spec.scale_bits}"
        return (
            f"QuantizedTensor({tuple(self.shape)}, {self.spec.format}, block_size={self.spec.block_size}{scales}, "
            f"dtype={self.dtype}, device={self.device}, {self.bits_per_weight:.3f} bits a weight)"
        )

    def packed(self) -> PackedWeight:
        """The nine fields that `torch.ops.halfbyte.*` take."""
        spec = self.spec
        return PackedWeight(
            self.codes,
            self.scales,
            self.scale_absmax,
            self.scale_offset,
            spec.format,
            spec.block_size,
            spec.scale_bits or 0,
            self.start,
            self.scale_start,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded values, a plain tensor of this shape; `dtype` defaults to the logical dtype."""
        result: torch.Tensor = torch.ops.halfbyte.dequantize(*self.packed(), self.shape, dtype or self.dtype)
        return result

    @property
    def inner_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the bytes, by field name."""
        names, _ = self.__tensor_flatten__()
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all inner tensors."""
        return sum(inner.numel() * inner.element_size() for inner in self.inner_tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits an element takes, counted from the real bytes (0.0 for an empty tensor)."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def same_bytes(self, other: QuantizedTensor) -> bool:
        """Whether both are the same tensor bit for bit: description, shape and every inner byte."""
        names, meta = self.__tensor_flatten__()
        other_names, other_meta = other.__tensor_flatten__()
        if (names, meta, self.shape) != (other_names, other_meta, other.shape):
            return False
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def with_inner(self, transform: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> Any:
        """A tensor of the same description whose inner tensors went through `transform`."""
        inner = {name: transform(tensor) for name, tensor in self.inner_tensors.items()}
        return type(self)(inner, self.spec, self.shape, dtype or self.dtype, self.start, self.scale_start)

    def share_memory_(self) -> QuantizedTensor:
        """Move the inner tensors to shared memory; the wrapper itself has no storage that could be."""
        for inner in self.inner_tensors.values():
            inner.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the inner tensors are in shared memory."""
        return all(inner.is_shared() for inner in self.inner_tensors.values())

    def rows(self, begin: int, end: int) -> QuantizedTensor:
        """Rows `begin` to `end` of the first dimension, as a view of the same bytes."""
        return self._span(begin * math.prod(self.shape[1:]), (max(end - begin, 0), *self.shape[1:]))

    def _span(self, first: int, shape: tuple[int, ...]) -> QuantizedTensor:
        """Elements from `first` of the flattened tensor on, in `shape`."""
        part = self.packed().span(first, math.prod(shape))
        inner = dict(zip(_INNER, part[: len(_INNER)], strict=True))
        return type(self)(inner, self.spec, shape, self.dtype, part.start, part.scale_start)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.nn.functional.embedding:
            return _embedding(*args, **kwargs)
        if func == _SET_DATA and not _same_storage(*args):
            # torch would exchange what the wrapper shows and leave the bytes: a write that is lost without a word.
            raise ShapeError(f"`.data` of a quantized tensor of {tuple(args[0].shape)} cannot be set, it is frozen")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs)
        _refuse_writes(func, args, kwargs)
        return func(*_decoded(args), **_decoded(kwargs))


def quantize(w: torch.Tensor, format: str = "nf4", block_size: int = 64, scale_bits: int | None = 8) -> QuantizedTensor:
    """Quantize a tensor blockwise.

    Args:
        w: float32, bfloat16 or float16, any shape and strides, on any device. It becomes the logical dtype and shape.
        format: "nf4" (default), "fp4", "e2m1", "int4", "int8".
        block_size: 32 to 4096, in powers of two. 64 is QLoRA's.
        scale_bits: 8 (default: double quantization, QLoRA section 3), 6, 4, or None for float32 scales.

    Returns:
        A frozen QuantizedTensor; 4.127 bits a weight with the defaults.

    Raises:
        FormatError: an option that is not offered, a dtype that is not floating, or a weight that holds NaN or Inf.

    Source: QLoRA, arXiv 2305.14314. Codes and scales of nf4 and fp4 equal bitsandbytes' bit for bit; the second level
    those of bitsandbytes on one thread, whose mean of more than 32,768 scales depends on the number of threads.
    """
    spec = QuantSpec(format, block_size, scale_bits)
    if w.dtype not in _WEIGHT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WEIGHT_DTYPES)
        raise FormatError(f"cannot quantize a tensor of {w.dtype}; choose one of: {names}")
    codes, scales = torch.ops.halfbyte.quantize(w, format, block_size)
    return assemble(codes, scales, spec, w.shape, w.dtype)


def assemble(
    codes: torch.Tensor, scales: torch.Tensor, spec: QuantSpec, shape: torch.Size | tuple[int, ...], dtype: torch.dtype
) -> QuantizedTensor:
    """A quantized tensor from its codes and float32 scales, which are quantized too where `spec` says so.

    Args:
        codes: uint8, packed; of the whole tensor, since the second level takes the mean of all scales.
        scales: float32 [blocks], as `torch.ops.halfbyte.quantize` gives them. On the meta device nothing is checked.
        spec: how it is, or is to be, stored.
        shape: that the tensor stands for.
        dtype: its logical dtype.

    Raises:
        FormatError: a scale is NaN or Inf, so the weights were.
    """
    # NaN and Inf come out of a maximum, which takes one pass and no temporaries.
    if scales.numel() and not scales.is_meta and not scales.max().isfinite():
        block = int((~scales.isfinite()).nonzero()[0])
        first = block * spec.block_size
        raise FormatError(f"the weight holds NaN or Inf (first in elements {first} and following)")
    inner: dict[str, torch.Tensor | None] = {"codes": codes, "scales": scales}
    if spec.scale_bits is not None:
        second_level = torch.ops.halfbyte.quantize_scales(scales, spec.scale_bits)
        inner |= dict(zip(("scales", "scale_absmax", "scale_offset"), second_level, strict=True))
    return QuantizedTensor(inner, spec, shape, dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` when one of the arguments is quantized."""
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor):
        return torch.nn.functional.linear(*_decoded((x, weight, bias)))
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"cannot multiply {tuple(x.shape)} by a weight of {tuple(weight.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    result: torch.Tensor = torch.ops.halfbyte.linear(*weight.packed(), weight.shape[0], x, bias)
    return result


def _embedding(
    index: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`nn.functional.embedding`: only the rows asked for are decoded."""
    assert isinstance(weight, QuantizedTensor)
    if max_norm is not None:
        raise ShapeError("max_norm rewrites the table, and a quantized embedding is frozen; load it unquantized")
    result: torch.Tensor = torch.ops.halfbyte.dequantize_rows(*weight.packed(), weight.shape[1], index, weight.dtype)
    return result


def _same_storage(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `value` is `tensor` under another logical dtype: `p.data = p.data.to(torch.float32)`, as peft does."""
    if not isinstance(tensor, QuantizedTensor) or not isinstance(value, QuantizedTensor) or tensor.shape != value.shape:
        return False
    (names, meta), (other_names, other_meta) = tensor.__tensor_flatten__(), value.__tensor_flatten__()
    where = [(getattr(tensor, name).data_ptr(), getattr(value, name).data_ptr()) for name in names]
    return (
        names == other_names
        and (meta[0], meta[2:]) == (other_meta[0], other_meta[2:])
        and all(a == b for a, b in where)
    )


def _decoded(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf, tree)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    schema = func._schema
    for position, argument in enumerate(schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, QuantizedTensor):
            raise ShapeError(
                f"{schema.name} would write into a quantized tensor of {tuple(given.shape)}, which is frozen; "
                "use dequantize() and quantize the result, or `halfbyte merge` for adapters"
            )


def _per_inner(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """detach, alias, clone, contiguous: the same on every inner tensor."""
    result = args[0].with_inner(lambda inner: func(inner, *args[1:], **_without_layout(kwargs)))
    return return_and_correct_aliasing(func, args, kwargs, result)


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    moved = args[0].with_inner(lambda inner: inner.to(device, non_blocking=non_blocking), kwargs.get("dtype"))
    return return_and_correct_aliasing(func, args, kwargs, moved)


def _slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    tensor, dim, begin, end, step = args + defaults[len(args) :]
    length = tensor.shape[dim]
    begin, end, step = slice(begin, end, step).indices(length)
    if (begin, end, step) == (0, length, 1):
        return tensor.with_inner(aten.alias.default)
    if dim % tensor.dim() != 0 or step != 1:
        return func(tensor.dequantize(), *args[1:], **kwargs)
    return tensor.rows(begin, end)


def _select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, dim, index = args
    if dim % tensor.dim() != 0 or tensor.dim() < 2:
        return func(tensor.dequantize(), dim, index)
    index %= tensor.shape[0]
    return tensor._span(index * math.prod(tensor.shape[1:]), tuple(tensor.shape[1:]))


def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, size, dim = args if len(args) == 3 else (*args, 0)
    if dim % tensor.dim() != 0:
        return func(tensor.dequantize(), *args[1:], **kwargs)
    # torch's own reading of the sizes, and its own errors.
    sizes = [part.numel() for part in torch.empty(tensor.shape[0], device="meta").split(size)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tensor.rows(end - length, end) for length, end in zip(sizes, ends, strict=True)]


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Row-major order is what is stored, so any view that keeps it is free."""
    tensor, shape = args
    shape = torch.empty(tensor.shape, device="meta").view(shape).shape
    return tensor._span(0, tuple(shape))


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """load_state_dict's way in: only between tensors of one description."""
    target, source = args[:2]
    if not isinstance(target, QuantizedTensor):
        return func(target, source.dequantize(), *args[2:])
    described = isinstance(source, QuantizedTensor) and (
        (target.spec, target.shape, target.start, target.scale_start)
        == (source.spec, source.shape, source.start, source.scale_start)
    )
    if not described:
        _refuse_writes(func, args, kwargs)
    for name, inner in target.inner_tensors.items():
        inner.copy_(getattr(source, name))
    return target


def _equal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    a, b = args
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.same_bytes(b):
        return True
    return bool(func(*_decoded(args)))


def _like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """empty_like, zeros_like: dense tensors of the logical shape, without decoding anything for them."""
    plain = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
    return func(plain, *args[1:], **{"memory_format": torch.contiguous_format, **kwargs})


def _without_layout(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "memory_format"}


_HANDLERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.detach.default: _per_inner,
    aten.alias.default: _per_inner,
    aten.clone.default: _per_inner,
    aten.contiguous.default: _per_inner,
    aten._to_copy.default: _to_copy,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.copy_.default: _copy,
    aten.equal.default: _equal,
    aten.empty_like.default: _like,
    aten.zeros_like.default: _like,
}
# Nothing in a checkpoint is a pickle, but torch.load(weights_only=True) of a trainer's own state may meet this class.
torch.serialization.add_safe_globals([QuantizedTensor, QuantSpec])
