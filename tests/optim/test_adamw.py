"""`halfbyte.optim.AdamW` as an optimizer: what it does with a step, a group, a name, a gradient that is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import HalfbyteError, NonFiniteError, RequestError

KINDS = ("float32", "8bit", "4bit")
# Odd first; around a block, around the limit below which states stay float32, more than one piece of work.
SIZES = (1, 255, 256, 257, 4095, 4096, 4097, 9001)


def parameters(shapes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 3
        p.grad = grad.to(dtype or p.dtype)


def run(params, steps, *, first=0, **options):
    optimizer = hb.optim.AdamW(params, lr=1e-2, **options)
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()
    return optimizer


def values(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params = parameters([(s,) for s in SIZES] + [(130, 257)], torch.bfloat16)
            run(params, 4, state=kind, max_grad_norm=0.5)
            found.append(values(params))
    finally:
        torch.set_num_threads(before)
    assert equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tensors_in_one_call_are_as_each_alone(kind):
    shapes = [(8, 640), (640, 8), (3,), (4096,), (70, 70)]
    together = parameters(shapes)
    run(together, 3, state=kind)
    for number in range(len(shapes)):
        alone = parameters(shapes)
        optimizer = hb.optim.AdamW([alone[number]], lr=1e-2, state=kind)
        for step in range(3):
            give_gradients(alone, step)
            optimizer.step()
        assert torch.equal(alone[number], together[number])


@pytest.mark.parametrize("kind", KINDS)
def test_strided_parameters_and_gradients(kind):
    plain, strided = parameters([(96, 64)]), parameters([(96, 64)])
    strided[0].data = strided[0].data.t().contiguous().t()
    assert not strided[0].is_contiguous()
    for params in (plain, strided):
        optimizer = hb.optim.AdamW(params, lr=1e-2, state=kind)
        for step in range(3):
            give_gradients(params, step)
            if params is strided:
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()
    assert torch.equal(*plain, *strided)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_only_decay_and_missing_ones_do_nothing(kind):
    params = parameters([(5000,), (5000,), (0,)])
    before = values(params)
    optimizer = hb.optim.AdamW(params, lr=0.5, weight_decay=0.1, state=kind)
    params[0].grad = torch.zeros(5000)
    params[2].grad = torch.zeros(0)
    optimizer.step()
    assert torch.equal(params[0], before[0] * torch.tensor(1 - 0.5 * 0.1))
    assert torch.equal(params[1], before[1]) and params[1] not in optimizer.state
    hb.optim.AdamW(parameters([(3,)]), state=kind).step()  # no gradient at all


def test_groups_have_settings_of_their_own():
    params = parameters([(4096,), (4096,)])
    groups = [{"params": params[:1], "lr": 1e-3, "state": "8bit"}, {"params": params[1:], "weight_decay": 0.5}]
    optimizer = hb.optim.AdamW(groups, lr=1e-2)
    extra = parameters([(10, 10)])
    optimizer.add_param_group({"params": extra, "lr": 0.0})
    alone = [parameters([(4096,), (4096,)])[i] for i in (0, 1)]
    others = [
        hb.optim.AdamW(alone[:1], lr=1e-3, state="8bit"),
        hb.optim.AdamW(alone[1:], lr=1e-2, weight_decay=0.5),
    ]
    before = extra[0].detach().clone()
    for step in range(3):
        give_gradients([*params, *extra], step)
        optimizer.step()
        give_gradients(alone, step)
        for other in others:
            other.step()
    assert equal(params, alone) and torch.equal(extra[0], before)
    assert "state1" in optimizer.state[params[0]] and "exp_avg" in optimizer.state[params[1]]


def test_a_closure_is_called_with_gradients_on():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = hb.optim.AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (p < 1).all()


def test_schedulers_and_a_learning_rate_that_is_a_tensor():
    one, two = parameters([(300,)]), parameters([(300,)])
    first = hb.optim.AdamW(one, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 1 / (step + 1))
    for step in range(3):
        give_gradients(one, step)
        first.step()
        schedule.step()
    second = hb.optim.AdamW(two, lr=torch.tensor(1e-2, dtype=torch.float64))
    for step in range(3):
        second.param_groups[0]["lr"] = torch.tensor(1e-2 / (step + 1), dtype=torch.float64)
        give_gradients(two, step)
        second.step()
    assert torch.equal(*one, *two)


def test_embeddings_and_small_tensors_keep_float32():
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(64, 128), "up": torch.nn.Linear(64, 128)})
    optimizer = hb.optim.AdamW(model.named_parameters(), state="8bit")
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    kinds = {name: "exp_avg" in optimizer.state[p] for name, p in model.named_parameters()}
    assert kinds == {"embed_tokens.weight": True, "up.weight": False, "up.bias": True}
    optimizer = hb.optim.AdamW(model.named_parameters(), state="8bit", keep_float32=())
    optimizer.step()
    assert "state1" in optimizer.state[model["embed_tokens"].weight]


@pytest.mark.parametrize(("kind", "expected"), [("float32", 8.0), ("8bit", 2.03125), ("4bit", 1 + 4 / 128 + 8 / 4096)])
def test_bytes_a_parameter_are_counted_from_the_tensors(kind, expected):
    p = torch.nn.Parameter(torch.zeros(4096, 4096))
    optimizer = hb.optim.AdamW([p], state=kind)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert optimizer.state_nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    # 4 bit: two codes a byte, a float32 for 128 first moments, one for each row and column of second moments.
    assert optimizer.state_nbytes / p.numel() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_that_of_torch(kind):
    one, two = parameters([(70, 70), (301,)]), parameters([(70, 70), (301,)])
    first = hb.optim.AdamW(one, lr=1e-2, state=kind, max_grad_norm=0.25)
    second = hb.optim.AdamW(two, lr=1e-2, state=kind)
    give_gradients(one, 0)
    give_gradients(two, 0)
    untouched = one[0].grad.clone()
    first.step()
    norm = torch.nn.utils.clip_grad_norm_(two, 0.25)
    second.step()
    assert torch.equal(one[0].grad, untouched)
    # torch sums in float32; the first step moves a parameter by at most lr, so the scale's rounding hardly shows.
    assert first.grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(kind, bad):
    names = ["a.weight", "b.weight", "c.weight"]
    params = parameters([(5000,), (5000,), (257,)])
    optimizer = hb.optim.AdamW(list(zip(names, params, strict=True)), state=kind)
    give_gradients(params, 0)
    optimizer.step()
    before, state = values(params), copy.deepcopy(optimizer.state_dict())
    give_gradients(params, 1)
    params[1].grad[4999] = bad
    params[2].grad[0] = bad
    with pytest.raises(NonFiniteError, match=r"gradient of b\.weight is not finite; no parameter was changed"):
        optimizer.step()
    assert equal(params, before)
    for number, tensors in optimizer.state_dict()["state"].items():
        assert equal(tensors.values(), state["state"][number].values())


@given(st.floats(-3, 3, width=32), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_stochastic_rounding_is_right_on_average_and_never_further_than_one_step(value, seed):
    count = 20000
    p = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    optimizer = hb.optim.AdamW([p], lr=abs(value), weight_decay=0.0, eps=0.0, seed=seed)
    p.grad = torch.full((count,), -1.0 if value > 0 else 1.0, dtype=torch.bfloat16)
    optimizer.step()  # the first step moves by lr, so each element is lr rounded
    low, high = float(p.min()), float(p.max())
    assert low <= value <= high or abs(value) < 1e-37
    spacing = abs(value) * 2.0**-7 + 1e-38
    assert high - low <= spacing
    # A sum of independent choices: five standard deviations of at most spacing / 2 each.
    assert abs(float(p.double().mean()) - value) <= 5 * spacing / 2 / count**0.5 + abs(value) * 2e-7


def test_small_updates_are_not_lost_in_bfloat16():
    for bf16 in ("stochastic", "master"):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = hb.optim.AdamW([p], lr=1e-4, weight_decay=0.0, bf16=bf16)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        kept = optimizer.state[p].get("master", p)
        assert float(kept.double().mean()) == pytest.approx(0.99, abs=3e-4), bf16
    assert torch.equal(p, kept.bfloat16())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"state": "8bits"}, "state is '8bits', which is not offered; did you mean '8bit'"),
        ({"paged": "disk"}, "paged is 'disk', which is not offered"),
        ({"paged": True}, "paged is True, which is not offered"),
        ({"bf16": "nearest"}, "bf16 is 'nearest', which is not offered"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"paged": "file", "page_budget": 10}, "page_budget is 10 bytes"),
        ({"paged": "file", "page_dir": "no/such/folder"}, "page_dir 'no/such/folder' is no folder"),
        ({"paged": "host"}, "paged='host' needs a CUDA device, .*; choose 'file'"),
    ],
)
def test_wrong_settings_are_one_sentence(options, sentence):
    with pytest.raises(RequestError, match=sentence):
        hb.optim.AdamW(parameters([(3,)]), **options)


def test_a_cpu_has_no_graph_to_capture():
    with pytest.raises(RequestError, match=r"not offered for parameter 0 of group 0: .* this is cpu"):
        hb.optim.AdamW(parameters([(3,)]), capturable=True)


def test_parameters_and_gradients_that_cannot_be_stepped():
    with pytest.raises(RequestError, match=r"parameter 0 of group 0 is torch\.float16"):
        hb.optim.AdamW(parameters([(3,)], torch.float16))
    optimizer = hb.optim.AdamW(parameters([(3,)]))
    with pytest.raises(RequestError, match=r"torch\.float64"):
        optimizer.add_param_group({"params": parameters([(3,)], torch.float64)})
    assert len(optimizer.param_groups) == 1
    p = torch.nn.Parameter(torch.randn(4, 4))
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(HalfbyteError, match="gradient is"):
        hb.optim.AdamW([p]).step()


def test_a_parameter_that_moves_or_is_frozen_later_is_followed():
    one, two = parameters([(5000,)]), parameters([(5000,)])
    first, second = hb.optim.AdamW(one, state="8bit"), hb.optim.AdamW(two, state="8bit")
    for step in range(4):
        for params, optimizer in ((one, first), (two, second)):
            give_gradients(params, step)
            if step == 2:
                params[0].grad = None
            optimizer.step()
        one[0].data = one[0].data.clone()
    assert torch.equal(*one, *two) and first.state[one[0]]["step"] == 3


def test_deepcopy_continues_as_the_original():
    params = parameters([(5000,), (30,)])
    optimizer = run(params, 3, state="8bit", max_grad_norm=1.0, seed=4)
    twins, twin = copy.deepcopy((params, optimizer))
    assert twin.max_grad_norm == 1.0 and twin.seed == 4
    for some, o in ((params, optimizer), (twins, twin)):
        give_gradients(some, 9)
        o.step()
    assert equal(params, twins)


@pytest.mark.parametrize("state", ["float32", "8bit", "4bit"])
def test_a_second_moment_too_small_to_be_told_from_zero_does_not_throw_its_parameter_away(state):
    """Stored as zero, it would leave eps alone in the denominator: a step of lr m / eps, here 10^3 of lr."""
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = hb.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0, state=state)
    gradient = torch.ones(4096)
    gradient[7::256] = 1e-4  # of the block's largest; its square is 10^-8 of theirs
    for step in range(3):
        parameter.grad = gradient.clone()
        if step:
            parameter.grad[7::256] = 0.0
        optimizer.step()
    assert parameter.abs().max() < 4e-3  # three steps of lr, and what rounding the moments adds
