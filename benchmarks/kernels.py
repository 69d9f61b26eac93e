"""How fast the CPU kernels are, beside bitsandbytes and torch's dense products in the same run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/kernels.py [--isa avx2] [--crossover]

Weights of 4096 x 4096 in NF4, block 64, double-quantized. Results are checked before anything is timed. Few rows take
twelve weights in turn, so that they come from memory as those of a model do, whose layers no cache holds: with one
weight the cache of a server answers, and dense float32 is read at twice the speed of memory. `share` is what part of
the machine's measured limit a kernel reaches: of the memory bandwidth for decoding and for few rows (bytes that must
move, over the time), of the dense GEMM rate from 128 rows on. bitsandbytes' products are `matmul_4bit` on the stored
form, which it trains with; for answering its layers repack their weights, which decode.py times. `--crossover` prints
instead where the few-row kernels stop being faster than panels through torch's GEMM: kernels/tuning.py comes from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _assets import finish, table
from _peers import Bitsandbytes, best_times, gemm_rate, memory_bandwidth

import halfbyte as hb
from halfbyte.kernels import cpu, reference, tuning

SIZE = 4096
IN_TURN = 12
OPS = torch.ops.halfbyte
# What TARGETS asks for at each line: (times bitsandbytes, times dense bf16).
FORWARD = {1: (40, 5), 4: (25, 3), 16: (8, 1.2), 128: (1.8, 0.9)}
FORWARD_BACKWARD = {128: (2.7, 0.9), 512: (1.4, 0.95), 2048: (1.1, 0.97)}
HEADER = ("work", "halfbyte ms", "bitsandbytes ms", "dense ms", "x bnb", "target", "x dense", "target", "share")


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="another instruction set than the best")
    parser.add_argument("--crossover", action="store_true", help="find the rows where torch's GEMM takes over")
    options = parser.parse_args()
    native = cpu.native_library()
    if isinstance(native, cpu.Missing):
        sys.exit(f"benchmark skipped: {native.reason}; {native.remedy}")
    if options.isa:
        native.use(options.isa)
    torch.manual_seed(0)
    w = torch.randn(SIZE, SIZE)
    q = hb.quantize(w)
    verify(w, q)
    if options.crossover:
        crossover(native, q)
        return
    limits = {
        "bytes": memory_bandwidth(),
        torch.bfloat16: gemm_rate(torch.bfloat16),
        torch.float32: gemm_rate(torch.float32),
    }
    print(
        f"{native.isa}, {torch.get_num_threads()} threads; reads {limits['bytes'] / 1e9:.1f} GB/s, dense GEMM "
        f"{limits[torch.bfloat16] / 1e9:.0f} GFLOP/s bf16, {limits[torch.float32] / 1e9:.0f} float32\n"
    )
    lines = codec(w, q, limits)
    lines += products(w, q, torch.bfloat16, limits)
    lines += products(w, q, torch.float32, limits)
    lines += variants(w)
    print(table(HEADER, [row(line) for line in lines]))
    result = {"isa": native.isa, "threads": torch.get_num_threads(), "read_bandwidth": limits["bytes"]}
    result |= {"gemm_bf16": limits[torch.bfloat16], "gemm_float32": limits[torch.float32], "lines": lines}
    finish("kernels", result)


def verify(w: torch.Tensor, q: hb.QuantizedTensor) -> None:
    """Codes, scales and decoded weights equal the reference's; products lie within bf16's rounding of the exact."""
    codes, scales = reference.OPS["quantize"](w, "nf4", 64)
    codes_8, absmax, offset = reference.OPS["quantize_scales"](scales, 8)
    expected = (codes, codes_8, absmax, offset)
    assert all(torch.equal(a, b) for a, b in zip(q.inner_tensors.values(), expected, strict=True)), "codes differ"
    decoded = reference.OPS["dequantize"](*q.packed(), [SIZE, SIZE], torch.bfloat16)
    assert torch.equal(q.dequantize(torch.bfloat16), decoded), "decoded weights differ"
    for rows in (1, 16, 600):
        x = torch.randn(rows, SIZE).bfloat16()
        exact = x.float() @ decoded.float().T
        error = (OPS.linear(*q.packed(), SIZE, x, None).float() - exact).norm() / exact.norm()
        assert error < 2**-8, f"the product of {rows} rows is off by {error:.2e}"


def codec(w: torch.Tensor, q: hb.QuantizedTensor, limits: dict[Any, float]) -> list[dict[str, Any]]:
    """Quantizing and decoding."""
    peer = Bitsandbytes(w, torch.bfloat16)
    out = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    times = best_times({"ours": lambda: hb.quantize(w), "bitsandbytes": peer.quantize})
    lines = [line("quantize from float32, double-quantized", times, w.nbytes + q.nbytes, limits["bytes"], (25, None))]
    times = best_times({"ours": lambda: q.dequantize(torch.bfloat16), "bitsandbytes": peer.dequantize})
    moved = q.nbytes + out.nbytes
    lines.append(line("dequantize to bf16, a fresh tensor", times, moved, limits["bytes"], (7, None)))
    native = cpu.native_library()
    assert isinstance(native, cpu.Native)
    weight, _keep = cpu.packed_weight(q.packed(), w.numel())
    arguments = (torch.get_num_threads(), weight, SIZE, 0, SIZE, 0, SIZE, 1, out.data_ptr())
    # bitsandbytes writes into a given buffer on CUDA only: on a CPU this is what its users have.
    times = best_times({"ours": lambda: native.functions["hb_dequantize"](*arguments), "bitsandbytes": peer.dequantize})
    return [*lines, line("dequantize to bf16, into a buffer in use", times, moved, limits["bytes"], (7, None))]


def products(
    w: torch.Tensor, q: hb.QuantizedTensor, dtype: torch.dtype, limits: dict[Any, float]
) -> list[dict[str, Any]]:
    """y = x W^T for few and many rows, and with the gradient of x."""
    peers = [Bitsandbytes(w, dtype) for _ in range(IN_TURN)]
    weights = [(hb.quantize(w).packed(), peer, w.to(dtype, copy=True)) for peer in peers]
    _, peer, dense = weights[0]
    name = str(dtype).removeprefix("torch.")
    lines = []
    for rows, target in FORWARD.items():
        x = torch.randn(rows, SIZE).to(dtype)
        few = rows < 128
        some = weights if few else weights[:1]
        times = best_times(
            {
                "ours": in_turn([lambda p=packed, x=x: OPS.linear(*p, SIZE, x, None) for packed, _, _ in some]),
                "bitsandbytes": in_turn([lambda peer=peer, x=x: peer.linear(x) for _, peer, _ in some]),
                "dense": in_turn([lambda d=dense, x=x: torch.nn.functional.linear(x, d) for _, _, dense in some]),
            }
        )
        work = q.nbytes if few else 2 * rows * SIZE**2
        lines.append(line(f"{rows} rows, {name}", times, work, limits["bytes" if few else dtype], target))
    for rows, target in FORWARD_BACKWARD.items() if dtype == torch.bfloat16 else ():
        x = torch.randn(rows, SIZE).to(dtype).requires_grad_()
        grad = torch.randn(rows, SIZE).to(dtype)
        times = best_times(
            {
                "ours": lambda x=x, grad=grad: torch.nn.functional.linear(x, q).backward(grad),
                "bitsandbytes": lambda x=x, grad=grad: peer.linear(x).backward(grad),
                "dense": lambda x=x, grad=grad: torch.nn.functional.linear(x, dense).backward(grad),
            }
        )
        lines.append(line(f"{rows} rows, {name}, forward + backward", times, 4 * rows * SIZE**2, limits[dtype], target))
    return lines


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Each time the next of `calls`."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def variants(w: torch.Tensor) -> list[dict[str, Any]]:
    """One row in other formats and block sizes, as times NF4's speed at block 64 (the column "x dense")."""
    x = torch.randn(1, SIZE).bfloat16()
    kinds = [("nf4", 64), ("fp4", 64), ("int4", 64), ("nf4", 32), ("nf4", 128), ("nf4", 256)]
    weights = {f"{format}, block {block}": hb.quantize(w, format, block).packed() for format, block in kinds}
    times = best_times({name: lambda p=p: OPS.linear(*p, SIZE, x, None) for name, p in weights.items()})
    base = times["nf4, block 64"]
    return [
        {"work": f"1 row, {name}, times NF4 block 64", "ours": time, "dense": base, "x_dense": base / time}
        for name, time in times.items()
    ]


