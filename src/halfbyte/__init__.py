"""halfbyte: QLoRA, whole and fast. Fine-tune and run language models whose frozen weights are stored in 4 bits.

Names are loaded when they are first used: `import halfbyte` needs nothing, `halfbyte.quantize` needs torch, and only
`halfbyte.load_model` and `halfbyte.HalfbyteConfig` need transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "QuantizedTensor": "halfbyte.tensor",
    "quantize": "halfbyte.tensor",
    "Linear4bit": "halfbyte.nn",
    "QuantizationReport": "halfbyte.nn",
    "quantize_model": "halfbyte.nn",
    "distortion": "halfbyte.formats",
    "Engine": "halfbyte.infer",
    "HalfbyteConfig": "halfbyte.models",
    "init_loftq": "halfbyte.models",
    "load_model": "halfbyte.models",
    "load_tokenizer": "halfbyte.models",
    "save_model": "halfbyte.models",
    "HalfbyteError": "halfbyte.errors",
}
_ROOMS = ("optim",)  # submodules that are used by their own name: halfbyte.optim.AdamW
__all__ = ["__version__", *_HOMES, *_ROOMS]

if TYPE_CHECKING:  # so that editors and type checkers see what __getattr__ finds
    from halfbyte import optim as optim
    from halfbyte.errors import HalfbyteError as HalfbyteError
    from halfbyte.formats import distortion as distortion
    from halfbyte.infer import Engine as Engine
    from halfbyte.models import HalfbyteConfig as HalfbyteConfig
    from halfbyte.models import init_loftq as init_loftq
    from halfbyte.models import load_model as load_model
    from halfbyte.models import load_tokenizer as load_tokenizer
    from halfbyte.models import save_model as save_model
    from halfbyte.nn import Linear4bit as Linear4bit
    from halfbyte.nn import QuantizationReport as QuantizationReport
    from halfbyte.nn import quantize_model as quantize_model
    from halfbyte.tensor import QuantizedTensor as QuantizedTensor
    from halfbyte.tensor import quantize as quantize


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # pyproject.toml is the one place that holds the number.
        return importlib.import_module("importlib.metadata").version("halfbyte")
    if name in _ROOMS:
        return importlib.import_module(f"halfbyte.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
