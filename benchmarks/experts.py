"""A layer of experts on the CPU: tokens a second through grouped products, beside the loop and the dense layer.

    python benchmarks/experts.py [--tokens 1 8 128 2048] [--experts 64] [--top-k 8] [--hidden 2048] [--width 1024]

The default is OLMoE's layer. Weights are NF4, double-quantized; the dense layers hold the decoded weights in bfloat16.
bitsandbytes packs `nn.Linear` only where transformers quantizes with it; its own `replace_parameter_4bit` packs the
experts too, and decodes all of them at each call. First all contenders are compared with the loop over experts in
float32. `--backward` times a forward and the gradient of the tokens.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from _assets import finish, table
from _peers import best_times

OURS, LOOP, BNB = "halfbyte, grouped", "halfbyte, transformers' loop", "bitsandbytes, experts as parameters"
DENSE, GROUPED = "dense, transformers' loop", "dense, torch's grouped_mm"


def contenders(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The same layer by name, and its float32 twin."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    import halfbyte as hb
    from halfbyte.models.experts import IMPLEMENTATION, register

    register()
    config = OlmoeConfig(
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    with torch.device("meta"):
        empty = OlmoeExperts(config)
    packed = {
        name: hb.quantize(torch.randn(parameter.shape, dtype=torch.bfloat16) / parameter.shape[-1] ** 0.5)
        for name, parameter in empty.named_parameters()
    }

    def layer(implementation: str, weights: dict[str, torch.Tensor]) -> Any:
        made = copy.deepcopy(empty)
        made.config = copy.deepcopy(config)
        made.config._experts_implementation = implementation
        for name, weight in weights.items():
            setattr(made, name, torch.nn.Parameter(weight, requires_grad=False))
        return made

    dense = {name: weight.dequantize() for name, weight in packed.items()}
    made = {
        OURS: layer(IMPLEMENTATION, packed),
        LOOP: layer("eager", packed),
        DENSE: layer("eager", dense),
        GROUPED: layer("grouped_mm", dense),
    }
    if find_spec("bitsandbytes"):
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        made[BNB] = layer("eager", dense)
        for name in packed:
            replace_parameter_4bit(made[BNB], name, compress_statistics=True)
    return made, layer("eager", {name: weight.float() for name, weight in dense.items()})


def verify(layers: dict[str, Any], exact: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """Every contender within bfloat16's rounding of the float32 loop; bitsandbytes quantizes again, so further off."""
    x, index, shares = inputs
    expected = exact(x.float(), index, shares)
    for name, layer in layers.items():
        error = float((layer(*inputs).float() - expected).norm() / expected.norm())
        assert error < (0.2 if name == BNB else 2**-6), f"{name} is off by {error:.2e}"


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 2048])
    for name, default in (("experts", 64), ("top-k", 8), ("hidden", 2048), ("width", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each contender in each of five rounds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    layers, exact = contenders(options)
    rows: list[list[str]] = []
    results = {}
    for tokens in options.tokens:
        index = torch.rand(tokens, options.experts).argsort(1)[:, : options.top_k].contiguous()
        shares = torch.rand(tokens, options.top_k).softmax(1).bfloat16()  # as OLMoE's router gives them
        x = torch.randn(tokens, options.hidden).bfloat16()
        with torch.no_grad():
            verify(layers, exact, (x, index, shares))
        times = best_times(
            {name: call(layer, x, index, shares, options.backward) for name, layer in layers.items()}, options.seconds
        )
        results[tokens] = times
        rows += [
            [str(tokens), name, f"{1e3 * took:.2f}", f"{tokens / took:,.0f}", f"{took / times[OURS]:.2f}"]
            for name, took in times.items()
        ]
    print(table(["tokens", "layer of experts", "ms", "tokens/s", "x halfbyte's time"], rows))
    finish("experts", {**vars(options), "seconds_by_tokens": results})


def call(layer: Any, x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, backward: bool) -> Callable[[], Any]:
    """What is timed."""
    if not backward:
        return torch.no_grad()(lambda: layer(x, index, shares))
    rows = x.clone().requires_grad_()
    upstream = torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(rows, index, shares), rows, upstream)


if __name__ == "__main__":
    main()
