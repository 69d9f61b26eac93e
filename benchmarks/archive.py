"""The archive's times, beside what the disk and bitsandbytes take: quantizing, opening, checking, loading.

    python benchmarks/archive.py [--layers N]

A random Llama of 399 M parameters (6 layers) in bfloat16. Before anything is timed, the archive, compressed or not, is
compared with the model that loading quantizes: bit for bit. Random weights compress less than real ones.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _assets import finish, table

from halfbyte.models import Archive, HalfbyteConfig, describe, load_model, quantize_to_archive
from halfbyte.tensor import QuantizedTensor

ROUNDS = 3


def make_model(folder: Path, layers: int) -> None:
    """A random Llama, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)


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


def main() -> None:
    """Measure in turn, the best of some rounds of each, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        folder, plain, compressed = Path(name) / "model", Path(name) / "plain.nf4dq", Path(name) / "compressed.nf4dq"
        make_model(folder, layers)
        quantize_to_archive(folder, plain, HalfbyteConfig())
        quantize_to_archive(folder, compressed, HalfbyteConfig(), compress=True)
        check(folder, [plain, compressed])
        weights, size, packed = folder / "model.safetensors", plain.stat().st_size, Archive(compressed)
        names = [name for name, entry in packed.directory.tensors.items() if entry.spec is not None]
        decoded = sum(s.decoded for name in names for s in packed.directory.tensors[name].parts.values() if s.chunk)

        def open_and_map() -> Any:
            archive = Archive(plain)
            return [archive.tensor(name) for name in archive.directory.tensors]

        contenders: dict[str, Callable[[], Any]] = {
            "read and write the same bytes": lambda: copy(weights, Path(name) / "copy", size),
            "quantize to an archive": lambda: quantize_to_archive(folder, plain, HalfbyteConfig()),
            "open the archive, map every tensor": open_and_map,
            "check it": Archive(plain).verify,
            "load_model, unchecked": lambda: load_model(plain, verify=False),
            "load_model": lambda: load_model(plain),
            "decode the compressed tensors": lambda: [packed.tensor(name) for name in names],
            "bitsandbytes: load in 4 bits": lambda: bitsandbytes_load(folder),
        }
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(ROUNDS):
            for label, call in contenders.items():
                began = time.perf_counter()
                call()
                best[label] = min(best[label], time.perf_counter() - began)
        facts = describe(packed)
    print(table(["what", "seconds"], [[label, f"{seconds:.3f}"] for label, seconds in best.items()]))
    ratios = {
        "quantizing, bitsandbytes' load over ours": best["bitsandbytes: load in 4 bits"]
        / best["quantize to an archive"],
        "quantizing, over reading and writing": best["quantize to an archive"] / best["read and write the same bytes"],
        "decoding, GB/s of decoded bytes": decoded / best["decode the compressed tensors"] / 1e9,
        "bits a quantized parameter": facts["bits_per_quantized_parameter_uncompressed"],
        "bits, compressed": facts["bits_per_quantized_parameter"],
    }
    print(table(["ratio", "value"], [[label, f"{value:.3f}"] for label, value in ratios.items()]))
    finish("archive", {"layers": layers, "bytes": size, "seconds": best, "ratios": ratios})


if __name__ == "__main__":
    main()
