"""Everything halfbyte does on a card, in one run of less than eight minutes: verified, then timed.

    python benchmarks/gpu_suite.py [--minutes 8] [--crossover]
    python benchmarks/gpu_suite.py --memory      needs no card

Kernels beside torch's dense product, bitsandbytes where it can be imported, and the card's own measured limits (a copy
in its memory, a dense GEMM); decoding; a training step of Llamas of 1 to 70 B parameters whose random 4-bit weights are
made on the card. What there is no time or no memory for is named in the result. `--crossover` prints instead where the
ways of a product take over from each other: the lines of kernels/tuning.py. `--memory` prints what training takes, by
the formulas that `halfbyte train` warns with.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from _assets import table
from _gpu_models import SHAPES, llama_config, random_llama, random_weight, with_adapter

SIZE = 4096
LENGTH = 2048
LIBRARIES = (
    "halfbyte",
    "torch",
    "triton",
    "transformers",
    "peft",
    "liger-kernel",
    "flash-attn",
    "bitsandbytes",
    "unsloth",
)
HEADLINE = {"7 B": 6, "33 B": 24, "65 B": 48}  # GB that QLoRA's paper promises
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096)
# What shared/TARGETS.md asks for: share of the card's limit, times dense.
TARGETS = {"dequantize": (0.85, None), "1 row": (0.85, 3.3), "4096 rows": (None, 0.9)}
Line = dict[str, Any]


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="what the run may take")
    parser.add_argument("--crossover", action="store_true", help="times of each way of a product, by rows")
    parser.add_argument("--memory", action="store_true", help="the table of what training takes, computed")
    options = parser.parse_args()
    if options.memory:
        for length in (512, 16_384):
            print(f"one row of {length:,} tokens\n\n{memory_table(length)}\n")
        return
    if not torch.cuda.is_available():
        print("benchmark skipped: torch sees no CUDA device, and this one is about nothing else")
        return
    torch.manual_seed(0)
    end = time.monotonic() + 60 * options.minutes
    for shuffle in (False, True):
        with changed_tuning(shuffle=shuffle):
            verify()
    if options.crossover:
        print(
            table(
                (
                    "rows",
                    "row ms",
                    "shuffled",
                    "tiles",
                    "shuffled",
                    "decoded",
                    "dense",
                    "g W tiles",
                    "shuffled",
                    "decoded",
                ),
                crossover(),
            )
        )
        header = (
            "rows of an expert",
            "tiles ms",
            "decoded",
            "some at a time",
            "g W tiles",
            "decoded",
            "some at a time",
        )
        print("\n" + table(header, expert_crossover()))
        return
    limits = {"bytes": copy_rate(), "flops": gemm_rate()}
    print(f"copy {limits['bytes'] / 1e12:.2f} TB/s, bf16 GEMM {limits['flops'] / 1e12:.0f} TFLOP/s\n")
    lines = [*kernels(limits), *experts(limits)]
    header = ("work", "halfbyte ms", "bitsandbytes", "dense ms", "x bnb", "x dense", "target", "share", "target")
    print(table(header, [row(line) for line in lines]), "\n")
    decoded = decode(limits)
    print(table(("decoding, 7 B", "tokens/s"), [[name, f"{value:.1f}"] for name, value in decoded.items()]), "\n")
    steps = training(end)
    names = ("model", "contender", "activations", "tokens/s", "peak GB", "why not")
    print(table(names, [[str(step.get(name, "")) for name in names] for step in steps]))
    result = {"limits": limits, "kernels": lines, "decode": decoded, "training": steps}
    print(json.dumps({"benchmark": "gpu_suite", "date": str(date.today()), **machine(), **result}))


def machine() -> dict[str, Any]:
    """Card, driver's CUDA, versions, and what computes beside halfbyte's kernels."""
    from halfbyte.nn.parts import chosen_parts

    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    card = torch.cuda.get_device_properties(0)
    return {
        "card": f"{card.name}, {card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} multiprocessors",
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "versions": versions,
        "parts": {choice.op: choice.name for choice in chosen_parts() if choice.device == "cuda"},
    }


def verify() -> None:
    """The registered ops equal the reference on the card: to the bit, and products within bf16's rounding."""
    import halfbyte as hb
    from halfbyte.kernels import reference

    w = torch.randn(1000, SIZE, device="cuda")
    q = hb.quantize(w)
    codes, scales = reference.OPS["quantize"](w, "nf4", 64)
    expected = (codes, *reference.OPS["quantize_scales"](scales, 8))
    assert all(torch.equal(a, b) for a, b in zip(q.inner_tensors.values(), expected, strict=True)), "codes differ"
    weight = reference.OPS["dequantize"](*q.packed(), [1000, SIZE], torch.bfloat16)
    assert torch.equal(q.dequantize(torch.bfloat16), weight), "decoded weights differ"
    for rows in (1, 3, 16, 100, 600):
        x = torch.randn(rows, SIZE, device="cuda").bfloat16()
        for found, exact in (
            (torch.ops.halfbyte.linear(*q.packed(), 1000, x, None), x.double() @ weight.double().T),
            (
                torch.ops.halfbyte.linear_grad_input(*q.packed(), SIZE, x[:, :1000]),
                x[:, :1000].double() @ weight.double(),
            ),
        ):
            error = float((found.double() - exact).norm() / exact.norm())
            assert error < 2**-8, f"the product of {rows} rows is off by {error:.2e}"
    experts, ends = random_weight(8 * 128, 512, "cuda").view(8, 128, 512), [0, 1, 40, 40, 90, 300, 301, 301]
    ends = torch.tensor(ends, device="cuda", dtype=torch.int32)
    for op, features, given in (("grouped_linear", 128, 512), ("grouped_linear_grad_input", 512, 128)):
        x = torch.randn(303, given, device="cuda").bfloat16()  # two rows that belong to no expert
        found = getattr(torch.ops.halfbyte, op)(*experts.packed(), features, x, ends)
        exact = reference.OPS[op](*experts.packed(), features, x.double(), ends)
        error = float((found.double() - exact).norm() / exact.norm())
        assert error < 2**-7, f"{op} is off by {error:.2e}"


