"""Which device answers, and how many sequences fit beside the weights on a card."""

from __future__ import annotations

import re

import torch

from halfbyte.errors import RequestError
from halfbyte.infer.scheduler import CHUNK_ALONE
from halfbyte.kernels.decoder import Cache, Network

_MIB = 2**20
_RESERVE = 256 * _MIB  # of a card, for the graphs, the vendor's workspace, and what the allocator cannot use


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: the first card, or the CPU where torch sees none.

    Raises:
        RequestError: the name is not "cpu", "cuda" or "cuda:" and a number, or there is no such card.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise RequestError(f"device {name!r} is not offered; choose cpu, cuda or cuda:NUMBER.")
    if name == "cpu":
        return torch.device("cpu")
    number = int(found[1] or 0)
    if number >= count:
        have = f"cards 0 to {count - 1}" if count > 1 else "one card, cuda:0" if count else "no card; choose cpu"
        raise RequestError(f"device {name!r} is not there: torch sees {have}.")
    return torch.device("cuda", number)


def workspace(network: Network, dtype: torch.dtype, rows: int) -> int:
    """Bytes that a chunk of a prompt takes while it goes through a layer, its largest weight decoded.

    Args:
        network: whose layers have one shape.
        dtype: of activations.
        rows: of the chunk.
    """
    matrices = network.layers[0].matrices
    hidden, ffn, inner = matrices["query"].k, matrices["gate"].n, network.heads * network.head_dim
    # The sum and its norm, with a second one in float32; the gate, its factor and their product; heads before and
    # after they are rotated, and what they are mixed to.
    activations = rows * (4 * hidden + 3 * ffn + 4 * inner) * dtype.itemsize
    return activations + max(matrix.n * matrix.k for matrix in matrices.values()) * dtype.itemsize


def slots_that_fit(network: Network, cache_dtype: torch.dtype, wanted: int, dtype: torch.dtype) -> int:
    """How many of the `wanted` slots of an empty cache a card has memory for; on a CPU, which takes it bit by bit, all.

    Args:
        network: on the device of the cache.
        cache_dtype: of keys and values.
        wanted: 1 or more.
        dtype: of activations.

    Raises:
        RequestError: there is no room for one.
    """
    device = network.device
    if device.type == "cpu":
        return wanted
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    taken = _RESERVE + workspace(network, dtype, CHUNK_ALONE[device.type])
    free = max(torch.cuda.mem_get_info(device)[0] + unused - taken, 0)
    each = Cache.bytes_of_slot(network, cache_dtype)
    if each > free:
        positions = len(network.cosine)
        raise RequestError(
            f"keys and values of {positions} tokens take {each / _MIB:.0f} MiB and {device} has {free / _MIB:.0f} MiB "
            f"left; give max_length {positions * free // each} or less, or cache_dtype int8."
        )
    return min(wanted, free // each)
