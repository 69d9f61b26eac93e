"""Everything halfbyte does on a card, in one run of less than eight minutes: verified, then timed.

    python benchmarks/gpu_suite.py [--minutes 8] [--crossover] [--json FILE]
    python benchmarks/gpu_suite.py --memory      needs no card

Kernels beside torch's dense product, bitsandbytes where it can be imported, and the card's own measured limits (a copy
in its memory, a dense GEMM); decoding; a training step of Llamas of 1 to 70 B parameters whose random 4-bit weights are
made on the card. What there is no time or no memory for, and what fails, is named in its row and in the last line, and
the rest is measured; where something failed the exit code is 1. `--crossover` prints instead where the ways of a
product take over from each other: the lines of kernels/tuning.py. `--memory` prints what training takes, by the
formulas that `halfbyte train` warns with.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _assets import table
from _gpu_decoder import decoder_rates
from _gpu_models import SHAPES, llama_config, random_llama, random_weight
from _gpu_training import release, training
from _gpu_verify import SIZE, VARIANTS, changed_tuning, first_line, verified

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
EXPERTS = (128, 1536, 2048, 8)  # of Qwen3-30B-A3B: how many, gate and up, hidden, and how many each token goes to
DEVICE = "cuda"
LARGE = (28_672, 8192)  # a weight whose reading outlasts the start of a kernel
Line = dict[str, Any]


class Report:
    """What was measured so far. A section that fails is named and does not end the run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.result: dict[str, Any] = {"benchmark": "gpu_suite", "date": str(date.today())}
        self.failed: dict[str, str] = {}

    def section(self, name: str, call: Callable[[], Any], show: Callable[[Any], str] = str) -> Any:
        """What `call` returns, kept under `name` and shown; None where it fails."""
        value = None
        try:
            value = self.result[name] = call()
            print(show(value), "\n", flush=True)
        except Exception as error:
            self.failed[name] = first_line(error)
            print(f"{name}: {self.failed[name]}\n", flush=True)
        release()
        if self.path is not None:
            self.path.write_text(self.text() + "\n")
        return value

    def text(self) -> str:
        """One line of JSON."""
        return json.dumps(self.result | ({"failed": self.failed} if self.failed else {}))


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="what the run may take")
    parser.add_argument("--crossover", action="store_true", help="times of each way of a product, by rows")
    parser.add_argument("--memory", action="store_true", help="the table of what training takes, computed")
    parser.add_argument("--json", type=Path, help="a file for the last line, written again after each section")
    options = parser.parse_args()
    if options.memory:
        for length in (512, 16_384):
            print(f"one row of {length:,} tokens\n\n{memory_table(length)}\n")
        return
    if not torch.cuda.is_available():
        print("benchmark skipped: torch sees no CUDA device, and this one is about nothing else")
        return
    torch.manual_seed(0)
    report = Report(options.json)
    measure(report, time.monotonic() + 60 * options.minutes, options.crossover)
    print(report.text(), flush=True)
    if report.failed:
        sys.exit(1)


def measure(report: Report, end: float, only_crossover: bool) -> None:
    """Each section, the ones that are asked for most often first."""
    report.section("machine", machine)
    checks = report.section("verified", verified) or {}
    report.failed |= {f"verified, {name}": said for name, said in checks.items() if said != "ok"}
    # A variant that is wrong may have left an illegal address behind: it is not run in this process.
    variants = [name for name, said in checks.items() if said == "ok" and name != "plain"]
    if only_crossover:
        report.section("crossover", partial(crossover, variants), crossover_table)
        report.section("crossover of experts", expert_crossover, expert_crossover_table)
        return
    limits = report.section("limits", measured_limits) or {"bytes": float("nan"), "flops": float("nan")}
    header = (
        "work",
        "halfbyte ms",
        "bitsandbytes",
        "dense ms",
        "x bnb",
        "x dense",
        "target",
        "share",
        "target",
        "why not",
    )

    def show(lines: list[Line]) -> str:
        return table(header, [row(line) for line in lines])

    report.section("kernels", lambda: kernels(limits, variants), show)
    report.section("experts", lambda: experts(limits), show)
    report.section("decode", lambda: decode(limits), decode_table)
    report.section("training", lambda: training(end), training_table)


def measured_limits() -> dict[str, float]:
    """Bytes and floating-point operations a second."""
    return {"bytes": copy_rate(), "flops": gemm_rate()}


def decode_table(decoded: dict[str, Any]) -> str:
    """Rates, or what went wrong."""
    cells = [[name, f"{value:.1f}" if isinstance(value, float) else value] for name, value in decoded.items()]
    return table(("decoding, 7 B", "tokens/s"), cells)


def training_table(steps: list[Line]) -> str:
    """A row for each step."""
    names = ("model", "contender", "activations", "tokens/s", "peak GB", "why not")
    return table(names, [[str(step.get(name, "")) for name in names] for step in steps])


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


