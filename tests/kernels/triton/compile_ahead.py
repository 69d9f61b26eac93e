"""Compiles what the ops launch, for cards that are not there: python compile_ahead.py CAPABILITY... [--table]

The ops are called with tensors on the CPU and every launch is caught with its arguments, so what is compiled is what
would run. Prints each kernel with its capability, registers, bytes spilled to local memory, and shared memory.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends import compiler as backends
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import halfbyte as hb
from halfbyte.kernels import tuning
from halfbyte.kernels.slots import make_options, random_keys
from halfbyte.kernels.triton import attention, rowwise
from halfbyte.kernels.triton.adamw import TritonBatch
from halfbyte.kernels.triton.ops import OPS
from halfbyte.kernels.triton.weights import _VERSION
from halfbyte.optim.states import allocate_plain, new_state, slot_of

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a program may have
SIZE = 256
LINES = dict(tuning.GPU_TUNING)
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(capability: int) -> list[Launch]:
    """What the ops launch on such a card, one of each kind."""
    caught: list[Launch] = []
    JITFunction.run = lambda self, *args, grid, warmup, **options: caught.append((self, args, options))
    line = LINES[max(known for known in LINES if known <= divmod(capability, 10))]
    tuning.GPU_TUNING[8, 0] = line  # what tensors on the CPU take
    q = hb.quantize(torch.randn(SIZE, SIZE))
    bfloat16 = capability >= 80 or _VERSION >= (3, 3)
    half = torch.bfloat16 if bfloat16 else torch.float16
    for format in ("nf4", "int8"):
        OPS["quantize"](torch.zeros(5000, dtype=half), format, 64)
    for weight in (
        q,
        hb.quantize(torch.randn(64, 64), "int8", 64, None),
        hb.quantize(torch.randn(64, 64), "nf4", 64, 6),
    ):
        OPS["dequantize"](*weight.packed(), list(weight.shape), half)
        OPS["dequantize_rows"](*weight.packed(), weight.shape[1], torch.tensor([0]), half)
    a, b = torch.zeros(16, SIZE, dtype=half), torch.zeros(SIZE, 16)
    fused = [rows for rows in (1, 16, 64) if rows <= line.linear_rows]
    for rows in fused:
        x = torch.zeros(rows, SIZE, dtype=torch.bfloat16 if capability >= 80 else torch.float16)
        OPS["linear_lora"](*q.packed(), SIZE, x, x[0, :SIZE].clone(), [a], [b], [0.5], [rows])
    OPS["linear"](*q.packed(), SIZE, torch.zeros(1, SIZE), None)
    tuning.GPU_TUNING[8, 0] = dataclasses.replace(line, pairs=True)
    for block_size in (32, 64) if bfloat16 else ():
        pairs, x = hb.quantize(torch.randn(SIZE, SIZE), "nf4", block_size), torch.zeros(1, SIZE, dtype=half)
        OPS["linear_lora"](*pairs.packed(), SIZE, x, x[0].clone(), [a], [b], [0.5], [1])
    tuning.GPU_TUNING[8, 0] = line
    OPS["linear_grad_input"](*q.packed(), SIZE, torch.zeros(min(16, line.grad_rows), SIZE, dtype=half))
    experts, ends = hb.quantize(torch.randn(4, SIZE, SIZE)), torch.tensor([0, 9, 9, 60], dtype=torch.int32)
    for dtype, rows in ((half, 64), (torch.float16, 8), (torch.float32, 64)):
        OPS["grouped_linear"](*experts.packed(), SIZE, torch.zeros(rows, SIZE, dtype=dtype), ends)
        OPS["grouped_linear_grad_input"](*experts.packed(), SIZE, torch.zeros(rows, SIZE, dtype=dtype), ends)
    tuning.GPU_TUNING[8, 0] = dataclasses.replace(line, programs=64)
    if 16 in fused:
        long = hb.quantize(torch.randn(64, 2048))
        OPS["linear"](*long.packed(), 64, torch.zeros(16, 2048, dtype=torch.bfloat16), None)
    for kind, master in (("float32", False), ("8bit", bfloat16)):
        parameter = torch.zeros(300, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        slot = slot_of(parameter, new_state(parameter, kind, master=master, allocate=allocate_plain), 0)
        group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        keys = random_keys(1, np.full(1, 1), np.arange(1))
        TritonBatch([slot]).step([torch.zeros(300)], [make_options(group, 1, 1.0)], [0], keys)
    between_products(half)
    return caught


def between_products(dtype: torch.dtype) -> None:
    """What a decoder step launches besides products."""
    x, norm = torch.zeros(4, 1024, dtype=dtype), torch.zeros(1024)
    rowwise.rms_norm(x, norm, 1e-5, x)
    rowwise.gated(x, x, "silu")
    rowwise.mix(x[:, :16].contiguous(), torch.zeros(4, 2), torch.zeros(3, 16, dtype=torch.int32))
    for dim, shared, of_cache in ((128, 4, dtype), (128, 8, torch.int8), (256, 1, dtype)):
        attend(dtype, dim, shared, of_cache)
    attend(torch.float32, 256, 4, torch.float32)


def attend(dtype: torch.dtype, dim: int, shared: int, of_cache: torch.dtype) -> None:
    """Attention with `shared` query heads to a head of keys."""
    rows, kv_heads = 4, 2
    heads = attention.Heads(
        torch.zeros(rows, shared * kv_heads * dim, dtype=dtype), *torch.zeros(2, rows, kv_heads * dim, dtype=dtype)
    )
    where = attention.Rows(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    angles = attention.Angles(*(torch.zeros(4096, dim, dtype=dtype) for _ in range(2)))
    values, scales = torch.zeros(1, kv_heads, 4096, dim, dtype=of_cache), torch.zeros(1, kv_heads, 4096)
    cache = attention.LayerCache(values.view(1, kv_heads, 256, dim, 16), values, scales, scales)
    norm = torch.zeros(dim) if of_cache == torch.int8 else None
    form = attention.Form(shared * kv_heads, kv_heads, 0.1, 1e-5, 0, norm, norm)
    attention.attend(heads, where, angles, cache, form)


def compiled(launch: Launch, capability: int, shuffle: bool) -> Any:
    """The kernel of a launch, as triton's just-in-time compiler would specialize it."""
    kernel, args, options = launch
    bound = dict(zip(kernel.arg_names, args, strict=False)) | options
    if "INTERPRETED" in bound:
        bound["INTERPRETED"] = False  # as on a card
    if "PTX" in bound:
        bound["PTX"], bound["AHEAD"] = True, capability >= 90
    if "SHUFFLE" in bound:
        bound["SHUFFLE"] = shuffle  # never on the CPU
    types, constants, divisible = [], {}, []
    for at, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[at] = value
            types.append("constexpr" if parameter.is_constexpr else "i32")
        elif isinstance(value, torch.Tensor):
            types.append(TYPES[value.dtype])
            divisible.append(at)
        elif isinstance(value, float):
            types.append("fp32")
        else:
            types.append("i32")
            divisible += [at] * (value % 16 == 0)
    chosen = {key: value for key, value in options.items() if key not in kernel.arg_names}
    source = described(kernel, types, constants, divisible)
    return triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=chosen)


