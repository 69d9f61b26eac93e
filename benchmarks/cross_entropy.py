"""The loss of a language model's head, forward and backward, three ways: plain, trl's fused head, halfbyte's chunks.

    python benchmarks/cross_entropy.py [--tokens 512] [--vocabulary 32000] [--width 2048]

Hidden states come from nowhere: the backbone is left out, the head is frozen, as it is where adapters are trained. Each
way runs in a process of its own, so that its peak resident size over the idle process is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from _assets import finish, table
from train_step import resident

WAYS = {"plain": "transformers", "trl": "trl, fused_lm_head", "halfbyte": "halfbyte, chunks"}


def head_only(way: str, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A causal language model without layers, and what its call needs to go that way."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import BaseModelOutputWithPast

    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=8, num_hidden_layers=1, vocab_size=options.vocabulary
    )

    class Nothing(torch.nn.Module):
        def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().train().requires_grad_(False)
    model.model = Nothing()
    model.get_output_embeddings = lambda: model.lm_head
    if way == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as its SFTTrainer does
        return model, {"fused_lm_head": True}
    if way == "halfbyte":
        from halfbyte.models.fused import fuse

        assert not fuse(model)["loss"]
    return model, {}


def measure(way: str, options: argparse.Namespace) -> None:
    """One way's process: prints JSON."""
    import torch

    model, arguments = head_only(way, options)
    hidden = torch.randn(1, options.tokens, options.width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(options.vocabulary, (1, options.tokens))
    idle, seconds = resident("VmRSS"), []
    for _ in range(options.rounds + 2):  # two to warm up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs_embeds=hidden, labels=labels, **arguments).loss
        loss.backward()
        hidden.grad = None
        seconds.append(time.perf_counter() - start)
    result = {"seconds": statistics.median(seconds[2:]), "peak": resident("VmHWM") - idle, "loss": loss.item()}
    print(json.dumps(result))


def main() -> None:
    """Run the ways one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return measure(options.way, options)
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    losses = [one["loss"] for one in results.values()]
    assert max(losses) - min(losses) < 1e-3, f"the ways disagree about the loss: {losses}"
    rows = [
        [WAYS[way], f"{1e3 * one['seconds']:.0f} ms", f"{one['peak'] / 1e6:.0f} MB", f"{one['loss']:.5f}"]
        for way, one in results.items()
    ]
    print(table(["loss, forward and backward", "time", "peak over idle", "loss"], rows))
    finish("cross_entropy", {"tokens": options.tokens, "vocabulary": options.vocabulary, "results": results})


if __name__ == "__main__":
    main()