@contextmanager
def changed_tuning(**changes: Any) -> Iterator[None]:
    """This card's line of kernels/tuning.py with other values."""
    from halfbyte.kernels import tuning

    kept = tuning.gpu_tuning(torch.device("cuda"))
    key = next(capability for capability, line in tuning.GPU_TUNING.items() if line is kept)
    tuning.GPU_TUNING[key] = dataclasses.replace(kept, **changes)
    try:
        yield
    finally:
        tuning.GPU_TUNING[key] = kept


def seconds(call: Callable[[], Any]) -> float:
    """The median of calls that find nothing in the card's caches."""
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=10, rep=60, return_mode="median")


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 4 GiB, or of a tenth of what is free."""
    count = min(1 << 32, torch.cuda.mem_get_info()[0] // 10)
    source = torch.zeros(count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """Floating-point operations a second of torch's product of random 8192 x 8192 in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


class Bitsandbytes:
    """The same weight there; absent where it cannot be imported."""

    def __init__(self, w: torch.Tensor) -> None:
        import bitsandbytes as bnb
        from bitsandbytes import functional

        self._bnb, self._functional, self._w = bnb, functional, w
        self.quantize()

    def quantize(self) -> None:
        self.codes, self.state = self._functional.quantize_4bit(
            self._w, blocksize=64, compress_statistics=True, quant_type="nf4"
        )

    def dequantize(self) -> torch.Tensor:
        return self._functional.dequantize_4bit(self.codes, self.state)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self._bnb.matmul_4bit(x, self.codes.t(), self.state)


