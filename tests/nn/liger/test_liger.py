"""liger-kernel's operations against halfbyte's in float64, and a step of fused models against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte import nn
from halfbyte.models import fused
from halfbyte.nn import liger
from halfbyte.nn.parts import Operations

# Of a rounding. The interpreter computes bfloat16 as no card does, so float16 stands for 16 bits.
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
OPERATIONS = Operations(liger.rms_norm, liger.swiglu, liger.rotate, liger.summed_cross_entropy)


def assert_near(got, wanted, dtype, roundings=4):
    """Each rounding moves a number by at most EPS of itself, and so a vector by at most EPS of its length."""
    assert got.dtype == dtype
    error = (got.cpu().double() - wanted.detach()).norm() / wanted.detach().norm()
    assert error <= roundings * EPS[dtype], (error.item() / EPS[dtype], dtype)


def leaves(device, dtype, *shapes):
    """Random tensors, and the same numbers in float64 on the CPU; all require gradients."""
    narrow = [torch.randn(shape).to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in narrow]
    return [x.to(device).requires_grad_() for x in narrow], exact


def check(found, wanted, inputs, exact, dtype):
    """Results, and the gradients of the inputs for a random one of each result."""
    grads = [torch.randn(x.shape).to(dtype) for x in wanted]
    torch.autograd.backward(found, [g.to(x.device, copy=True) for g, x in zip(grads, found, strict=True)])
    torch.autograd.backward(wanted, [g.double() for g in grads])
    gradients = [(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True)]
    for got, want in (*zip(found, wanted, strict=True), *gradients):
        assert got.shape == want.shape
        assert_near(got, want, dtype)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 48), (3, 130)])
def test_norm(device, dtype, shape):
    (x,), (exact,) = leaves(device, dtype, shape)
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    check(
        [liger.rms_norm(x, weight.to(device), 1e-5)], [nn.rms_norm(exact, weight.double(), 1e-5)], [x], [exact], dtype
    )


@pytest.mark.parametrize("dtype", EPS)
def test_the_gradient_that_a_norm_is_given_stays(device, dtype):
    (x,), _ = leaves(device, dtype, (3, 32))
    grad = torch.randn(3, 32, device=device).to(dtype)
    kept = grad.clone()
    liger.rms_norm(x, torch.ones(32, device=device, dtype=dtype), 1e-5).backward(grad)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 40), (5, 129)])
def test_gate(device, dtype, shape):
    inputs, exact = leaves(device, dtype, shape, shape)
    check([liger.swiglu(*(x * 1 for x in inputs))], [nn.swiglu(*exact)], inputs, exact, dtype)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("batch", "heads", "groups", "dim"), [(1, 1, 1, 2), (2, 4, 2, 8), (3, 3, 3, 16)])
def test_rotation(device, dtype, batch, heads, groups, dim):
    tokens = 5
    inputs, exact = leaves(device, dtype, (batch, tokens, heads, dim), (batch, tokens, groups, dim))
    angles = torch.randn(batch, tokens, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k = ((x * 1).transpose(1, 2) for x in inputs)
    found = [x.transpose(1, 2) for x in liger.rotate(q, k, cos.to(device), sin.to(device))]
    wanted = [nn.rotary(x, cos.double(), sin.double()) for x in exact]
    check(found, wanted, inputs, exact, dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(1, 3, 2), (7, 48, 96), (70, 16, 300)])
def test_loss(device, dtype, shape, trained):
    """Chunks of several sizes, ignored labels, a divisor, a bias, and a loss that is scaled afterwards."""
    rows, width, vocabulary = shape
    inputs, exact = leaves(device, dtype, (rows, width), (vocabulary, width), (vocabulary,))
    for weights in (inputs, exact):
        for x in weights[1:]:
            x.requires_grad_(trained)
    labels = torch.randint(vocabulary, (rows,))
    labels[1::3] = -100
    options = {"num_items": 3}
    loss = nn.linear_cross_entropy(
        *inputs[:2], labels.to(device), inputs[2], summed=liger.summed_cross_entropy, **options
    )
    wanted = nn.linear_cross_entropy(*exact[:2], labels, exact[2], **options)
    (loss * 0.5).backward()
    (wanted * 0.5).backward()
    # A logit of |h| |w| up to 20 is off by EPS of itself, a loss by twice that, a share of softmax by that factor.
    logit = (exact[0].detach() @ exact[1].detach().t() + exact[2].detach()).abs().max().item()
    roundings = 4 + 4 * logit
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=roundings * EPS[dtype] + 1e-6, abs=roundings * EPS[dtype])
    for got, want in zip(inputs, exact, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None and want.grad.norm() > 1e-3:
            assert_near(got.grad, want.grad, dtype, roundings)


@pytest.mark.parametrize("label", [-1, 96])
def test_a_label_out_of_range_is_no_memory_of_something_else(device, label):
    if device == "cuda":
        pytest.skip("the assertion stops the device for the rest of the process")
    with pytest.raises(RuntimeError, match="a label is out of range"):
        liger.summed_cross_entropy(torch.randn(2, 8), torch.randn(96, 8), torch.tensor([0, label]), None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_a_fused_model_is_the_plain_models(device, family, checkpointing, monkeypatch):
    """float32, whose sums are taken in another order; 1e-5 is 170 times its resolution (tests/models/test_fused.py)."""
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    kinds = {"llama": "Llama", "qwen3": "Qwen3", "mixtral": "Mixtral"}
    config = getattr(transformers, f"{kinds[family]}Config")(**sizes)
    plain = getattr(transformers, f"{kinds[family]}ForCausalLM")(config).to(device).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" not in name)
    model = copy.deepcopy(plain)
    fused.fuse(model)
    called = []
    monkeypatch.setattr(fused, "operations", lambda tensor: called.append(tensor.dtype) or OPERATIONS)
    ids = torch.randint(96, (2, 7), device=device)
    found = []
    for one in (model, plain):
        if checkpointing:
            one.activation_checkpointing_enable({"use_reentrant": False})
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}))
    assert len(called) > 5
    (loss, gradients), (wanted, wanted_gradients) = found
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).norm() <= 1e-5 * wanted_gradients[name].norm(), name
