"""The AdamW steps against torch's and bitsandbytes': the same gradients, one step and two hundred.

* float32 state equals torch's fused AdamW to the bit, on tensors that fill its vectors; in a ragged tail torch rounds
  twice where it rounds once elsewhere, and there the difference is a rounding.
* 8-bit state equals bitsandbytes' to the bit when bitsandbytes takes the nearest code. Its native CPU quantizer takes
  the code nearest to one of 65,536 grid points instead: `test_native_grid` bounds what that does to a single step,
  `test_200_steps_of_bitsandbytes_as_it_comes` what it does in two hundred.
* Parameters of 8-bit steps differ by roundings: bitsandbytes' square root comes from a vector library that is not
  correctly rounded, and it divides where we multiply by a reciprocal.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import halfbyte as hb
from halfbyte.formats import blockwise
from halfbyte.formats.codebooks import MOMENT1_8BIT, MOMENT2_8BIT

bnb = pytest.importorskip("bitsandbytes")
bnb_ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")

SHAPES = ((4096,), (64, 128), (5000,), (257, 33), (300,))
EPS = 2.0**-23


def parameters(shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        # Spread over many decades, with exact zeros, as gradients are.
        grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 4
        p.grad = grad.masked_fill(torch.rand(p.shape, generator=generator) < 0.05, 0.0)


@pytest.fixture
def nearest_codes(monkeypatch):
    """bitsandbytes' CPU step with the quantizer of its portable code, which takes the nearest entry of the map."""

    def quantize(x, code, absmax, out, block):
        book = MOMENT1_8BIT if float(code[0]) < 0 else MOMENT2_8BIT
        codes, scales = blockwise.quantize(x, book, block)
        out.copy_(codes.view(out.shape))
        absmax.copy_(scales)

    monkeypatch.setattr(bnb_ops, "_quant_blockwise_fp32_direct", quantize)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
@pytest.mark.parametrize("steps", [1, 200])
def test_float32_equals_torch_fused(steps, betas):
    shapes = ((4096,), (64, 128), (32, 2048))
    ours, theirs = parameters(shapes), parameters(shapes)
    options = {"lr": 3e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
    one, two = hb.optim.AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(steps):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        two.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(one.state[a]["exp_avg"], two.state[b]["exp_avg"])
        assert torch.equal(one.state[a]["exp_avg_sq"], two.state[b]["exp_avg_sq"])


@pytest.mark.parametrize("size", [1, 255, 257, 4095])
def test_float32_equals_torch_to_rounding_in_ragged_tails(size):
    ours, theirs = parameters(((size,),)), parameters(((size,),))
    one, two = hb.optim.AdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, fused=True)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        two.step()
    # A step's rounding errs by eps of the parameter and a few eps of the update, which is lr at most.
    bound = 20 * EPS * (ours[0].abs() + 1e-3 * 8)
    assert ((ours[0] - theirs[0]).abs() <= bound).all()


