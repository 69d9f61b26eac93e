"""The archive's times, beside what the disk and bitsandbytes take: quantizing, opening, checking, loading.

    python benchmarks/archive.py [--layers N] [--model FOLDER]

A random Llama of 399 M parameters (6 layers) in bfloat16. Before anything is timed, the archive, compressed or not, is
compared with the model that loading quantizes: bit for bit. Random weights compress less than real ones: --model names
a folder with such (an encoder is fine), whose bits and whose rate of decoding are printed beside.

A cold process is one of its own: its memory is what mapping every tensor adds to it after the imports, and its first
token is timed from the end of the imports, which are torch's and transformers' and the same for everyone.

CPU seconds are the process's, all threads together. They say what work there is on a machine that is busy with others;
reading and writing takes one core and waits for the disk, quantizing takes as many as there are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _assets import finish, table
from _llama import write_llama

from halfbyte.models import Archive, HalfbyteConfig, describe, load_model, quantize_to_archive
from halfbyte.tensor import QuantizedTensor

ROUNDS = 5


def copy(source: Path, target: Path, size: int) -> None:
    """Read all of a file, write `size` bytes and bring them to the disk: what no quantizer can do without."""
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
        while block := file.read(1 << 24):
            out.write(block[: max(0, size - out.tell())])
        os.fsync(out.fileno())


def check(folder: Path, archives: list[Path]) -> None:
    """The archives hold what loading makes, bit for bit."""
    model = load_model(folder, quantization=HalfbyteConfig())
    for path in archives:
        archive = Archive(path)
        archive.verify()
        for name, parameter in model.named_parameters():
            found = archive.tensor(name)
            same = found.same_bytes(parameter) if isinstance(found, QuantizedTensor) else torch.equal(found, parameter)
            assert same, f"{path}: {name} differs"


def bitsandbytes_load(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


COLD_OPEN = """
import json, re, sys, time
import halfbyte.models

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

idle, began = resident(), time.perf_counter()
archive = halfbyte.models.Archive(sys.argv[1])
tensors = [archive.tensor(name) for name in archive.directory.tensors]
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": resident() - idle}))
"""
COLD_TOKEN = """
import json, sys, time
import torch, transformers.models.llama.modeling_llama
if sys.argv[1] == "halfbyte":
    import halfbyte.models
else:
    import bitsandbytes
began = time.perf_counter()
if sys.argv[1] == "halfbyte":
    model = halfbyte.models.load_model(sys.argv[2])
else:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)
loaded = time.perf_counter() - began
with torch.inference_mode():
    model(torch.tensor([[1, 17, 3, 90]])).logits[0, -1].argmax().item()
print(json.dumps({"load": loaded, "first token": time.perf_counter() - began}))
"""


def cold(program: str, *arguments: str | Path) -> dict[str, float]:
    """What a program prints as JSON on its last line, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def real_model(source: Path, folder: Path) -> dict[str, float]:
    """Bits a quantized parameter and the rate of decoding, of a model with real weights."""
    archive = folder / "real.nf4dq"
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    task = "causal-lm" if architecture.endswith("ForCausalLM") else "encoder"
    quantize_to_archive(source, archive, HalfbyteConfig(), task=task, compress=True)
    packed = Archive(archive)
    names = [name for name, entry in packed.directory.tensors.items() if entry.spec is not None]
    decoded = sum(s.decoded for name in names for s in packed.directory.tensors[name].parts.values() if s.chunk)
    best = float("inf")
    for _ in range(10 * ROUNDS):
        began = time.perf_counter()
        for name in names:
            packed.tensor(name)
        best = min(best, time.perf_counter() - began)
    facts = describe(packed)
    return {
        "real weights, bits a quantized parameter": facts["bits_per_quantized_parameter_uncompressed"],
        "real weights, bits, compressed": facts["bits_per_quantized_parameter"],
        "real weights, decoding, GB/s of decoded bytes": decoded / best / 1e9,
    }


