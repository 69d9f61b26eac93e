"""Every way a model folder can be wrong: one sentence that names the thing, found before anything else happens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte.errors import CheckpointError, FormatError, RequestError
from halfbyte.models import check_model_folder, open_checkpoint

INDEX = "model.safetensors.index.json"


def refused(folder, *expected: str, error=CheckpointError, **options) -> str:
    """Loading fails with one sentence that holds every expected part; returns it."""
    options.setdefault("quantization", hb.HalfbyteConfig(block_size=32))
    with pytest.raises(error) as caught:
        hb.load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for part in expected:
        assert part in message
    return message


def rewrite(folder, change) -> None:
    """Change the tensors of a one-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def shards(llama_copy):
    """The Llama in three shards, named by hand."""
    tensors = load_file(llama_copy / "model.safetensors")
    (llama_copy / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{1 + 3 * at // len(names)}.safetensors" for at, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, llama_copy / shard)
    (llama_copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return llama_copy


def edit_map(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# ------------------------------------------------------------------------------------------------------- the folder
def test_no_such_folder_names_the_nearest(llama_copy):
    refused(llama_copy.with_name("lama"), "lama is not a folder; did you mean 'llama'?")
    refused(llama_copy / "config.json", "config.json is not a folder")


def test_no_config(llama_copy):
    (llama_copy / "config.json").unlink()
    refused(llama_copy, f"{llama_copy} has no config.json")


def test_an_adapter_folder_is_told_apart(llama_copy):
    (llama_copy / "config.json").rename(llama_copy / "adapter_config.json")
    refused(llama_copy, "it is an adapter; name its base model")


@pytest.mark.parametrize("text", ["{", "", "[1]", "\x00", "null"])
def test_a_config_that_is_no_json_object(llama_copy, text):
    (llama_copy / "config.json").write_text(text)
    refused(llama_copy, str(llama_copy / "config.json"))


@pytest.mark.parametrize("changes", [{"model_type": "lama"}, {"model_type": None}])
def test_an_unknown_model_type(llama_copy, changes):
    config(llama_copy, **changes)
    refused(llama_copy, str(llama_copy / "config.json"))


def test_an_unknown_quant_method(llama_copy):
    config(llama_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(llama_copy, "is quantized by 'gptq'; halfbyte reads bitsandbytes' and its own")


def test_an_unknown_option_of_our_own_method(llama_copy):
    config(llama_copy, quantization_config={"quant_method": "halfbyte", "blocksize": 64})
    refused(llama_copy, "did you mean 'block_size'", error=FormatError)


def test_an_unknown_task_names_the_nearest(llama_copy):
    refused(llama_copy, "did you mean 'causal-lm'", error=RequestError, task="causal_lm")


def test_a_task_that_the_family_does_not_have(folder_of):
    refused(folder_of("bert"), "lacks", task="causal-lm")


# -------------------------------------------------------------------------------------------------------- the shards
def test_no_weights_at_all(llama_copy):
    (llama_copy / "model.safetensors").unlink()
    refused(llama_copy, "has no weights: neither model.safetensors nor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickles_are_never_read(llama_copy, name):
    (llama_copy / "model.safetensors").rename(llama_copy / name)
    refused(llama_copy, f"as a pickle ({name}), which can run code and is never read")


def test_a_missing_shard(shards):
    (shards / "part-2.safetensors").unlink()
    refused(shards, "lacks 1 of 3 shards, the first is part-2.safetensors")


@pytest.mark.parametrize(
    "index",
    [
        json.dumps({"weight_map": {"k": "x" * 3000}}).encode(),
        json.dumps({"weight_map": {"k": "a/" + "x" * 3000}}).encode(),
        json.dumps({"weight_map": {"k": "two\nlines"}}).encode(),
        json.dumps({"weight_map": {"k": "\ud800"}}).encode(),
        b'{"weight_map": "' + b"\xff" * 3000,
    ],
)
def test_what_an_index_says_is_quoted_in_one_short_line(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 1100 and said.encode()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(shards, keep):
    shard = shards / "part-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(shards, f"{shard} is truncated or damaged")
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors"):
        check_model_folder(shards)


@pytest.mark.parametrize("name", ["../part-2.safetensors", "/etc/passwd", "sub/part.safetensors"])
def test_an_index_that_names_a_path_outside(shards, name):
    edit_map(shards, lambda weights: weights.update({"lm_head.weight": name}))
    message = refused(shards, f"names the shard {name!r}, which is outside the folder")
    assert "CheckpointError" not in message


def test_an_index_that_promises_what_a_shard_does_not_hold(shards):
    edit_map(shards, lambda weights: weights.update({"extra.weight": "part-1.safetensors"}))
    refused(shards, "part-1.safetensors lacks extra.weight")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "[]"])
def test_a_damaged_index(shards, text):
    (shards / INDEX).write_text(text)
    refused(shards, f"{INDEX} is damaged")


def test_headers_are_read_and_no_weights(shards, monkeypatch):
    """A folder is checked in full before the first weight is read."""
    from halfbyte.models.checkpoint import LazyTensor

    monkeypatch.setattr(LazyTensor, "read", lambda self: pytest.fail("a weight was read"))
    checkpoint = open_checkpoint(shards)
    assert checkpoint["lm_head.weight"].shape == (96, 32) and checkpoint["lm_head.weight"].nbytes == 96 * 32 * 4


# ------------------------------------------------------------------------------------------------------- the weights
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_name_the_tensor(llama_copy, name, bad):
    rewrite(llama_copy, lambda tensors: tensors[name].view(-1)[7].fill_(bad))
    refused(llama_copy, name, "NaN or Inf")


def test_nan_in_an_expert_names_the_tensor(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("mixtral"), tmp_path / "mixtral")
    name = next(key for key in load_file(folder / "model.safetensors") if "experts.2" in key)
    rewrite(folder, lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")))
    refused(folder, name, "NaN or Inf")


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "encoder"])
def test_a_missing_weight_is_named_and_not_made_up(llama_copy, task):
    """A classifier may be new; a layer that silently starts at random must not be."""
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(llama_copy, lambda tensors: tensors.pop(name))
    refused(llama_copy, "lacks 1 weights", "layers.1.mlp.up_proj.weight", task=task)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_of_another_shape_is_named(llama_copy, name):
    """transformers checks the shapes of dense weights only; a packed one would load and fail in the first product."""
    rewrite(llama_copy, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(llama_copy, name)


def test_a_packed_weight_of_another_shape_is_named(packed_folder):
    from halfbyte.tensor import flatten

    rewrite(packed_folder, lambda tensors: tensors.update(flatten(UP, hb.quantize(torch.randn(32, 48), "nf4", 32))))
    refused(packed_folder, UP, "stored as (32, 48), and the model's is (48, 32)", quantization=None)


# ------------------------------------------------------------------------------------------------- packed and damaged
@pytest.fixture
def packed_folder(folder_of, tmp_path):
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32))
    return hb.save_model(model, tmp_path / "packed")


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(f"{UP}.absmax"),
        lambda tensors: tensors.pop(f"{UP}.nested_absmax"),
        lambda tensors: tensors.pop(STATE),
        lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}),
        lambda tensors: tensors[f"{UP}.quant_map"].add_(0.01),
        lambda tensors: tensors[STATE].fill_(0),
        lambda tensors: tensors[f"{UP}.nested_absmax"].fill_(float("nan")),
    ],
)
def test_damaged_packed_weights_are_named(packed_folder, change):
    rewrite(packed_folder, change)
    refused(packed_folder, UP, quantization=None)


def test_a_4_bit_config_over_dense_weights(llama_copy):
    config(llama_copy, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(llama_copy, "says it is 4-bit bitsandbytes and holds no packed weight", quantization=None)


def test_packed_weights_under_a_dense_config(packed_folder):
    """The bytes of codes must not pass for weights."""
    declared = json.loads((packed_folder / "config.json").read_text())
    del declared["quantization_config"]
    (packed_folder / "config.json").write_text(json.dumps(declared))
    refused(packed_folder, "proj.weight.quant_state.bitsandbytes__nf4, and its config.json has no quantization_config")


def test_no_tokenizer_is_one_sentence(llama_copy):
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read") as caught:
        hb.load_tokenizer(llama_copy)
    assert "\n" not in str(caught.value)
