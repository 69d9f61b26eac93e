"""Adapters without their base: described, scaled, combined, packed; and the hash of the base they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.formats import QuantSpec
from halfbyte.formats.blockwise import dequantize, quantize
from halfbyte.models import (
    base_hash,
    combine_adapters,
    describe_adapter,
    other_base,
    pack_adapter,
    scale_adapter,
    unpack_adapter,
    write_base,
)
from halfbyte.models.adapters import LoraPair, lora_pairs


@pytest.fixture
def make(folder_of, tmp_path):
    """Makes random adapters of a family."""

    def adapter(name: str, family: str = "llama", seed: int = 1, **options) -> Path:
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder_of(family)), LoraConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return adapter


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: pair.scaling * pair.up.double() @ pair.down.double() for name, pair in lora_pairs(folder).items()}


@pytest.mark.parametrize(("rank", "rows", "columns"), [(3, 20, 11), (5, 4, 9), (1, 1, 7)])
def test_norm_and_ranks_come_from_the_factors(rank, rows, columns):
    pair = LoraPair(torch.randn(rank, columns), torch.randn(rows, rank), -0.7)
    expected = torch.linalg.svdvals(pair.scaling * pair.up.double() @ pair.down.double())
    found = pair.singular_values()
    torch.testing.assert_close(found[: len(expected)], expected[: len(found)])
    assert 1 - 1e-9 <= pair.effective_rank() <= min(rank, rows, columns) + 1e-9


def test_effective_rank_counts_equal_directions():
    eye = torch.eye(8)
    assert LoraPair(eye[:5], eye[:, :5], 2.0).effective_rank() == pytest.approx(5)
    assert LoraPair(eye[:5], torch.zeros(8, 5), 2.0).effective_rank() == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaled(family, make, tmp_path):
    options = {"target_modules": ["c_attn"]} if family == "gpt2" else {"alpha_pattern": {"q_proj": 3}}
    adapter = make("a", family, **options)
    scale_adapter(adapter, tmp_path / "half", -0.5)
    before, after = deltas(adapter), deltas(tmp_path / "half")
    for name in before:
        torch.testing.assert_close(after[name], -0.5 * before[name])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_are_described_by_expert_and_not_combined(make, folder_of, tmp_path, use_rslora):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": names, "use_rslora": use_rslora}
    folder = make("one", "mixtral", **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder_of("mixtral")), folder)
    described = describe_adapter(folder)
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found = described.pop(name.removeprefix(prefix))
            assert found["rank"] == 2 and 1 <= found["effective_rank"] <= 2
            assert found["norm"] == pytest.approx(float(module.get_delta_weight("default").norm()), rel=1e-5)
    assert not described
    with pytest.raises(RequestError, match=r"is on parameters \(mlp.experts..*\), which peft cannot combine"):
        combine_adapters([folder, folder], tmp_path / "both")
    several = make("several", "mixtral", **options, rank_pattern={"down_proj": 3})
    assert {name.rpartition(".")[2] for name in describe_adapter(several)} == {"q_proj"}
    scale_adapter(folder, tmp_path / "half", 0.5)
    half = describe_adapter(tmp_path / "half")
    assert all(half[name]["norm"] == pytest.approx(fact["norm"] / 2) for name, fact in describe_adapter(folder).items())


def test_cat_is_the_exact_sum_whatever_the_scalings(make, tmp_path):
    """Ranks, alphas, patterns, rsLoRA and targets of their own."""
    one = make("a", use_rslora=True, lora_alpha=3)
    two = make("b", seed=2, r=3, rank_pattern={"v_proj": 5}, target_modules=["v_proj", "o_proj"])
    distance = combine_adapters([one, two], tmp_path / "sum", weights=[0.7, -2])
    assert distance < 1e-6  # float32
    first, second, made = deltas(one), deltas(two), deltas(tmp_path / "sum")
    assert made.keys() == first.keys() | second.keys()
    for name, delta in made.items():
        expected = sum(w * d[name] for w, d in ((0.7, first), (-2, second)) if name in d)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)


def test_svd_of_the_full_rank_is_exact_and_of_less_is_the_best(make, tmp_path):
    one, two = make("a"), make("b", seed=2)
    assert combine_adapters([one, two], tmp_path / "full", combination_type="svd", rank=8) < 1e-5
    distance = combine_adapters([one, two], tmp_path / "less", combination_type="svd", rank=3)
    total = {name: delta + deltas(two)[name] for name, delta in deltas(one).items()}
    values = {name: torch.linalg.svdvals(delta) for name, delta in total.items()}
    best = (sum(v[3:].square().sum() for v in values.values()) / sum(v.square().sum() for v in values.values())) ** 0.5
    assert distance == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "ties_svd", "magnitude_prune"])
def test_pefts_other_combinations_run_and_load(kind, make, folder_of, tmp_path):
    density = None if kind == "linear" else 0.5
    folders = [make("a"), make("b", seed=2)]
    assert combine_adapters(folders, tmp_path / "out", combination_type=kind, density=density) > 0
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    model.load_adapter(str(tmp_path / "out"))
    combine_adapters(folders, tmp_path / "again", combination_type=kind, density=density)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"combination_type": "tie"}, "did you mean 'ties'"),
        ({}, {"combination_type": "ties"}, "needs a density"),
        ({}, {"weights": [1.0]}, "1 weights"),
        ({"use_dora": True}, {}, "is DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "holds .*lm_head.weight, which peft would drop"),
        ({"r": 3}, {"combination_type": "linear"}, "peft cannot combine"),
    ],
)
def test_what_cannot_be_combined_is_refused(options, arguments, message, make, tmp_path):
    folders = [make("a"), make("b", **options)]
    with pytest.raises(RequestError, match=message):
        combine_adapters(folders, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_packed_and_unpacked_is_the_decoded_adapter(make, tmp_path):
    adapter = make("a", use_dora=True)
    spec = QuantSpec("nf4", 32, None)
    errors = pack_adapter(adapter, tmp_path / "a.nf4dq", spec)
    unpack_adapter(tmp_path / "a.nf4dq", tmp_path / "back")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.dim() < 2:
            assert torch.equal(after[name], tensor)
            continue
        decoded = dequantize(*quantize(tensor, spec.codebook, 32), spec.codebook, 32, tensor.numel(), torch.float32)
        assert torch.equal(after[name], decoded.view(tensor.shape))
        assert errors[name] == pytest.approx(float((after[name] - tensor).norm() / tensor.norm()), rel=1e-5)
    assert (tmp_path / "back" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()


def test_the_hash_does_not_depend_on_shards_and_sees_every_sample(folder_of, tmp_path):
    base = folder_of("llama")
    one = base_hash(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert base_hash(tmp_path / "shards") == one
    assert one["storage"] == "safetensors"
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert base_hash(changed)["sha256"] != one["sha256"]


def test_another_base_is_told_in_one_sentence(make, folder_of, tmp_path):
    adapter, base = make("a"), folder_of("llama")
    assert other_base(adapter, base) == ""  # nothing is known
    write_base(adapter, "meta/llama", base)
    assert other_base(adapter, base) == ""
    assert "is not the base that" in other_base(adapter, folder_of("qwen3"))
    (adapter / "base.json").write_text(json.dumps({"base": 1}))
    with pytest.raises(CheckpointError, match=r"base\.json is damaged"):
        other_base(adapter, base)