def measure(
    contenders: dict[str, Callable[[], Any]], outputs: dict[str, Path]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, and seconds of CPU time: the best of some rounds of each, in turn.

    What a contender is to write is removed before it, so that all begin with the same memory for pages of files.
    """
    best, busy = dict.fromkeys(contenders, float("inf")), dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for label, call in contenders.items():
            if label in outputs:
                outputs[label].unlink(missing_ok=True)
            began, used = time.perf_counter(), time.process_time()
            call()
            best[label] = min(best[label], time.perf_counter() - began)
            busy[label] = min(busy[label], time.process_time() - used)
    return best, busy


def main() -> None:
    """Measure in turn, the best of some rounds of each, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model", type=Path, help="a folder with real weights")
    options = parser.parse_args()
    layers = options.layers
    with tempfile.TemporaryDirectory() as name:
        folder, plain, compressed = Path(name) / "model", Path(name) / "plain.nf4dq", Path(name) / "compressed.nf4dq"
        write_llama(folder, layers)
        quantize_to_archive(folder, plain, HalfbyteConfig())
        quantize_to_archive(folder, compressed, HalfbyteConfig(), compress=True)
        check(folder, [plain, compressed])
        weights, size, packed = folder / "model.safetensors", plain.stat().st_size, Archive(compressed)
        again, copied = Path(name) / "again.nf4dq", Path(name) / "copy"
        names = [name for name, entry in packed.directory.tensors.items() if entry.spec is not None]
        decoded = sum(s.decoded for name in names for s in packed.directory.tensors[name].parts.values() if s.chunk)

        def open_and_map() -> Any:
            archive = Archive(plain)
            return [archive.tensor(name) for name in archive.directory.tensors]

        contenders: dict[str, Callable[[], Any]] = {
            "read and write the same bytes": lambda: copy(weights, copied, size),
            "quantize to an archive": lambda: quantize_to_archive(folder, again, HalfbyteConfig()),
            "open the archive, map every tensor": open_and_map,
            "check it": Archive(plain).verify,
            "load_model, unchecked": lambda: load_model(plain, verify=False),
            "load_model": lambda: load_model(plain),
            "decode the compressed tensors": lambda: [packed.tensor(name) for name in names],
            "bitsandbytes: load in 4 bits": lambda: bitsandbytes_load(folder),
        }
        best, busy = measure(contenders, {"read and write the same bytes": copied, "quantize to an archive": again})
        facts = describe(packed)
        opened = [cold(COLD_OPEN, plain) for _ in range(ROUNDS)]
        ours = [cold(COLD_TOKEN, "halfbyte", plain) for _ in range(ROUNDS)]
        theirs = [cold(COLD_TOKEN, "bitsandbytes", folder) for _ in range(ROUNDS)]
        real = real_model(options.model, Path(name)) if options.model else {}
    best["a cold process: open, map every tensor"] = min(run["seconds"] for run in opened)
    for label, runs in (("halfbyte", ours), ("bitsandbytes", theirs)):
        best[f"a cold process: {label} loads"] = min(run["load"] for run in runs)
        best[f"a cold process: {label}'s first token"] = min(run["first token"] for run in runs)
    rows = [[label, f"{seconds:.3f}", f"{busy[label]:.3f}" if label in busy else ""] for label, seconds in best.items()]
    print(table(["what", "seconds", "CPU seconds"], rows))
    ratios = {
        "quantizing, bitsandbytes' load over ours": best["bitsandbytes: load in 4 bits"]
        / best["quantize to an archive"],
        "quantizing, over reading and writing": best["quantize to an archive"] / best["read and write the same bytes"],
        "quantizing, over reading and writing, CPU time": busy["quantize to an archive"]
        / busy["read and write the same bytes"],
        "decoding, GB/s of decoded bytes": decoded / best["decode the compressed tensors"] / 1e9,
        "bits a quantized parameter": facts["bits_per_quantized_parameter_uncompressed"],
        "bits, compressed": facts["bits_per_quantized_parameter"],
        "opened and mapped, MB resident": max(run["bytes"] for run in opened) / 1e6,
        **real,
    }
    print(table(["ratio", "value"], [[label, f"{value:.3f}"] for label, value in ratios.items()]))
    finish("archive", {"layers": layers, "bytes": size, "seconds": best, "cpu_seconds": busy, "ratios": ratios})


if __name__ == "__main__":
    main()