def kernels(limits: dict[str, float]) -> list[Line]:
    """Each kernel on a weight of 4096 x 4096 in NF4, double-quantized."""
    import halfbyte as hb

    w = torch.randn(SIZE, SIZE, device="cuda").bfloat16()
    q = hb.quantize(w)
    peer = Bitsandbytes(w) if find_spec("bitsandbytes") else None
    lines = [
        line("quantize", lambda: hb.quantize(w), peer and peer.quantize, None, w.nbytes + q.nbytes, limits["bytes"]),
        line("dequantize", q.dequantize, peer and peer.dequantize, None, w.nbytes + q.nbytes, limits["bytes"]),
    ]
    for rows in ROWS:
        x = torch.randn(rows, SIZE, device="cuda").bfloat16()
        few = rows <= 32
        amount, limit = (q.nbytes, limits["bytes"]) if few else (2 * rows * SIZE**2, limits["flops"])
        calls = (
            lambda x=x: torch.nn.functional.linear(x, q),
            peer and (lambda x=x: peer.linear(x)),
            lambda x=x: torch.nn.functional.linear(x, w),
        )
        lines.append(line(f"{rows} row{'s' * (rows > 1)}", *calls, amount, limit))
        if few:
            with changed_tuning(shuffle=True):
                lines.append(line(f"{lines[-1]['work']}, shuffled", *calls, amount, limit))
    for rows in (512, 4096):
        x = torch.randn(rows, SIZE, device="cuda").bfloat16().requires_grad_()
        grad = torch.randn(rows, SIZE, device="cuda").bfloat16()
        calls = (
            lambda x=x, grad=grad: torch.nn.functional.linear(x, q).backward(grad),
            peer and (lambda x=x, grad=grad: peer.linear(x).backward(grad)),
            lambda x=x, grad=grad: torch.nn.functional.linear(x, w).backward(grad),
        )
        lines.append(line(f"{rows} rows, forward + backward", *calls, 4 * rows * SIZE**2, limits["flops"]))
    return lines


def experts(limits: dict[str, float]) -> list[Line]:
    """Qwen3-30B-A3B's gate and up: 128 experts of 1536 x 2048, of which each token goes to eight."""
    from halfbyte.nn import grouped_linear, route

    count, n, k, top_k = 128, 1536, 2048, 8
    q = random_weight(count * n, k, "cuda").view(count, n, k)
    dense = q.dequantize(torch.bfloat16)
    torchs = getattr(torch.nn.functional, "grouped_mm", None)
    lines = []
    for tokens in (1, 8, 128, 2048):
        routing = route(torch.rand(tokens, count, device="cuda").argsort(1)[:, :top_k], count)
        x = torch.randn(tokens * top_k, k, device="cuda").bfloat16()
        used = int((routing.ends.diff(prepend=routing.ends.new_zeros(1)) > 0).sum())
        by_bytes, by_flops = used * q.nbytes / count / limits["bytes"], 2 * len(x) * n * k / limits["flops"]
        calls = (
            lambda x=x, routing=routing: grouped_linear(x, q, routing),
            None,
            torchs and (lambda x=x, routing=routing: torchs(x, dense.transpose(1, 2), offs=routing.ends)),
        )
        # The share of whichever limit is the nearer one.
        lines.append(line(f"experts, {tokens} token{'s' * (tokens > 1)}", *calls, max(by_bytes, by_flops), 1.0))
    return lines


def line(
    work: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any] | None,
    dense: Callable[[], Any] | None,
    amount: float,
    limit: float,
) -> Line:
    """Times of one kind of work, and the share of `limit` (amount a second) that ours reaches."""
    calls = {"ours": ours, "bitsandbytes": peer, "dense": dense}
    times = {name: seconds(call) for name, call in calls.items() if call is not None}
    return {"work": work, **times, "share": amount / times["ours"] / limit}


def row(line: Line) -> list[str]:
    """A line as cells."""
    share, times_dense = TARGETS.get(line["work"], (None, None))
    ratios = [f"{line[peer] / line['ours']:.2f}" if peer in line else "" for peer in ("bitsandbytes", "dense")]
    return [
        line["work"],
        *(f"{1e3 * line[name]:.4f}" if name in line else "" for name in ("ours", "bitsandbytes", "dense")),
        *ratios,
        "" if times_dense is None else f"{times_dense:g}",
        f"{line['share']:.0%}",
        "" if share is None else f"{share:.0%}",
    ]


