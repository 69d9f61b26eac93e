"""Load, use, save and load again: every family, every task, through halfbyte and through transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import FormatError, RequestError
from halfbyte.models import quantize_to_archive

CAUSAL = ["llama", "llama-tied", "gpt2", "opt", "qwen2", "qwen3", "mixtral", "gemma"]
CONFIG = {"block_size": 32}


def packed(model) -> dict[str, hb.QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, hb.QuantizedTensor)}


def decoded_twin(folder, model, task="AutoModelForCausalLM"):
    """The same model loaded dense by transformers, its quantized weights replaced by the decoded ones."""
    import transformers

    twin = getattr(transformers, task).from_pretrained(folder).eval()
    for name, weight in packed(model).items():
        target, dense = twin.get_parameter(name).data, weight.dequantize()
        target.copy_(dense if target.shape == dense.shape and not _is_conv1d(twin, name) else dense.T)
    if packed(model) and hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin


def _is_conv1d(model, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_loads_runs_and_round_trips(folder_of, ids, tmp_path, family):
    model = hb.load_model(folder_of(family), quantization=hb.HalfbyteConfig(**CONFIG))
    logits = model(ids).logits
    twin = decoded_twin(folder_of(family), model)
    if family in ("gpt2", "mixtral"):  # the bias, and an expert's share, are put in at another moment
        assert torch.allclose(logits, twin(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, twin(ids).logits)
    assert not model.training and all(not p.requires_grad for p in packed(model).values())

    hb.save_model(model, tmp_path / "saved")
    again = hb.load_model(tmp_path / "saved")
    assert torch.equal(again(ids).logits, logits)
    assert packed(again).keys() == packed(model).keys()
    assert all(weight.same_bytes(packed(model)[name]) for name, weight in packed(again).items())
    hb.save_model(again, tmp_path / "twice")  # and what was loaded can be saved
    assert torch.equal(hb.load_model(tmp_path / "twice")(ids).logits, logits)


def test_a_16_bit_model_keeps_its_float32_scales_when_it_is_loaded_again(folder_of, ids, tmp_path):
    """transformers casts every floating key to the model's dtype unless the load operation says that it handles it."""
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(**CONFIG), dtype=torch.bfloat16)
    hb.save_model(model, tmp_path / "saved")
    again = hb.load_model(tmp_path / "saved")
    assert all(weight.same_bytes(packed(model)[name]) for name, weight in packed(again).items())
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_report_counts_what_is_there(folder_of, family):
    """Trap 9: Mixtral's experts are 3-D parameters, GPT-2's layers are no nn.Linear."""
    model = hb.load_model(folder_of(family), quantization=hb.HalfbyteConfig(**CONFIG))
    report = model.halfbyte_report
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.quantized == sum(p.numel() for p in packed(model).values())
    # Every matrix is packed, or listed with its reason (a tied head is listed too, and counts once).
    dense = {name for name, p in model.named_parameters() if p.dim() > 1 and not isinstance(p, hb.QuantizedTensor)}
    assert dense == set(report.skipped) & dict(model.named_parameters()).keys()
    reasons = {reason for reason in report.skipped.values() if "Router" not in reason}
    assert reasons == {"embedding", "output layer"}
    head = model.get_output_embeddings().weight
    assert type(head) is nn.Parameter


