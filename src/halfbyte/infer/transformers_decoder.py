"""Any causal language model of transformers behind the decoder's interface: what runs models that are not covered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from halfbyte.errors import RequestError
from halfbyte.kernels.decoder import Mix


class TransformersDecoder:
    """Runs a model's own forward, one sequence at a time, with a cache of transformers for each slot.

    Args:
        model: a causal language model, on any device; with peft's adapters, named as `names` says.
        slots: sequences at a time.
    """

    def __init__(self, model: Any, slots: int) -> None:
        self.model = model
        self.names: list[str] = []
        self.seconds = {"forward": 0.0}
        self._caches: list[Any] = [None] * slots
        self._lengths = [0] * slots

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """See `Decoder.step`. Positions of a slot follow each other; 0 begins a new sequence.

        Raises:
            RequestError: a mix of several adapters, or one that is weighted.
        """
        began = time.perf_counter()
        chosen = range(len(tokens)) if wanted is None else wanted
        found: dict[int, torch.Tensor] = {}
        for slot, group in groupby(range(len(tokens)), key=lambda row: slots[row]):
            rows = list(group)
            self._use(mixes[rows[0]] if mixes is not None else ())
            here = sorted({row for row in chosen if rows[0] <= row <= rows[-1]})
            keep = torch.tensor([row - rows[0] for row in here], dtype=torch.int64, device=self.model.device)
            logits = self._run([tokens[row] for row in rows], slot, positions[rows[0]], keep)
            found |= dict(zip(here, logits, strict=True))
        size = self.model.config.get_text_config().vocab_size
        result = torch.stack([found[row] for row in chosen]) if found else torch.empty((0, size))
        self.seconds["forward"] += time.perf_counter() - began
        return result

    def _run(self, tokens: list[int], slot: int, position: int, keep: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        if position == 0:
            self._caches[slot], self._lengths[slot] = DynamicCache(config=self.model.config), 0
        assert position == self._lengths[slot], "a slot's positions follow each other"
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.model.device),
                past_key_values=self._caches[slot],
                use_cache=True,
                logits_to_keep=keep,
            )
        self._lengths[slot] += len(tokens)
        result: torch.Tensor = output.logits[0].float().cpu()
        return result

    def _use(self, mix: Mix) -> None:
        if not self.names:
            return
        if len(mix) > 1 or any(weight != 1.0 for _, weight in mix):
            raise RequestError("this model takes one adapter at a time, unweighted; name one.")
        if mix:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.names[mix[0][0]])
        else:
            self.model.base_model.disable_adapter_layers()