def seconds(call: Callable[[], Any]) -> float:
    """The median of calls that find nothing in the card's caches."""
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=10, rep=60, return_mode="median")


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 4 GiB, or of a tenth of what is free."""
    count = min(1 << 32, torch.cuda.mem_get_info()[0] // 10)
    source = torch.zeros(count, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """Floating-point operations a second of torch's product of random 8192 x 8192 in bf16."""
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
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


def kernels(limits: dict[str, float], variants: Sequence[str]) -> list[Line]:
    """Each kernel on a weight of 4096 x 4096 in NF4, double-quantized, and the product of one row with a large one."""
    import halfbyte as hb

    w = torch.randn(SIZE, SIZE, device=DEVICE).bfloat16()
    q = hb.quantize(w)
    peer, why = None, {}
    if find_spec("bitsandbytes"):
        try:
            peer = Bitsandbytes(w)
        except Exception as error:
            why = {"why not": f"bitsandbytes: {first_line(error)}"}
    lines = [
        line("quantize", lambda: hb.quantize(w), peer and peer.quantize, None, w.nbytes + q.nbytes, limits["bytes"]),
        line("dequantize", q.dequantize, peer and peer.dequantize, None, w.nbytes + q.nbytes, limits["bytes"]),
    ]
    lines[0] |= why
    for rows in ROWS:
        x = torch.randn(rows, SIZE, device=DEVICE).bfloat16()
        few = rows <= 32
        amount, limit = (q.nbytes, limits["bytes"]) if few else (2 * rows * SIZE**2, limits["flops"])
        calls = (
            lambda x=x: torch.nn.functional.linear(x, q),
            peer and (lambda x=x: peer.linear(x)),
            lambda x=x: torch.nn.functional.linear(x, w),
        )
        work = f"{rows} row{'s' * (rows > 1)}"
        lines.append(line(work, *calls, amount, limit))
        lines += in_variants(
            work, [name for name in variants if few and (name != "pairs" or rows == 1)], calls, amount, limit
        )
    lines += large(limits, variants)
    for rows in (512, 4096):
        x = torch.randn(rows, SIZE, device=DEVICE).bfloat16().requires_grad_()
        grad = torch.randn(rows, SIZE, device=DEVICE).bfloat16()
        calls = (
            lambda x=x, grad=grad: torch.nn.functional.linear(x, q).backward(grad),
            peer and (lambda x=x, grad=grad: peer.linear(x).backward(grad)),
            lambda x=x, grad=grad: torch.nn.functional.linear(x, w).backward(grad),
        )
        lines.append(line(f"{rows} rows, forward + backward", *calls, 4 * rows * SIZE**2, limits["flops"]))
    return lines


def in_variants(work: str, variants: Sequence[str], calls: Sequence[Any], amount: float, limit: float) -> list[Line]:
    """The same work, tuned otherwise."""
    lines = []
    for name in variants:
        with changed_tuning(**VARIANTS[name]):
            lines.append(line(f"{work}, {name}", calls[0], None, calls[2], amount, limit))
    return lines


def large(limits: dict[str, float], variants: Sequence[str]) -> list[Line]:
    """One row: 8.7 MB are read in two microseconds, in which no kernel reaches the memory's rate; these are 121 MB."""
    n, k = LARGE
    q, dense = random_weight(n, k, DEVICE), torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(1, k, device=DEVICE).bfloat16()
    calls = (lambda: torch.nn.functional.linear(x, q), None, lambda: torch.nn.functional.linear(x, dense))
    work = f"1 row, {n} x {k}"
    lines = [line(work, *calls, q.nbytes, limits["bytes"])]
    return lines + in_variants(work, variants, calls, q.nbytes, limits["bytes"])


def experts(limits: dict[str, float]) -> list[Line]:
    """Products by expert, of few tokens and many."""
    from halfbyte.nn import grouped_linear, route

    count, n, k, top_k = EXPERTS
    q = random_weight(count * n, k, DEVICE).view(count, n, k)
    dense = q.dequantize(torch.bfloat16)
    torchs = getattr(torch.nn.functional, "grouped_mm", None)
    lines = []
    for tokens in (1, 8, 128, 2048):
        routing = route(torch.rand(tokens, count, device=DEVICE).argsort(1)[:, :top_k], count)
        x = torch.randn(tokens * top_k, k, device=DEVICE).bfloat16()
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
    measured: Line = {"work": work}
    for name, call in {"ours": ours, "bitsandbytes": peer, "dense": dense}.items():
        try:
            if call is not None:
                measured[name] = seconds(call)
        except Exception as error:
            measured["why not"] = "; ".join(filter(None, [measured.get("why not"), f"{name}: {first_line(error)}"]))
    if "ours" in measured and limit == limit:  # it is not a number where it could not be measured
        measured["share"] = amount / measured["ours"] / limit
    return measured


def row(line: Line) -> list[str]:
    """A line as cells."""
    share, times_dense = TARGETS.get(line["work"].split(",")[0] if "backward" not in line["work"] else "", (None, None))
    both = [peer in line and "ours" in line for peer in ("bitsandbytes", "dense")]
    ratios = [
        f"{line[peer] / line['ours']:.2f}" if known else ""
        for peer, known in zip(("bitsandbytes", "dense"), both, strict=True)
    ]
    return [
        line["work"],
        *(f"{1e3 * line[name]:.4f}" if name in line else "" for name in ("ours", "bitsandbytes", "dense")),
        *ratios,
        "" if times_dense is None else f"{times_dense:g}",
        f"{line['share']:.0%}" if "share" in line else "",
        "" if share is None else f"{share:.0%}",
        line.get("why not", ""),
    ]


