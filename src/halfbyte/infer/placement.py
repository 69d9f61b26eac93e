"""Which device answers, and how many sequences fit beside the weights on a card."""

from __future__ import annotations

import re

import torch

from halfbyte.errors import RequestError
from halfbyte.kernels.decoder import Cache, Network

_MIB = 2**20
_RESERVE = 512 * _MIB  # of a card, for what a step computes with: a chunk of a prompt, a decoded weight, the graphs


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


def slots_that_fit(network: Network, dtype: torch.dtype, wanted: int) -> int:
    """How many of the `wanted` slots of an empty cache a card has memory for; on a CPU, which takes it bit by bit, all.

    Args:
        network: on the device of the cache.
        dtype: of keys and values.
        wanted: 1 or more.

    Raises:
        RequestError: there is no room for one.
    """
    device = network.device
    if device.type == "cpu":
        return wanted
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = max(torch.cuda.mem_get_info(device)[0] + unused - _RESERVE, 0)
    each = Cache.bytes_of_slot(network, dtype)
    if each > free:
        positions = len(network.cosine)
        raise RequestError(
            f"keys and values of {positions} tokens take {each / _MIB:.0f} MiB and {device} has {free / _MIB:.0f} MiB "
            f"left; give max_length {positions * free // each} or less, or cache_dtype int8."
        )
    return min(wanted, free // each)