def line(
    work: str, times: dict[str, float], amount: float, limit: float, target: tuple[float | None, float | None]
) -> dict[str, Any]:
    """One line of the table: times, ratios, their targets, and the share of `limit` (amount a second) reached."""
    result: dict[str, Any] = {"work": work, **times, "share": amount / times["ours"] / limit}
    for peer, wanted in zip(("bitsandbytes", "dense"), target, strict=True):
        if peer in times:
            result |= {f"x_{peer}": times[peer] / times["ours"], f"target_{peer}": wanted}
    return result


def row(line: dict[str, Any]) -> list[str]:
    """A line as cells."""

    def cell(key: str, form: str, factor: float = 1.0) -> str:
        return "" if line.get(key) is None else format(line[key] * factor, form)

    peers = [
        cell(f"{kind}_{peer}", form)
        for peer in ("bitsandbytes", "dense")
        for kind, form in (("x", ".2f"), ("target", "g"))
    ]
    return [
        line["work"],
        *(cell(key, ".3f", 1e3) for key in ("ours", "bitsandbytes", "dense")),
        *peers,
        cell("share", ".0%"),
    ]


def crossover(native: cpu.Native, q: hb.QuantizedTensor) -> None:
    """Own kernels against panels through torch's GEMM, by rows."""
    rows_of = (1, 4, 8, 16, 32, 128, 384, 768)
    kept = tuning.TUNING[native.isa]
    own = dataclasses.replace(
        kept, linear_rows=1 << 30, linear_rows_float=1 << 30, grad_rows=1 << 30, grad_rows_float=1 << 30
    )
    panels = dataclasses.replace(kept, linear_rows=0, linear_rows_float=0, grad_rows=0, grad_rows_float=0)

    def with_tuning(choice: tuning.Tuning, call: Any) -> Any:
        def run() -> None:
            tuning.TUNING[native.isa] = choice
            call()

        return run

    cells = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows in rows_of:
            x = torch.randn(rows, SIZE).to(dtype)
            cell = [f"{rows}, {str(dtype).removeprefix('torch.')}"]
            for call in (
                lambda x=x: OPS.linear(*q.packed(), SIZE, x, None),
                lambda x=x: OPS.linear_grad_input(*q.packed(), SIZE, x),
            ):
                times = best_times({"own": with_tuning(own, call), "panels": with_tuning(panels, call)}, seconds=0.05)
                cell += [f"{times['own'] * 1e3:.2f}", f"{times['panels'] * 1e3:.2f}"]
            cells.append(cell)
    print(native.isa)
    print(table(("rows", "linear: own ms", "panels ms", "grad: own ms", "panels ms"), cells))


if __name__ == "__main__":
    main()