def crossover(variants: Sequence[str]) -> dict[str, list[float | None]]:
    """Seconds of each way of a product by rows of x, None where it cannot be done."""
    q = random_weight(SIZE, SIZE, DEVICE)
    dense = q.dequantize()
    most = 1 << 20
    tiles = {"vector_rows": 0, "linear_rows": most, "grad_rows": most}
    tuned = {"": {}, **{f", {name}": VARIANTS[name] for name in variants}}
    forward = {f"row{name}": {"vector_rows": most} | changes for name, changes in tuned.items()}
    by_tile = {f"tiles{name}": tiles | changes for name, changes in tuned.items() if "pairs" not in name}
    decoded = {"decoded": {"vector_rows": 0, "linear_rows": 0, "grad_rows": 0}}

    def linear(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfbyte.linear(*q.packed(), SIZE, x, None)

    def gradient(grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfbyte.linear_grad_input(*q.packed(), SIZE, grad)

    ways = [(name, way, linear) for name, way in (forward | by_tile | decoded).items()]
    ways.append(("dense", None, lambda x: x @ dense.t()))
    ways += [(f"g W, {name}", way, gradient) for name, way in (by_tile | decoded).items()]
    times: dict[str, list[float | None]] = {name: [] for name, _, _ in ways}
    for rows in ROWS[:-1]:
        x = torch.randn(rows, SIZE, device=DEVICE).bfloat16()
        for name, way, call in ways:
            with nullcontext() if way is None else changed_tuning(**way):
                measured = line(name, partial(call, x), None, None, 1, 1)
            times[name].append(measured.get("ours"))
    return times


def expert_crossover() -> list[list[float]]:
    """Rows of each expert, and seconds of each way of their product; the same without a grouped GEMM in torch."""
    count, n, k = 128, 1536, 2048
    q = random_weight(count * n, k, DEVICE).view(count, n, k)
    ways = [{"grouped_rows": 0}, {"grouped_rows": 1}, {"grouped_rows": 1, "decoded_bytes": count * n * k // 2}]
    found = []
    for rows in (16, 32, 64, 128, 256, 512):
        ends = torch.arange(rows, (count + 1) * rows, rows, dtype=torch.int32, device=DEVICE)
        times = []
        for op, features, length in (("grouped_linear", n, k), ("grouped_linear_grad_input", k, n)):
            x = torch.randn(count * rows, length, device=DEVICE).bfloat16()
            call = getattr(torch.ops.halfbyte, op)
            for way in ways:
                with changed_tuning(**way):
                    times.append(seconds(partial(call, *q.packed(), features, x, ends)))
        found.append([rows, *times])
    return found


def expert_crossover_table(found: list[list[float]]) -> str:
    """Milliseconds, a row for each number of rows."""
    ways = ("tiles", "decoded", "some at a time")
    header = ("rows of an expert", *ways, *(f"g W, {way}" for way in ways))
    return table(header, [[f"{rows}", *(f"{1e3 * one:.4f}" for one in times)] for rows, *times in found])


def crossover_table(times: dict[str, list[float | None]]) -> str:
    """Milliseconds, a row for each number of rows."""
    cells = [
        [str(rows), *("" if one is None else f"{1e3 * one:.4f}" for one in of_rows)]
        for rows, of_rows in zip(ROWS[:-1], zip(*times.values(), strict=True), strict=True)
    ]
    return table(("rows", *times), cells)


def decode(limits: dict[str, float]) -> dict[str, Any]:
    """Tokens a second of the 7 B shape: products alone, the engine's decoder, and transformers' generate."""
    results: dict[str, Any] = {}
    for contender in ["halfbyte", *(["bitsandbytes"] if find_spec("bitsandbytes") else [])]:
        try:
            decode_with(contender, limits, results)
        except Exception as error:
            results[f"{contender}, not measured"] = first_line(error)
        release()
    return results


def decode_with(contender: str, limits: dict[str, float], results: dict[str, Any]) -> None:
    """Update `results` by one contender's rates."""
    model = random_llama(llama_config("7 B"), contender, DEVICE).eval()
    with torch.inference_mode():
        if contender == "halfbyte":
            layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
            nbytes = sum(layer.weight.nbytes for layer in layers)
            if limits["bytes"] == limits["bytes"]:  # it was measured
                results["the products of a token at the speed of a copy"] = limits["bytes"] / nbytes
            results["the products of a token, CUDA graph"] = 1 / graph_seconds(layers)
            results.update(decoder_rates(model))
        ids = torch.randint(32_000, (1, 16), device=DEVICE)
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


def graph_seconds(layers: Sequence[torch.nn.Module]) -> float:
    """All layers on a row each, captured once and replayed."""
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device=DEVICE).bfloat16() for layer in layers}

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
