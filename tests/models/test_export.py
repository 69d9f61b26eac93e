"""Folders for other programs: dense ones for transformers, 4-bit ones for bitsandbytes."""

from __future__ import annotations

import json

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import FormatError, OutputError
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
