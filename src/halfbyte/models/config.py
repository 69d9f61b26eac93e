"""HalfbyteConfig: how a model is quantized, as transformers' `quantization_config`.

In a model folder's config.json it takes one of two forms. Where bitsandbytes can read what was written, the folder
says `quant_method: bitsandbytes` with that library's own keys, so that somebody who has only bitsandbytes needs
nothing else. Otherwise it says `quant_method: halfbyte`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import FormatError, nearest
from halfbyte.formats import QuantSpec

_COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@register_quantization_config("halfbyte")
class HalfbyteConfig(QuantizationConfigMixin):
    """Quantize a model's weights when it is loaded.

    Args:
        format: "nf4" (default), "fp4", "e2m1", "int4" or "int8".
        block_size: weights that share a scale: 32 to 4096, powers of two.
        scale_bits: 8 (double quantization, the default), 6, 4, or None for float32 scales.
        compute_dtype: dtype of the products ("bfloat16", "float16", "float32" or a torch dtype); None: the input's.
        skip_modules: names of modules to keep unquantized, besides the output layers.
        quantize_embeddings: whether embedding tables are quantized too.
        min_quantized_share: loading fails when less than this share of the parameters outside embeddings and output
            layers would be quantized, because then something was skipped that should not have been.

    Raises:
        FormatError: a value that is not offered, with the nearest that is.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        scale_bits: int | None = 8,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        quantize_embeddings: bool = False,
        min_quantized_share: float = 0.5,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            name = next(iter(unknown))
            raise FormatError(f"HalfbyteConfig has no option {name!r}; {nearest(name, self._options())}")
        self.quant_method = "halfbyte"  # type: ignore[assignment]  # transformers types it as its own enum
        # Set when a model is loaded: whether everything quantized in it has a name in bitsandbytes' layout, and the
        # dtype that stands for "the input's" there, because bitsandbytes would take float32.
        self.bitsandbytes_readable = False
        self.model_dtype: torch.dtype | None = None
        self.spec = QuantSpec(format, block_size, scale_bits)
        self.compute_dtype = _dtype(compute_dtype)
        self.skip_modules = list(skip_modules or [])
        self.quantize_embeddings = quantize_embeddings
        self.min_quantized_share = min_quantized_share

    @staticmethod
    def _options() -> list[str]:
        return [
            "format",
            "block_size",
            "scale_bits",
            "compute_dtype",
            "skip_modules",
            "quantize_embeddings",
            "min_quantized_share",
        ]

    @classmethod
    def from_bitsandbytes(cls, declared: Mapping[str, Any], spec: QuantSpec) -> HalfbyteConfig:
        """The config of a folder that bitsandbytes made.

        Args:
            declared: config.json's `quantization_config`.
            spec: the encoding of its tensors; config.json does not give the block size.
        """
        return cls(
            spec.format,
            spec.block_size,
            spec.scale_bits,
            compute_dtype=declared.get("bnb_4bit_compute_dtype"),
            skip_modules=declared.get("llm_int8_skip_modules"),
        )

    @property
    def layout(self) -> str:
        """The layout in files (`halfbyte.tensor.flatten`): bitsandbytes' where that library can read the result."""
        return "bitsandbytes" if self.bitsandbytes_readable else "halfbyte"

    def to_dict(self) -> dict[str, Any]:
        """What is written into config.json."""
        return self._bitsandbytes_dict() if self.bitsandbytes_readable else self.own_dict()

    def own_dict(self) -> dict[str, Any]:
        """Every option by its own name, with `quant_method: halfbyte`."""
        return {
            "quant_method": self.quant_method,
            "format": self.spec.format,
            "block_size": self.spec.block_size,
            "scale_bits": self.spec.scale_bits,
            "compute_dtype": _name(self.compute_dtype),
            "skip_modules": copy.copy(self.skip_modules),
            "quantize_embeddings": self.quantize_embeddings,
            "min_quantized_share": self.min_quantized_share,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every value is written, so that a default which changes does not change old folders."""
        return self.to_dict()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options()[3:])
        return f"HalfbyteConfig({self.spec}, {options})"

    def _bitsandbytes_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": _name(self.compute_dtype or self.model_dtype) or "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.spec.format,
            "bnb_4bit_use_double_quant": self.spec.scale_bits is not None,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": copy.copy(self.skip_modules) or None,
            "llm_int8_threshold": 6.0,
        }


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or value in _COMPUTE_DTYPES.values():
        return value  # type: ignore[return-value]
    name = str(value).removeprefix("torch.")
    if name not in _COMPUTE_DTYPES:
        raise FormatError(f"compute dtype {name!r} is not offered; {nearest(name, _COMPUTE_DTYPES)}")
    return _COMPUTE_DTYPES[name]


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
