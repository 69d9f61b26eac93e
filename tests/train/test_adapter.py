"""Storage of the adapter between steps, and LoRA+: what is held, what rounding does, which learning rates apply."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import RecipeError
from halfbyte.formats import CODEBOOKS
from halfbyte.train.adapter import rounded, split_groups
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter

SHAPES = [(1, 1), (4, 16), (7, 3), (1, 63), (65, 1), (127, 129)]
NEEDED = {"model_name_or_path": "/m", "output_dir": "o", "dataset": "d"}


def held_by(x, dtype):
    """Whether every value is one that the format can hold."""
    if dtype == "bf16":
        return torch.equal(x.bfloat16().float(), x)
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 64)).view(-1, 64)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    levels = torch.tensor(CODEBOOKS[dtype].values)
    distance = (flat[..., None] / scale[..., None] - levels).abs().amin(-1)
    return distance.max() < 1e-6  # a product and a quotient, each rounded


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_what_comes_back_is_what_the_format_holds_and_near(dtype, stochastic, shape):
    x = torch.randn(shape)
    y = rounded(x, dtype, stochastic=stochastic)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert held_by(y, dtype)
    # To a neighbour: a step of bfloat16, or NF4's widest gap (0.304 between its two lowest values), of the largest.
    gap = x.abs() * 2**-7 if dtype == "bf16" else 0.304 * x.abs().max()
    assert ((y - x).abs() <= gap * (1 if stochastic else 0.501)).all()


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_stochastic_rounding_is_right_on_average_and_nearest_is_not(dtype):
    """4,096 draws: the mean is within 6 standard errors of each value, and the bias of the nearest is far outside."""
    x = torch.randn(4, 32)
    draws = torch.stack([rounded(x, dtype, stochastic=True) for _ in range(4096)]).double()
    error = draws.std(0) / 4096**0.5
    assert ((draws.mean(0) - x).abs() <= 6 * error + 1e-6).all()
    assert ((rounded(x, dtype, stochastic=False) - x).abs() > 6 * error + 1e-6).float().mean() > 0.5


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_zeros_stay_zeros(dtype):
    for stochastic in (True, False):
        assert rounded(torch.zeros(3, 50), dtype, stochastic=stochastic).eq(0).all()


@pytest.fixture
def steps(tiny_llama, tiny_tokenizer, write_rows, tmp_path):
    """Takes steps and returns the LoRA matrices before and after, by name."""

    def take(**keys):
        from transformers import AutoModelForCausalLM, set_seed

        from halfbyte.data import Renderer, read_examples, tokenize
        from halfbyte.train.adapter import lora_matrices
        from halfbyte.train.trainer import Trainer

        examples = read_examples([write_rows([{"prompt": c, "completion": c.upper()} for c in "abcdefgh"])])
        rows = tokenize(examples, Renderer(tiny_tokenizer), max_length=64, train_on="completion").dataset
        recipe = make_recipe({**NEEDED, "method": "lora", "compute_dtype": "float32", "lora_r": 4, **keys})
        set_seed(0)
        model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), recipe, "all-linear")
        trainer = Trainer(
            model, recipe, rows=rows, eval_rows=None, tokenizer=tiny_tokenizer, folder=tmp_path, callbacks=[]
        )
        before = {name: p.detach().clone() for name, p in lora_matrices(model).items()}
        trainer.train()
        return before, {name: p.detach() for name, p in lora_matrices(model).items()}, trainer

    return take


@pytest.mark.parametrize("keys", [{}, {"adapter_rounding": "nearest"}, {"adapter_error_feedback": True}], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_between_steps_the_adapter_is_what_the_format_holds(steps, dtype, keys):
    before, after, _ = steps(adapter_dtype=dtype, max_steps=3, **keys)
    assert not any(held_by(x, dtype) for name, x in before.items() if "lora_A" in name)
    assert all(held_by(x, dtype) for x in after.values())


def test_error_feedback_keeps_what_nearest_rounding_takes_back(steps):
    """Ten steps of 1e-6: nearest rounding leaves A where its first rounding put it; with feedback nothing is lost."""
    small = {"adapter_dtype": "nf4", "adapter_rounding": "nearest", "learning_rate": 1e-6, "max_steps": 10}
    plain = {name: x.clone() for name, x in steps(learning_rate=1e-6, max_steps=10)[1].items()}
    before, after, _ = steps(**small)
    inner = {name: rounded(x, "nf4", stochastic=False) for name, x in before.items() if "lora_A" in name}
    # The largest of a block is its scale, and moves; what is not the largest goes back to where it was.
    still = torch.cat(
        [(after[name] / x - 1).abs().flatten() for name, x in inner.items() if x.ne(0).all()] or [torch.zeros(1)]
    )
    assert (still < 1e-3).float().mean() > 0.99
    _, after, trainer = steps(**small, adapter_error_feedback=True)
    for name, x in plain.items():
        # The gradients are those of rounded weights: at most the way of both, ten steps of 1e-6 each.
        assert torch.allclose(after[name] + trainer.storage.errors[name], x, rtol=0, atol=2.1e-5)


def test_loraplus_steps_b_faster(steps):
    """AdamW's first step is the learning rate, whatever the gradient."""
    keys = {"learning_rate": 1e-4, "max_steps": 1, "warmup_ratio": 0, "lr_scheduler_type": "constant"}
    before, after, trainer = steps(loraplus_lr_ratio=16, **keys)
    for name, x in before.items():
        moved = (after[name] - x).abs().max().item()
        if "lora_B" in name:
            assert moved == pytest.approx(16e-4, rel=1e-2)
        else:
            assert moved < 1.01e-4  # B is zero at first, so A has no gradient
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([1e-4, 16e-4])


@pytest.mark.parametrize("named", [False, True])
def test_groups_are_split_with_their_settings(named):
    slow, fast, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [slow, fast], "weight_decay": 0.5}, {"params": [other], "weight_decay": 0.0}]
    if named:
        groups[0]["params"], groups[1]["params"] = [("slow", slow), ("fast", fast)], [("other", other)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    split_groups(optimizer, {id(fast)}, 4)
    found = [([id(p) for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([id(slow)], 0.1, 0.5), ([id(other)], 0.1, 0.0), ([id(fast)], 0.4, 0.5)]
    if named:
        assert [g["param_names"] for g in optimizer.param_groups] == [["slow"], ["other"], ["fast"]]


def test_full_fine_tuning_has_no_adapter_to_store():
    with pytest.raises(RecipeError, match=r"adapter_dtype is 'nf4' but method is 'full', which has no adapter"):
        make_recipe({**NEEDED, "method": "full", "adapter_dtype": "nf4"})