def test_torch_continues_our_state_and_we_continue_torchs():
    ours = parameters()
    one = hb.optim.AdamW(ours, lr=1e-3)
    for step in range(3):
        give_gradients(ours, step)
        one.step()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    two = torch.optim.AdamW(theirs, fused=True)
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # torch would share the tensors
    again = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    three = hb.optim.AdamW(again)
    three.load_state_dict(torch.optim.AdamW.state_dict(two))
    for step in range(3, 6):
        for params, optimizer in ((ours, one), (theirs, two), (again, three)):
            give_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert all(torch.allclose(a, b, rtol=3 * EPS, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("steps", [1, 200])
def test_8bit_states_equal_bitsandbytes(steps, nearest_codes):
    # Sizes that fill torch's vectors: in a ragged tail its scalar code rounds the second moment twice.
    shapes = ((4096,), (64, 128), (8192 + 512,))
    ours, theirs = parameters(shapes), parameters(shapes)
    options = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    one, two = hb.optim.AdamW(ours, state="8bit", **options), bnb.optim.AdamW8bit(theirs, **options)
    for step in range(steps):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        two.step()
    for a, b in zip(ours, theirs, strict=True):
        for name in ("state1", "state2", "absmax1", "absmax2"):
            assert torch.equal(one.state[a][name], two.state[b][name]), name
        # Each step rounds the parameter once, and its update (at most lr times |m| / sqrt(v)) a few times.
        largest = 3e-3 / math.sqrt(1 - 0.999) * (1 - 0.9)
        assert ((a - b).abs() <= steps * EPS * (a.abs() + 8 * largest)).all()


def test_native_grid():
    """One step of bitsandbytes as it comes: each code is at most a grid point's half width from the nearest one."""
    ours, theirs = parameters(((1 << 16,),)), parameters(((1 << 16,),))
    one, two = hb.optim.AdamW(ours, state="8bit"), bnb.optim.AdamW8bit(theirs)
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    one.step()
    two.step()
    mine, other = one.state[ours[0]], two.state[theirs[0]]
    assert torch.equal(mine["absmax1"], other["absmax1"]) and torch.equal(mine["absmax2"], other["absmax2"])
    for name, book in (("state1", MOMENT1_8BIT), ("state2", MOMENT2_8BIT)):
        table = book.table()
        difference = (table[mine[name].long()] - table[other[name].long()]).abs()
        moved = mine[name] != other[name]
        assert 0 < moved.sum() < moved.numel()
        # Both codes' cells touch the same grid cell, so one is at most a cell further from x than the other's value.
        low, high = torch.minimum(mine[name], other[name]).long(), torch.maximum(mine[name], other[name]).long()
        gap = table[(high + 1).clamp(max=255)] - table[(low - 1).clamp(min=0)]
        assert (difference <= gap + 1 / 65535).all()
    # What an exact zero becomes in bitsandbytes' native code, and stays here.
    zero = ours[0].grad == 0
    assert (MOMENT1_8BIT.table()[mine["state1"].long()][zero] == 0).all()
    assert (MOMENT1_8BIT.table()[other["state1"].long()][zero] > 2e-5).all()


def grid_quantize(x, code, absmax, out, block):
    """bitsandbytes' native CPU code: x / absmax goes to one of 65,536 grid points, and that to its nearest code.

    A grid point that lies in the middle of two codes gets the lower one.
    """
    blocks = x.reshape(-1, block)
    scales = blocks.abs().amax(1)
    unit = blocks * (1 / scales.clamp(min=torch.finfo().tiny)).unsqueeze(1)
    point = ((unit + 1) * 0.5 * 65535 + 0.5).int()
    middles = 0.5 * (code[:-1] + code[1:])
    codes = torch.searchsorted(middles, -1 + (2.0 * point) / 65535).to(torch.uint8)
    out.copy_(codes.masked_fill((scales == 0).unsqueeze(1), 0).view(out.shape))
    absmax.copy_(scales)


def test_only_the_grid_differs_in_200_steps_of_bitsandbytes(monkeypatch):
    """bitsandbytes as it comes is bitsandbytes with `grid_quantize`, to the bit.

    With the nearest code in that one place its states are ours (`test_8bit_states_equal_bitsandbytes`), so the grid is
    the reason of every difference between its states and ours.
    """
    native, emulated = parameters(((64, 128),)), parameters(((64, 128),))
    options = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    one, two = bnb.optim.AdamW8bit(native, **options), bnb.optim.AdamW8bit(emulated, **options)
    for step in range(200):
        give_gradients(native, step)
        give_gradients(emulated, step)
        one.step()
        with monkeypatch.context() as patch:
            patch.setattr(bnb_ops, "_quant_blockwise_fp32_direct", grid_quantize)
            two.step()
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(one.state[native[0]][name], two.state[emulated[0]][name]), name
    assert torch.equal(native[0], emulated[0])


def moments(state, shape):
    """What an 8-bit state stands for, in float64: both moments, and how far a rounded value can have been from each."""
    found = []
    for name, scale, book in (("state1", "absmax1", MOMENT1_8BIT), ("state2", "absmax2", MOMENT2_8BIT)):
        table = book.table().double()
        gaps = table.diff()
        reach = 0.5 * torch.maximum(torch.cat([gaps, gaps[-1:]]), torch.cat([gaps[:1], gaps]))
        codes = state[name].long().view(shape)
        scales = state[scale].double().repeat_interleave(256).view(shape)
        found.append((table[codes] * scales, reach[codes] * scales, scales))
    return found


def test_200_steps_of_bitsandbytes_as_it_comes(record_property):
    """States and parameters after 200 steps beside its native quantizer: how far apart, and bounds for both.

    * A moment is beta * moment + (1 - beta) * (the same input), and each side rounds it once a step: ours to half the
      gap between two codes, bitsandbytes' to that and half a grid cell, 1/65535 of absmax. The difference of the
      moments is therefore at most the sum of these, each beta times smaller a step later.
    * The parameters differ by what the moments' differences make of an update, and by roundings. That is much where a
      second moment is below half the smallest code: the nearest code is 0, while the grid, which has no 0, keeps it at
      1/65535 of absmax. A gradient of exactly 0 after that divides the first moment by eps alone.
    """
    shape, lr, betas, eps, decay = (64, 128), 3e-3, (0.9, 0.999), 1e-8, 0.1
    ours, theirs = parameters((shape,)), parameters((shape,))
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
    one, two = hb.optim.AdamW(ours, state="8bit", **options), bnb.optim.AdamW8bit(theirs, **options)
    zero = torch.zeros(shape, dtype=torch.float64)
    apart, explained, moved, steps = [zero, zero], zero, zero, 200
    before = [(zero, zero), (zero, zero)]
    for step in range(1, steps + 1):
        give_gradients(ours, step - 1)
        give_gradients(theirs, step - 1)
        grad = ours[0].grad.double()
        updates = []
        for moment1, moment2 in before:
            first = betas[0] * moment1 + (1 - betas[0]) * grad
            second = betas[1] * moment2 + (1 - betas[1]) * grad**2
            root = (second / (1 - betas[1] ** step)).sqrt()
            updates.append(first / (1 - betas[0] ** step) / (root + eps))
            size = betas[0] * moment1.abs() + (1 - betas[0]) * grad.abs()
            moved = moved + lr * size / (1 - betas[0] ** step) / (root + eps)
        explained = (1 - lr * decay) * explained + lr * (updates[0] - updates[1]).abs()
        one.step()
        two.step()
        mine, other = moments(one.state[ours[0]], shape), moments(two.state[theirs[0]], shape)
        before = [(side[0][0], side[1][0]) for side in (mine, other)]
        for at, beta in enumerate(betas):
            (value, reach, scale), (their_value, their_reach, their_scale) = mine[at], other[at]
            # float32 arithmetic adds a few eps of absmax, and its grid index a 128th of a cell.
            rounding = reach + their_reach + their_scale * (1 + 1 / 128) / 65535 + 8 * EPS * (scale + their_scale)
            apart[at] = beta * apart[at] + rounding
            assert ((value - their_value).abs() <= apart[at]).all(), (step, at)
    for name in ("state1", "state2"):
        codes = (one.state[ours[0]][name].int() - two.state[theirs[0]][name].int()).abs()
        counts = torch.bincount(codes.view(-1)).tolist()
        record_property(name, {by: count for by, count in enumerate(counts) if count})
        assert sum(counts[1:]) > 0, "the quantizers do not differ: this test has no object any more"
    difference = (ours[0] - theirs[0]).detach().abs()
    record_property("parameters", {"max": float(difference.max()), "explained": float(explained.max())})
    # Each side rounds a parameter once a step, when it is at most its start and all that was added to it, and an update
    # a few times, relative to the larger terms of the sum that it begins with.
    start = parameters((shape,))[0].detach().abs()
    assert (difference <= explained + EPS * (2 * steps * (start + moved) + 8 * moved)).all()


def test_bitsandbytes_continues_our_state_and_we_continue_its(nearest_codes):
    shapes = ((4096,), (64, 128), (300,))  # the last one is below 4096 elements: float32 in both
    ours = parameters(shapes)
    one = hb.optim.AdamW(ours, state="8bit", lr=1e-3, weight_decay=0.01)
    for step in range(3):
        give_gradients(ours, step)
        one.step()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    two = bnb.optim.AdamW8bit(theirs)
    two.load_state_dict(one.bitsandbytes_state_dict())
    again = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    three = hb.optim.AdamW(again, state="8bit")
    three.load_state_dict(two.state_dict())
    for step in range(3, 8):
        for params, optimizer in ((ours, one), (theirs, two), (again, three)):
            give_gradients(params, step)
            optimizer.step()
    for a, b, c in zip(ours, theirs, again, strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(a, b, rtol=5 * EPS, atol=5e-9)
        assert two.state[b]["step"] == one.state[a]["step"] == 8
        if a.numel() >= 4096:
            assert all(
                torch.equal(one.state[a][k], two.state[b][k]) for k in ("state1", "state2", "absmax1", "absmax2")
            )
        else:
            # bitsandbytes computes beta1 m + (1 - beta1) g, torch and we m + (1 - beta1)(g - m).
            close = {"rtol": 32 * EPS, "atol": 4 * EPS * float(two.state[b]["state1"].abs().max())}
            assert torch.allclose(one.state[a]["exp_avg"], two.state[b]["state1"], **close)
            assert torch.allclose(one.state[a]["exp_avg_sq"], two.state[b]["state2"], rtol=32 * EPS, atol=0)


def test_a_bitsandbytes_state_with_another_map_is_refused():
    params = parameters(((4096,),))
    theirs = bnb.optim.AdamW8bit(params)
    give_gradients(params, 0)
    theirs.step()
    state = theirs.state_dict()
    state["state"][0]["__bnb_optimizer_quant_state__"]["qmap2"] = torch.linspace(0, 1, 256)
    with pytest.raises(hb.HalfbyteError, match=r"qmap2 of .* is not the dynamic map"):
        hb.optim.AdamW(params, state="8bit").load_state_dict(state)