def test_mixtrals_experts_are_quantized_and_frozen(folder_of, ids):
    model = hb.load_model(folder_of("mixtral"), quantization=hb.HalfbyteConfig(**CONFIG))
    experts = {name: weight for name, weight in packed(model).items() if weight.dim() == 3}
    assert len(experts) == 4 and all(weight.shape[0] == 3 for weight in experts.values())
    embeddings = model.get_input_embeddings().weight
    model(ids).logits.sum().backward()
    assert embeddings.grad is not None and all(weight.grad is None for weight in experts.values())


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_tied_head_stays_tied(folder_of, ids, tmp_path, embeddings):
    """Trap 6, also across a save; with quantized embeddings, head and table are one quantized tensor."""
    config = hb.HalfbyteConfig(**CONFIG, quantize_embeddings=embeddings)
    model = hb.load_model(folder_of("llama-tied"), quantization=config)
    hb.save_model(model, tmp_path / "saved")
    again = hb.load_model(tmp_path / "saved")
    streamed = quantize_to_archive(folder_of("llama-tied"), tmp_path / "streamed.nf4dq", config)
    assert streamed == model.halfbyte_report
    kept = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output layer"}
    assert streamed.skipped == ({} if embeddings else kept)
    for each in (model, again):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert isinstance(each.lm_head.weight, hb.QuantizedTensor) is embeddings
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("format", "scale_bits"), [("int4", 8), ("int8", None), ("e2m1", 6), ("nf4", 4)])
def test_what_bitsandbytes_cannot_read_has_a_layout_of_its_own(folder_of, ids, tmp_path, format, scale_bits):
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(format, 64, scale_bits))
    hb.save_model(model, tmp_path / "saved")
    declared = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == "halfbyte" and declared["format"] == format
    assert torch.equal(hb.load_model(tmp_path / "saved")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_transformers_own_way_in_and_out(folder_of, ids, tmp_path, format):
    from transformers import AutoModelForCausalLM

    config = hb.HalfbyteConfig(format)
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama"), quantization_config=config).eval()
    reference = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(format))
    logits = model(ids).logits
    assert torch.equal(logits, reference(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(hb.load_model(tmp_path / "saved")(ids).logits, logits)
    if format == "int4":  # nf4 is written for bitsandbytes, whose loader transformers would take
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compute_dtype_and_model_dtype(folder_of, ids, compute, dtype):
    config = hb.HalfbyteConfig(compute_dtype=compute)
    model = hb.load_model(folder_of("llama"), quantization=config, dtype=dtype)
    assert model.dtype == dtype and model.model.layers[0].mlp.up_proj.compute_dtype == getattr(torch, compute)
    assert all(weight.dtype == dtype for weight in packed(model).values())
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_sharded_folders(folder_of, ids, tmp_path, family):
    task = "encoder" if family == "bert" else "causal-lm"
    whole = hb.load_model(folder_of(family), task=task)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    models = [
        hb.load_model(folder, task=task, quantization=hb.HalfbyteConfig(**CONFIG))
        for folder in (folder_of(family), tmp_path / "shards")
    ]
    assert torch.equal(models[0](ids)[0], models[1](ids)[0])
    hb.save_model(models[1], tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    assert torch.equal(hb.load_model(tmp_path / "packed", task=task)(ids)[0], models[0](ids)[0])


@pytest.mark.parametrize(("family", "head"), [("llama", "score"), ("opt", "score"), ("bert", "classifier")])
def test_a_new_classification_head_is_trainable_and_not_quantized(folder_of, ids, family, head):
    options = {"task": "sequence-classification", "num_labels": 3}
    model = hb.load_model(folder_of(family), **options, quantization=hb.HalfbyteConfig(**CONFIG))
    model.config.pad_token_id = 0
    weight = model.get_submodule(head).weight
    assert type(weight) is nn.Parameter and weight.requires_grad and weight.isfinite().all() and weight.any()
    assert model.halfbyte_report.skipped[f"{head}.weight"] == "output layer"
    model(ids).logits.sum().backward()
    assert model(ids).logits.shape == (2, 3) and weight.grad is not None


def test_a_pooler_that_pretraining_had_no_use_for_is_made_anew(tmp_path, ids):
    from transformers import BertConfig, BertForMaskedLM

    from .conftest import SMALL

    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "mlm")
    for task in ("encoder", "sequence-classification"):
        model = hb.load_model(tmp_path / "mlm", task=task, quantization=hb.HalfbyteConfig(**CONFIG))
        (name,) = (name for name, _ in model.named_parameters() if name.endswith("pooler.dense.weight"))
        assert model.get_parameter(name).requires_grad and model.halfbyte_report.skipped[name] == "made anew"
        assert model(ids)[0].isfinite().all()


def test_token_classification(folder_of, ids):
    config = hb.HalfbyteConfig(**CONFIG)
    model = hb.load_model(folder_of("bert"), task="token-classification", num_labels=5, quantization=config)
    assert model(ids).logits.shape == (2, 7, 5)


def test_skipped_modules_stay_dense_across_a_save(folder_of, ids, tmp_path):
    config = hb.HalfbyteConfig(**CONFIG, skip_modules=["down_proj", "layers.1.self_attn"])
    model = hb.load_model(folder_of("llama"), quantization=config)
    assert type(model.model.layers[0].mlp.down_proj.weight) is nn.Parameter
    assert type(model.model.layers[1].self_attn.q_proj.weight) is nn.Parameter
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, hb.QuantizedTensor)
    assert model.halfbyte_report.skipped["model.layers.0.mlp.down_proj.weight"] == "asked for"
    hb.save_model(model, tmp_path / "saved")
    again = hb.load_model(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert packed(again).keys() == packed(model).keys()


def test_a_name_that_skips_nothing_is_refused(folder_of):
    with pytest.raises(RequestError, match="'dwn_proj', so it cannot be skipped; did you mean 'down_proj'"):
        hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(skip_modules=["dwn_proj"]))
    with pytest.raises(RequestError, match=r"'qqqqqq', so it cannot be skipped; .*: [a-z]"):
        hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(skip_modules=["qqqqqq"]))


def test_a_model_of_which_too_little_would_be_quantized_is_refused(folder_of):
    """Trap 9: half of the layers skipped is a mistake, unless it is asked for."""
    skip = ["mlp", "q_proj", "k_proj", "v_proj"]
    with pytest.raises(FormatError, match=r"only \d+ % of the parameters .* \(min_quantized_share is 0.5\); skipped: "):
        hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(skip_modules=skip))
    config = hb.HalfbyteConfig(skip_modules=skip, min_quantized_share=0.1)
    assert hb.load_model(folder_of("llama"), quantization=config).halfbyte_report.share > 0


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"blocksize": 64}, "no option 'blocksize'; did you mean 'block_size'"),
        ({"format": "nf3"}, "did you mean 'nf4'"),
        ({"compute_dtype": "bf16"}, "compute dtype 'bf16' is not offered"),
        ({"block_size": 65}, "the nearest is 64"),
    ],
)
def test_a_wrong_option_names_the_nearest(options, hint):
    with pytest.raises(FormatError, match=hint):
        hb.HalfbyteConfig(**options)


def test_another_encoding_than_the_stored_one_is_refused(folder_of, tmp_path):
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig())
    hb.save_model(model, tmp_path / "saved")
    assert hb.load_model(tmp_path / "saved", quantization=hb.HalfbyteConfig()).halfbyte_report.quantized
    with pytest.raises(FormatError, match=r"already quantized as .* start from the unquantized model"):
        hb.load_model(tmp_path / "saved", quantization=hb.HalfbyteConfig("fp4"))


def test_forward_changes_no_storage(folder_of, ids):
    """Trap 22."""
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig())
    before = {name: weight.clone() for name, weight in packed(model).items()}
    for mode in (True, False):
        model.train(mode)(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert all(weight.same_bytes(before[name]) for name, weight in packed(model).items())
