"""Folders for other programs: dense ones for transformers, 4-bit ones for bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import FormatError, OutputError
from halfbyte.models import quantize_to_archive
from halfbyte.models.export import export_bitsandbytes, export_safetensors

CONFIG = {"block_size": 32}


@pytest.mark.parametrize("stored", ["dense", "folder", "archive"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3", "mixtral"])
def test_a_dense_folder_is_what_transformers_loads(folder_of, ids, tmp_path, family, stored):
    from transformers import AutoModelForCausalLM

    source = folder_of(family)
    model = hb.load_model(source, quantization=None if stored == "dense" else hb.HalfbyteConfig(**CONFIG))
    if stored != "dense":
        source = tmp_path / ("model.nf4dq" if stored == "archive" else "model")
        hb.save_model(model, source)
    assert export_safetensors(source, tmp_path / "out") == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any(isinstance(parameter, hb.QuantizedTensor) for parameter in again.parameters())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # GPT-2's layers add their bias at another moment, and transformers' experts multiply in another order.
    assert torch.allclose(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    if stored == "dense":
        before = AutoModelForCausalLM.from_pretrained(source).state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_dense_folder_in_another_dtype(folder_of, tmp_path):
    export_safetensors(folder_of("llama"), tmp_path / "out", torch.bfloat16)
    assert hb.load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("stored", ["dense", "archive"])
def test_a_bitsandbytes_folder_has_the_archives_bytes(folder_of, ids, tmp_path, stored):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    source = folder_of("llama")
    model = hb.load_model(source, quantization=hb.HalfbyteConfig())
    if stored == "archive":
        source = tmp_path / "model.nf4dq"
        hb.save_model(model, source)
    report = export_bitsandbytes(source, tmp_path / "out")
    assert report.quantized == model.halfbyte_report.quantized
    again = hb.load_model(tmp_path / "out")
    packed = {name: p for name, p in model.named_parameters() if isinstance(p, hb.QuantizedTensor)}
    assert packed and all(again.get_parameter(name).same_bytes(weight) for name, weight in packed.items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"format": "int4"}), ("llama", {"scale_bits": 6}), ("mixtral", {})]
)
def test_what_bitsandbytes_has_no_name_for_is_refused(folder_of, tmp_path, family, options):
    model = hb.load_model(folder_of(family), quantization=hb.HalfbyteConfig(**CONFIG, **options))
    hb.save_model(model, tmp_path / "model.nf4dq")
    with pytest.raises(FormatError, match="parts that bitsandbytes cannot read"):
        export_bitsandbytes(tmp_path / "model.nf4dq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(folder_of, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        export_safetensors(folder_of("llama"), tmp_path)


# What somebody runs who has never heard of halfbyte: a process in which it cannot be imported.
STOCK = """
import sys
sys.modules["halfbyte"] = None
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert sum(isinstance(module, Linear4bit) for module in base.modules()) == 14
# In eval mode bitsandbytes' CPU layers repack their weights and compute in bfloat16.
model = PeftModel.from_pretrained(base, sys.argv[2]).train()
ids = torch.tensor([[5, 17, 3, 90, 44, 8, 61], [7, 7, 2, 31, 95, 12, 0]])
with torch.no_grad():
    logits = model(ids).logits
    with model.disable_adapter():
        save_file({"logits": logits, "base": model(ids).logits}, sys.argv[3])
"""


def test_stock_transformers_peft_and_bitsandbytes_answer_as_halfbyte_does(ids, tmp_path):
    """A model quantized and an adapter made here, taken to a machine without halfbyte."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    archive, folder, adapter = tmp_path / "model.nf4dq", tmp_path / "bnb", tmp_path / "adapter"
    # bitsandbytes' CPU layers need rows of whole blocks when they answer.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, initializer_range=0.2, **sizes)).save_pretrained(tmp_path / "dense")
    quantize_to_archive(tmp_path / "dense", archive, hb.HalfbyteConfig())
    export_bitsandbytes(archive, folder)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(hb.load_model(archive, dtype=torch.float32), lora).save_pretrained(adapter)
    model = PeftModel.from_pretrained(hb.load_model(archive, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    arguments = [str(folder), str(adapter), str(tmp_path / "theirs")]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    theirs = load_file(tmp_path / "theirs")
    # The same decoded weights and float32 sums in other orders.
    torch.testing.assert_close(theirs["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["base"], base, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.1
