"""GGUF files, read back by two readers that are not ours: the gguf package and transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import halfbyte as hb
from halfbyte.errors import CheckpointError, OutputError, RequestError

gguf = pytest.importorskip("gguf")

from halfbyte.models.gguf import TYPES, export_gguf  # noqa: E402

# Those that transformers' reader knows whole; it leaves out the biases of "llama".
FAMILIES = ["llama-tied-linear", "llama3", "mistral", "qwen2", "qwen2-yarn", "qwen3", "gemma2", "gemma3"]


def read(path):
    """Metadata by key, and tensors by name as (type, values in float32)."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type.name.lower(), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return values, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model_back(gguf_folder, tmp_path, family):
    """Its reader undoes the order of q and k, the 1 in Gemma's norms and the names."""
    from transformers import AutoModelForCausalLM

    export_gguf(gguf_folder(family), tmp_path / "model.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(gguf_folder(family)).eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        # 1 + weight - 1 rounds to the spacing of floats near 1 to 2.
        assert torch.allclose(state[name], tensor, rtol=0, atol=2**-22 if "norm" in name else 0), name


@pytest.mark.parametrize("type", TYPES)
def test_every_type_holds_what_the_gguf_package_rounds_to(gguf_folder, tmp_path, type):
    written = export_gguf(gguf_folder("qwen3"), tmp_path / "model.gguf", type)
    values, tensors = read(tmp_path / "model.gguf")
    state = hb.load_model(gguf_folder("qwen3")).state_dict()
    kind = getattr(gguf.GGMLQuantizationType, type.upper())
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        stored, found = tensors[f"blk.1.{ours}.weight"]
        dense = state[f"model.layers.1.{theirs}.weight"].numpy()
        assert stored == type
        assert np.array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(dense, kind), kind))
    assert tensors["blk.0.attn_norm.weight"][0] == "f32"
    assert "output.weight" not in tensors  # tied
    assert values["general.file_type"] == gguf.LlamaFileType[TYPES[type]]
    assert written.types[type] == sum(stored == type for stored, _ in tensors.values())
    assert written.nbytes == (tmp_path / "model.gguf").stat().st_size
    everything = np.concatenate([dense.ravel() for name, dense in _matrices(state)])
    rounded = np.concatenate([tensors[_place(name)][1].ravel() for name, _ in _matrices(state)])
    if type != "f32":
        error = np.sqrt(np.mean((everything - rounded) ** 2) / np.mean(everything**2))
        assert written.loss[type] == pytest.approx(error, rel=1e-3)


def _matrices(state):
    return [(name, dense.numpy()) for name, dense in state.items() if dense.dim() == 2 and name != "lm_head.weight"]


def _place(name: str) -> str:
    from halfbyte.models.gguf.architectures import ARCHITECTURES, locate

    return locate(name, ARCHITECTURES["Qwen3ForCausalLM"])[0]


@pytest.mark.parametrize("stored", ["bitsandbytes", "halfbyte", "archive"])
def test_a_4_bit_model_goes_out_as_its_decoded_values(gguf_folder, tmp_path, stored):
    """In pieces: the same numbers as decoding each tensor whole."""
    config = hb.HalfbyteConfig(block_size=32, scale_bits=6 if stored == "halfbyte" else 8)
    model = hb.load_model(gguf_folder("qwen2"), quantization=config)
    source = tmp_path / ("model.nf4dq" if stored == "archive" else "model")
    hb.save_model(model, source, hb.load_tokenizer(gguf_folder("qwen2")))
    written = export_gguf(source, tmp_path / "model.gguf", "f32")
    _, tensors = read(tmp_path / "model.gguf")
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("ffn_up", "mlp.up_proj")):
        dense = model.get_parameter(f"model.layers.0.{theirs}.weight").dequantize(torch.float32)
        assert np.array_equal(tensors[f"blk.0.{ours}.weight"][1], dense.numpy())
    assert "nf4" in written.notes[-1] and "14 tensors" in written.notes[-1]


