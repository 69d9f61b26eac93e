"""LoRA adapters as GGUF: the same change of every matrix, by llama.cpp's formula, or refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from halfbyte.errors import CheckpointError, RequestError

gguf = pytest.importorskip("gguf")

from halfbyte.models.gguf import ARCHITECTURES, export_adapter  # noqa: E402
from halfbyte.models.gguf.architectures import Sizes, locate  # noqa: E402

TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def train(folder, path, **options):
    """An adapter of random numbers on a model, saved by peft; returns the model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return model.eval()


def deltas(path):
    """What llama.cpp adds to each matrix: alpha / rank * B @ A, the rank being that of the pair."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.removesuffix("a") + "b"]
            # The rows of an embedding's A are looked up; of any other, multiplied.
            found[name.removesuffix(".lora_a")] = alpha / b.shape[1] * (a @ b.T if "token_embd" in name else b @ a)
    return found, reader


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora-ranks", "embedding-and-head"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_file_says_what_peft_adds(gguf_folder, tmp_path, family, options):
    if family == "gemma3" and "target_modules" in options:
        options = {"target_modules": [*TARGETS, "embed_tokens"]}  # its head is tied
    model = train(gguf_folder(family), tmp_path / "adapter", **options)
    written = export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    found, reader = deltas(tmp_path / "adapter.gguf")
    architecture = ARCHITECTURES[type(model.get_base_model()).__name__]
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    assert values["general.architecture"] == architecture.name
    sizes, expected = Sizes.of(model.get_base_model().config), {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            delta, order = module.get_delta_weight("default"), sizes.order(f"{name}.weight")
            reordered = architecture.interleaved and order is not None
            expected[locate(f"{name}.weight", architecture)[0]] = delta[order] if reordered else delta
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, rtol=1e-5, atol=1e-6), name
    assert bool(written.notes) == ("rank_pattern" in options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora: true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias: "all"'),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa'"),
    ],
)
def test_more_than_a_and_b_is_refused_by_name(gguf_folder, tmp_path, options, said):
    train(gguf_folder("llama"), tmp_path / "adapter", **options)
    with pytest.raises(RequestError, match=said):
        export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_pair_for_a_tied_head_is_refused(gguf_folder, tmp_path):
    train(gguf_folder("qwen3"), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        RequestError, match=r"a pair for lm_head, and llama\.cpp's graph has no place for a head that is tied"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")


def test_the_wrong_base_half_a_pair_and_no_base(gguf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    train(gguf_folder("qwen3"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"pair for model\.layers\.0.* its base has \(32, 64\)"):
        export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", gguf_folder("qwen2"))
    export_adapter(tmp_path / "adapter", tmp_path / "whole.gguf", gguf_folder("qwen3"), "f16")

    half = shutil.copytree(tmp_path / "adapter", tmp_path / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    gone = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, half / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only one of A and B"):
        export_adapter(half, tmp_path / "adapter.gguf")
    save_file(tensors | {"base_model.model.model.norm.weight": np_ones()}, half / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"model\.norm\.weight, which a GGUF adapter has no place for"):
        export_adapter(half, tmp_path / "adapter.gguf")

    config = json.loads((half / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not name its base"):
        export_adapter(half, tmp_path / "adapter.gguf")
    (half / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json holds a list, not an object"):
        export_adapter(half, tmp_path / "adapter.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        export_adapter(tmp_path / "nowhere", tmp_path / "adapter.gguf")


def np_ones() -> torch.Tensor:
    return torch.from_numpy(np.ones(64, dtype=np.float32))
