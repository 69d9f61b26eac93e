"""The decoder that `hb.Engine` runs, without the engine around it: tokens a second of one and of many sequences."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

PROMPT, STEPS = 16, 24  # tokens; the first step compiles, the second captures its graph
SEQUENCES = (1, 8, 32)
LENGTH = 1024  # positions of the cache


def decoder_rates(model: Any) -> dict[str, float | str]:
    """Tokens a second of a Llama, by how many sequences are decoded together; the last logits are checked."""
    from halfbyte.infer.few_rows import few_rows_decoder
    from halfbyte.infer.network import make_network
    from halfbyte.kernels.decoder import Cache
    from halfbyte.kernels.reference.decoder import TorchDecoder

    network = make_network(model, LENGTH, torch.bfloat16)
    cache = Cache.empty(network, max(SEQUENCES), torch.bfloat16)
    prompts = TorchDecoder(network, cache, torch.bfloat16)
    decoder, what = few_rows_decoder(network, cache, torch.bfloat16, None)
    assert decoder is not None, what
    ids = [(7 * at) % network.head.n for at in range(PROMPT)]
    for slot in range(max(SEQUENCES)):
        prompts.step(ids, [slot] * PROMPT, range(PROMPT), wanted=())
    rates: dict[str, float | str] = {"halfbyte's decoder": what}
    for sequences in SEQUENCES:
        slots, token, took = list(range(sequences)), [1] * sequences, []
        for at in range(PROMPT, PROMPT + STEPS):
            began = time.perf_counter()
            logits = decoder.step(token, slots, [at] * sequences)
            took.append(time.perf_counter() - began)
        exact = prompts.step(token, slots, [at] * sequences)
        error = float((logits - exact).norm() / exact.norm())
        assert error < 0.1, f"the decoder's logits of {sequences} sequences are off by {error:.2e}"
        rates[f"halfbyte's decoder, {sequences} sequence{'s' * (sequences > 1)}"] = sequences / median(
            took[STEPS // 2 :]
        )
    return rates
