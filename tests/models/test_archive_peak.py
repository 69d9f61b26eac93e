"""Quantizing into an archive or a folder holds one tensor at a time: neither the model nor its quantized form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, FFN, LAYERS, VOCAB = 1024, 4096, 24, 16_000
LARGEST = VOCAB * HIDDEN * 2  # bytes of the embedding in bfloat16
# What is beside the largest tensor: its checksum's and quantizer's buffers, the directory, what the allocator keeps.
ALLOWANCE = 50_000_000

QUANTIZE = """
import json, re, sys
import transformers.models.llama.modeling_llama
import halfbyte.models

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

idle = status("VmRSS")
quantize = halfbyte.models.quantize_to_archive if sys.argv[2].endswith(".nf4dq") else halfbyte.models.quantize_to_folder
report = quantize(sys.argv[1], sys.argv[2], halfbyte.models.HalfbyteConfig())
print(json.dumps({"peak": status("VmHWM") - idle, "nbytes": report.nbytes, "total": report.total}))
"""


def write_llama(folder: Path) -> None:
    """A 400 M random Llama in bfloat16, one shard a layer."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    weight_map: dict[str, str] = {}

    def shard(file: str, prefix: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {prefix + name: torch.empty(shape, dtype=torch.bfloat16).uniform_() for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": (HIDDEN, FFN)}
    layer |= {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shard("ends.safetensors", "", {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)})
    shard("embed.safetensors", "model.", {"embed_tokens.weight": (VOCAB, HIDDEN)})
    for index in range(LAYERS):
        shard(f"layer-{index}.safetensors", f"model.layers.{index}.", layer)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_llama(folder)
    yield folder
    shutil.rmtree(folder)  # a gigabyte that pytest would keep for three runs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM, which Linux has")
@pytest.mark.parametrize("name", ["a.nf4dq", "a"])
def test_a_400_m_llama_is_quantized_in_less_memory_than_its_quantized_size(source, tmp_path, name):
    output = tmp_path / name
    try:
        done = subprocess.run(
            [sys.executable, "-c", QUANTIZE, str(source), str(output)], capture_output=True, text=True, check=True
        )
        weights = list(output.glob("*.safetensors")) if output.is_dir() else [output]
        written = sum(file.stat().st_size for file in weights)
    finally:
        for file in output.iterdir() if output.is_dir() else [output]:
            file.unlink(missing_ok=True)
    found = json.loads(done.stdout)
    assert 390e6 < found["total"] < 450e6
    assert found["peak"] <= LARGEST + ALLOWANCE, found
    assert min(written, found["nbytes"]) > 1.7 * (LARGEST + ALLOWANCE)  # who holds the quantized model cannot pass