def crossover() -> list[list[str]]:
    """Milliseconds of each way of a product, by rows of x."""
    q = random_weight(SIZE, SIZE, "cuda")
    dense = q.dequantize()
    most = 1 << 20
    tiles = {"vector_rows": 0, "linear_rows": most, "grad_rows": most}
    by_row: list[Line] = [{"vector_rows": most, "shuffle": shuffle} for shuffle in (False, True)]
    others: list[Line] = [{**tiles, "shuffle": shuffle} for shuffle in (False, True)]
    others.append({"vector_rows": 0, "linear_rows": 0, "grad_rows": 0})
    rows_of_cells = []
    for rows in ROWS[:-1]:
        x = torch.randn(rows, SIZE, device="cuda").bfloat16()
        times = []
        for way in (*by_row, *others):
            with changed_tuning(**way):
                times.append(seconds(lambda x=x: torch.ops.halfbyte.linear(*q.packed(), SIZE, x, None)))
        times.append(seconds(lambda x=x: x @ dense.t()))
        for way in others:
            with changed_tuning(**way):
                times.append(seconds(lambda x=x: torch.ops.halfbyte.linear_grad_input(*q.packed(), SIZE, x)))
        rows_of_cells.append([str(rows), *(f"{1e3 * one:.4f}" for one in times)])
    return rows_of_cells


def expert_crossover() -> list[list[str]]:
    """Milliseconds of each way of a product by expert, by rows of each; the same without a grouped GEMM in torch."""
    count, n, k = 128, 1536, 2048
    q = random_weight(count * n, k, "cuda").view(count, n, k)
    ways = [{"grouped_rows": 0}, {"grouped_rows": 1}, {"grouped_rows": 1, "decoded_bytes": count * n * k // 2}]
    cells = []
    for rows in (16, 32, 64, 128, 256, 512):
        ends = torch.arange(rows, (count + 1) * rows, rows, dtype=torch.int32, device="cuda")
        times = []
        for op, features, length in (("grouped_linear", n, k), ("grouped_linear_grad_input", k, n)):
            x = torch.randn(count * rows, length, device="cuda").bfloat16()
            call = getattr(torch.ops.halfbyte, op)
            for way in ways:
                with changed_tuning(**way):
                    times.append(seconds(partial(call, *q.packed(), features, x, ends)))
        cells.append([str(rows), *(f"{1e3 * one:.4f}" for one in times)])
    return cells


def decode(limits: dict[str, float]) -> dict[str, float]:
    """Tokens a second of the 7 B shape: the products of a token in a CUDA graph, and transformers' generate."""
    results = {}
    contenders = ["halfbyte", *(["bitsandbytes"] if find_spec("bitsandbytes") else [])]
    for contender in contenders:
        model = random_llama(llama_config("7 B"), contender, "cuda").eval()
        with torch.inference_mode():
            if contender == "halfbyte":
                layers = [
                    m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
                ]
                took = graph_seconds(layers)
                results["products of a token, CUDA graph"] = 1 / took
                nbytes = sum(layer.weight.nbytes for layer in layers)
                results["the same at the speed of a copy"] = limits["bytes"] / nbytes
            ids = torch.randint(32_000, (1, 16), device="cuda")
            took_for = {}
            for count in (1, 33):
                arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
                model.generate(ids, **arguments)
                torch.cuda.synchronize()
                began = time.perf_counter()
                model.generate(ids, **arguments)
                torch.cuda.synchronize()
                took_for[count] = time.perf_counter() - began
            results[f"{contender}, transformers' generate"] = 32 / (took_for[33] - took_for[1])
        del model
        release()
    return results


def graph_seconds(layers: Sequence[torch.nn.Module]) -> float:
    """All layers on a row each, captured once and replayed."""
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device="cuda").bfloat16() for layer in layers}

    def once() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        once()  # compiles the kernels, which a capture could not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return seconds(graph.replay)