def described(kernel: Any, types: list[str], constants: dict[int, Any], divisible: list[int]) -> ASTSource:
    """A kernel with types by position, constants among them, and what is a multiple of 16, as this triton wants it."""
    names = kernel.arg_names
    if hasattr(backends, "AttrsDescriptor"):  # up to 3.2
        signature = {names[at]: type for at, type in enumerate(types) if type != "constexpr"}
        ones = [at for at in constants if types[at] != "constexpr"]
        hints = backends.AttrsDescriptor.from_hints(dict.fromkeys(divisible, 16) | dict.fromkeys(ones, 1))
        return ASTSource(kernel, signature, {names[at]: value for at, value in constants.items()}, hints)
    signature = {names[at]: "constexpr" if at in constants else type for at, type in enumerate(types)}
    hints = {(at,): [["tt.divisibility", 16]] for at in divisible}
    return ASTSource(kernel, signature, {(at,): value for at, value in constants.items()}, hints)


def resources(binary: bytes) -> str:
    """Registers and local memory, by cuobjdump of the triton package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return f" {found[1]} registers, {found[2]} bytes of local memory," if found else ""


def main() -> None:
    """Compile and print; what a card has no shared memory for would fail when it is launched."""
    for capability in map(int, sys.argv[1:]):
        seen = set()
        for launch in launches(capability):
            name = launch[0].__name__
            first = "SHUFFLE" in launch[0].arg_names and f"{name} shuffled" not in seen
            for label, shuffle in ((name, False), (f"{name} shuffled", True))[: 1 + first]:
                kernel = compiled(launch, capability, shuffle)
                seen.add(label)
                most = SHARED[max(known for known in SHARED if known <= capability)]
                assert kernel.metadata.shared <= most, f"{label} takes {kernel.metadata.shared} of {most} bytes"
                print(f"{label} {capability}:{resources(kernel.asm['cubin'])} {kernel.metadata.shared} shared")


if __name__ == "__main__":
    main()