def test_biases_of_a_llama_go_out_in_the_order_of_their_rows(gguf_folder, tmp_path):
    export_gguf(gguf_folder("llama"), tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    state = {name: tensor.numpy() for name, tensor in hb.load_model(gguf_folder("llama")).state_dict().items()}
    for ours, theirs in (
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_up", "mlp.up_proj"),
    ):
        assert np.array_equal(tensors[f"blk.1.{ours}.bias"][1], state[f"model.layers.1.{theirs}.bias"])
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        halves = state[f"model.layers.1.self_attn.{theirs}.bias"].reshape(heads, 2, 8)
        assert np.array_equal(tensors[f"blk.1.{ours}.bias"][1], np.stack([halves[:, 0], halves[:, 1]], -1).ravel())


def test_rows_that_are_not_whole_blocks_stay_f16(tmp_path, gguf_folder):
    folder = _changed(gguf_folder("llama"), tmp_path / "odd", intermediate_size=80)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.\w+ as \(.*96.*\), and the config says \(.*80.*\)"):
        export_gguf(folder, tmp_path / "model.gguf")
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    written = export_gguf(folder, tmp_path / "model.gguf", "q4_0")
    _, tensors = read(tmp_path / "model.gguf")
    assert {name for name, (kind, _) in tensors.items() if kind == "f16"} == {
        f"blk.{layer}.ffn_down.weight" for layer in range(2)
    }
    assert "2 matrices have rows that are not whole blocks of q4_0 and are f16" in written.notes


def test_the_numbers_that_the_graph_is_built_from(gguf_folder, tmp_path):
    export_gguf(gguf_folder("gemma3"), tmp_path / "model.gguf")
    values, tensors = read(tmp_path / "model.gguf")
    assert values["general.architecture"] == "gemma3" and values["general.type"] == "model"
    expected = {
        "block_count": 7,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.sliding_window": 8,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "vocab_size": tensors["token_embd.weight"][1].shape[0],
    }
    assert {key: values[f"gemma3.{key}"] for key in expected} == expected
    assert "gemma3.attention.sliding_window_pattern" not in values  # the graph's own


def _changed(folder, target, **changes):
    """A copy of a folder whose config.json says something else."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"architectures": ["LLamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'"),
        ("llama", {"architectures": None}, "does not name its architecture"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "softcapping is unset"),
        ("llama", {"num_hidden_layers": 1}, "tensor model.layers.1."),
        (
            "llama",
            {"num_hidden_layers": 3},
            "lacks 9 tensors of the model, the first is model.layers.2.input_layernorm",
        ),
    ],
)
def test_what_the_graph_does_not_compute_is_refused_by_name(gguf_folder, tmp_path, family, changes, said):
    folder = _changed(gguf_folder(family), tmp_path / "changed", **changes)
    with pytest.raises(RequestError, match=said):
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_a_place_is_refused_by_name(gguf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(gguf_folder("llama"), tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight has no place"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_values_beyond_half_precision_are_refused_by_name_and_leave_nothing(gguf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(gguf_folder("llama"), tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.up_proj\.weight holds values up to 1e\+05"):
        export_gguf(folder, out / "model.gguf", "f16")
    assert not list(out.iterdir())
    export_gguf(folder, out / "model.gguf", "bf16")


def test_a_file_that_exists_and_a_type_that_does_not(gguf_folder, tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists; name a new file"):
        export_gguf(gguf_folder("llama"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    with pytest.raises(RequestError, match="did you mean 'q8_0'"):
        export_gguf(gguf_folder("llama"), tmp_path / "new.gguf", "q8")


def test_a_sliding_window_that_is_left_out_is_told(gguf_folder, tmp_path):
    folder = _changed(gguf_folder("mistral"), tmp_path / "window", sliding_window=32)
    assert "up to 32 tokens" in export_gguf(folder, tmp_path / "model.gguf").notes[-1]


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_that_is_said_to_be_tied(gguf_folder, tmp_path, same):
    """transformers uses what is stored where it differs, and so does the file."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(gguf_folder("llama-tied-linear"), tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "model.gguf")
    assert ("output.weight" in read(tmp_path / "model.gguf")[1]) == (not same)
