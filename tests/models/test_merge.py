"""Merging an adapter: peft's own result bit for bit on float32, whatever else is asked within its rounding."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models import HalfbyteConfig, Output, Source, load_model, merge_adapter, quantize_to_archive, save_model
from halfbyte.models.archive_reader import Archive
from halfbyte.models.dense_writer import DenseWriter
from halfbyte.tensor import QuantizedTensor

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"]}
ACCEPT_ALL = float("-inf")
# what a person may have trained: family, options of LoraConfig
KINDS = {
    "llama": ("llama", ATTENTION),
    "patterns and rslora": (
        "llama",
        {**ATTENTION, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "conv1d": ("gpt2", GPT2),
    "conv1d, dora": ("gpt2", {**GPT2, "use_dora": True}),
    "opt, lora_bias": ("opt", {**ATTENTION, "lora_bias": True}),
    "opt, all biases": ("opt", {**ATTENTION, "bias": "all"}),
    "qwen2, dora": ("qwen2", {**ATTENTION, "use_dora": True}),
    "embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "mixtral": ("mixtral", ATTENTION),
    "experts": ("mixtral", {**ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tied head": ("llama-tied", ATTENTION),
    "tied head, trained": ("llama-tied", {**ATTENTION, "modules_to_save": ["lm_head"]}),
    "tied head, tokens": ("llama-tied", {**ATTENTION, "trainable_token_indices": [3, 7]}),
}


def train_adapter(base: Path, folder: Path, size: float = 0.02, **options) -> Path:
    """An adapter whose every trained number is random."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, **options}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def llama(folder_of, tmp_path) -> tuple[Path, Path]:
    """A base and an adapter."""
    base = folder_of("llama")
    return base, train_adapter(base, tmp_path / "adapter", target_modules="all-linear")


def merged_by_peft(base, adapter: Path):
    return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_merge_and_unload_bit_for_bit(kind, folder_of, tmp_path):
    family, options = KINDS[kind]
    base = folder_of(family)
    adapter = train_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out"))
    expected = merged_by_peft(AutoModelForCausalLM.from_pretrained(base), adapter)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (family in ("llama-tied", "gpt2", "opt") and "trained" not in kind)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("stored", ["16 bits", "archive", "folder"])
def test_onto_the_decoded_weights(family, stored, folder_of, tmp_path):
    """Whether the base is quantized on the way or was before, the result is what its decoded weights give."""
    base, config = folder_of(family), HalfbyteConfig(scale_bits=None)
    adapter = train_adapter(base, tmp_path / "adapter", **(GPT2 if family == "gpt2" else ATTENTION))
    path = base
    if stored == "archive":
        path = tmp_path / "base.nf4dq"
        quantize_to_archive(base, path, config)
    elif stored == "folder":
        path = save_model(load_model(base, quantization=config), tmp_path / "base")
    merge_adapter(Source(str(path), config if stored == "16 bits" else None), adapter, Output(tmp_path / "out"))
    quantized = load_model(base, quantization=config)
    decoded = AutoModelForCausalLM.from_pretrained(base)
    packed = {n: p for n, p in quantized.named_parameters() if isinstance(p, QuantizedTensor)}
    assert packed
    for name, parameter in packed.items():
        dense = parameter.dequantize(torch.float32)
        target = decoded.get_parameter(name)
        target.data = (dense if dense.shape == target.shape and family != "gpt2" else dense.T).contiguous()
    expected = merged_by_peft(decoded, adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype, llama, tmp_path):
    base, adapter = llama
    report = merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out", dtype))
    expected = merged_by_peft(AutoModelForCausalLM.from_pretrained(base), adapter)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < report["total"]["noise"] < 1


def test_the_share_that_survives_is_the_formula(llama, tmp_path):
    base, adapter = llama
    report = merge_adapter(
        Source(str(base)), adapter, Output(tmp_path / "out.nf4dq", None, HalfbyteConfig(), ACCEPT_ALL)
    )
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(base / "model.safetensors")[name].double()
    delta = merged_by_peft(AutoModelForCausalLM.from_pretrained(base), adapter)[name].double() - before
    after = load_model(tmp_path / "out.nf4dq").get_parameter(name).dequantize(torch.float32).double()
    change = (
        after - load_model(base, quantization=HalfbyteConfig()).get_parameter(name).dequantize(torch.float32).double()
    )
    share = float((change * delta).sum() / (delta * delta).sum())
    noise = float((change - delta).norm() / delta.norm())
    assert report["layers"][name]["surviving_share"] == pytest.approx(share, rel=1e-5)
    assert report["layers"][name]["noise"] == pytest.approx(noise, rel=1e-5)
    assert report["layers"][name]["relative_norm"] == pytest.approx(float(delta.norm() / before.norm()), rel=1e-5)