def training(end: float) -> list[Line]:
    """A step of each shape, until the time is over; peers beside the smaller ones."""
    peers = [name for name, module in (("bitsandbytes", "bitsandbytes"), ("Unsloth", "unsloth")) if find_spec(module)]
    plan = [("7 B", contender, "checkpointed") for contender in ("halfbyte", *peers)]
    plan += [(name, "halfbyte", "checkpointed") for name in ("33 B", "65 B")]
    plan += [("7 B", "halfbyte", "offloaded"), ("65 B", "halfbyte", "offloaded")]
    plan += [(name, "halfbyte", "checkpointed") for name in ("70 B", "13 B", "1 B")]
    plan += [(name, contender, "kept") for contender in ("halfbyte", *peers) for name in ("7 B", "1 B")]
    steps = []
    for name, contender, activations in plan:
        step: Line = {"model": name, "contender": contender, "activations": activations}
        try:
            if time.monotonic() > end - 45:
                step["why not"] = "out of time"
            elif contender == "Unsloth":
                step["why not"] = "it loads folders only; write one with halfbyte.save_model"
            else:
                step |= train(name, contender, activations, end)
        except torch.cuda.OutOfMemoryError:
            step["why not"] = "out of memory"
        release()
        steps.append(step)
    for name in SHAPES:  # of equal random weights: a wrong kernel moves the loss further than another order of sums
        losses = [step["loss"] for step in steps if step["model"] == name and "loss" in step]
        assert not losses or max(losses) - min(losses) < 0.5, f"the contenders disagree about {name}: {losses}"
    return steps


def train(name: str, contender: str, activations: str, end: float) -> Line:
    """Tokens a second and peak of steps on one row of `LENGTH` tokens, loading included."""
    release()
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = with_adapter(random_llama(llama_config(name), contender, "cuda"), contender, activations)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(32_000, (1, LENGTH), device="cuda")
    took = []
    for _ in range(6):  # two to warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
        if len(took) > 2 and time.monotonic() > end - 30:
            break
    assert loss.isfinite(), "the loss is not finite"
    peak = torch.cuda.max_memory_allocated()
    return {"tokens/s": round(LENGTH / min(took[2:])), "peak GB": round(peak / 1e9, 2), "loss": loss.item()}


def release() -> None:
    """Give the last model's memory back to the card."""
    gc.collect()
    torch.cuda.empty_cache()


def memory_table(length: int) -> str:
    """What QLoRA takes at a row of `length` tokens: rank 16 on all projections, checkpointing, 8-bit AdamW."""
    from halfbyte.train.footprint import estimate
    from halfbyte.train.recipe import make_recipe
    from halfbyte.train.targets import check_targets, outline

    keys = {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "optim": "adamw_8bit", "lora_r": 16}
    recipe = make_recipe({"model_name_or_path": "m", "output_dir": "o", "dataset": "d.jsonl", **keys})
    header = ("model", "weights GB", "gradients", "optimizer", "activations", "decoded weight", "all")
    header += ("promised", "fits", "activations offloaded", "all", "pinned")
    rows = []
    for name in SHAPES:
        config = llama_config(name)
        form = outline(config)
        adapted = check_targets(recipe, form).adapted
        buffer = 2 * max(rows * columns for rows, columns in form.shapes.values())
        made, moved = (
            estimate(one, config, form, adapted, length, gpu=True, fused=False)
            for one in (recipe, recipe.model_copy(update={"activation_offloading": True}))
        )
        total, promised = made.total + buffer, HEADLINE.get(name) if length == 512 else None
        parts = (made.weights, made.gradients, made.state, made.activations, buffer, total)
        rows.append([name, *(f"{part / 1e9:.2f}" for part in parts)])
        rows[-1] += ["", ""] if promised is None else [f"{promised}", "yes" if total < promised * 1e9 else "no"]
        rows[-1] += [f"{part / 1e9:.2f}" for part in (moved.activations, moved.total + buffer, moved.host)]
    return table(header, rows)


if __name__ == "__main__":
    main()
