"""State as plain JSON and named tensors: how optimizers, schedulers and generators are written down without pickle.

A pickle runs code when it is read, so none is ever written. What a `state_dict()` holds is dictionaries (with integer
keys too), lists, tuples, plain values and tensors; JSON takes all but the tensors, which go beside it into a
safetensors file, byte for byte. A JSON object is always one of three marks, so nothing stored is mistaken for one:

    {"dict": [[key, value], ...]}     {"tuple": [...]}     {"tensor": name in the safetensors file}
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

PLAIN = (type(None), bool, int, float, str)
Tensors = dict[str, torch.Tensor]


def encode(value: Any, name: str = "state") -> tuple[Any, Tensors]:
    """Split a nested value into what `json.dumps` takes, and tensors by their path.

    Args:
        value: any nesting of dict, list, tuple, None, bool, int, float, str and torch.Tensor.
        name: the path of `value`, for names and messages.

    Returns:
        The JSON value, and the tensors: on the CPU, contiguous, each with storage of its own.

    Raises:
        TypeError: something else is in it; the message gives its path.
    """
    tensors: Tensors = {}
    plain = _encode(value, tensors, name)
    places = set()
    for path, tensor in tensors.items():  # safetensors refuses tensors that share memory
        storage = tensor.untyped_storage()
        if storage.data_ptr() in places:
            tensors[path] = tensor.clone()
        places.add(storage.data_ptr())
    return plain, tensors


def _encode(value: Any, tensors: Tensors, name: str) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.floating):  # what schedulers and averages of losses are computed with
        return float(value)
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, {}, name), _encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def decode(value: Any, tensors: Tensors) -> Any:
    """The inverse of `encode`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a mark that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (mark,) = value
    if mark == "tensor":
        return tensors[value[mark]]
    if mark == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in value[mark]}
    if mark == "tuple":
        return tuple(decode(item, tensors) for item in value[mark])
    raise ValueError(f"unknown mark {mark!r}")


def generators() -> dict[str, Any]:
    """The state of every random number generator that training draws from: Python's, numpy's, torch's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict[str, Any]) -> None:
    """Set them as they were; GPUs as far as there are as many."""
    random.setstate(states["python"])
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"] | {"state": states["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