def test_a_lost_delta_is_refused_and_may_be_accepted(folder_of, tmp_path):
    """Onto decoded weights in their own format: most entries of a small delta go back."""
    base, config = folder_of("llama"), HalfbyteConfig(scale_bits=None)
    adapter = train_adapter(base, tmp_path / "adapter", size=0.002, target_modules="all-linear")
    source, out = Source(str(base), config), tmp_path / "out.nf4dq"
    with pytest.raises(RequestError, match=r"only .*% of the adapter's change would survive .*min-surviving-share"):
        merge_adapter(source, adapter, Output(out, None, config))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    report = merge_adapter(source, adapter, Output(out, None, config, ACCEPT_ALL))
    assert report["total"]["surviving_share"] < 0.5
    dense = merge_adapter(source, adapter, Output(tmp_path / "dense"))
    assert dense["total"]["surviving_share"] == pytest.approx(1)


def test_four_bit_folder_and_archive_hold_the_same(llama, tmp_path, ids):
    base, adapter = llama
    for name in ("out.nf4dq", "out"):
        merge_adapter(Source(str(base)), adapter, Output(tmp_path / name, None, HalfbyteConfig(), ACCEPT_ALL))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    with torch.no_grad():
        assert torch.equal(*(load_model(tmp_path / name)(ids).logits for name in ("out.nf4dq", "out")))
    assert "merge.json" in Archive(tmp_path / "out.nf4dq").directory.files
    assert not list((tmp_path / "out").glob("*.nf4dq"))


def test_shards_are_bounded_and_read_by_safetensors(tmp_path):
    tensors = {f"w{i}": torch.randn(5, 3 + i).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(7)}
    tensors["empty"] = torch.empty(0, 4)
    writer = DenseWriter(tmp_path, tensors, shard_size=150)
    for name in sorted(tensors, reverse=True):
        writer.put(name, tensors[name])
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys() and len(set(index.values())) > 2
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_that_is_missing_or_comes_twice_is_a_bug_that_shows(tmp_path):
    writer = DenseWriter(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    writer.put("a", torch.ones(2))
    with pytest.raises(ValueError, match="comes twice"):
        writer.put("a", torch.ones(2))
    with pytest.raises(ValueError, match="never written, the first is b"):
        writer.finish()


def test_tokenizer_and_generation_config_come_along(tiny_llama, tmp_path):
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 17}))
    adapter = train_adapter(base, tmp_path / "adapter", **ATTENTION)
    (adapter / "chat_template.jinja").write_text("the template of the training")
    for out in (tmp_path / "out", tmp_path / "out.nf4dq"):
        quantization = HalfbyteConfig() if out.suffix else None
        merge_adapter(Source(str(base)), adapter, Output(out, None, quantization, ACCEPT_ALL))
        read = Archive(out).read_file if out.suffix else lambda name: (tmp_path / "out" / name).read_bytes()
        assert json.loads(read("generation_config.json"))["max_new_tokens"] == 17
        assert read("chat_template.jinja") == b"the template of the training"
        assert read("tokenizer.json") == (base / "tokenizer.json").read_bytes()


def change_config(adapter: Path, **keys) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3 cannot be merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(keys, message, llama, tmp_path):
    base, adapter = llama
    change_config(adapter, **keys)
    with pytest.raises(RequestError, match=message):
        merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_adapter_is_dropped(llama, tmp_path):
    base, adapter = llama
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[key].clone()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.9.*no place"):
        merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(CheckpointError, match="lacks"):
        merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out"))


def test_another_base_is_refused(llama, folder_of, tmp_path):
    _, adapter = llama
    for family in ("opt", "gpt2"):
        with pytest.raises(CheckpointError, match=r"does not fit|no place|lacks"):
            merge_adapter(Source(str(folder_of(family))), adapter, Output(tmp_path / "out"))


def test_an_adapter_that_is_not_finite_is_refused(llama, tmp_path):
    base, adapter = llama
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="NaNs detected"):
        merge_adapter(Source(str(base)), adapter, Output(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["out", "out.nf4dq"])
def test_killed_at_random_moments_it_is_whole_or_not_there(name, llama, tmp_path):
    base, adapter = llama
    config = HalfbyteConfig() if name.endswith("q") else None

    def run(path: Path):
        return merge_adapter(Source(str(base)), adapter, Output(path, None, config, ACCEPT_ALL))

    def weights(path: Path) -> bytes:
        return (path if path.is_file() else path / "model.safetensors").read_bytes()

    expected = run(tmp_path / f"whole-{name}")
    began = time.monotonic()
    run(tmp_path / f"timed-{name}")
    length, draw, out, killed = time.monotonic() - began, random.Random(0), tmp_path / name, 0
    for _ in range(6):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            run(out)
            os._exit(0)
        time.sleep(draw.uniform(0, 1.2 * length))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if out.exists():
            assert weights(out) == weights(tmp_path / f"whole-{name}")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert killed > 0
    assert run(out)["total"] == expected["total"]
    assert weights(out) == weights(tmp_path / f"whole-{name}")
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{name}.")]
    assert left == []
    before = weights(out), out.stat().st_mtime_ns
    assert run(out)["total"] == expected["total"]  # finished: not done again
    assert (weights(out), out.stat().st_mtime_ns) == before
