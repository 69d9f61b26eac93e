"""Native AdamW steps against the reference, for every instruction set: parameters, codes and scales to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import ShapeError
from halfbyte.formats.codebooks import MOMENT1_8BIT, MOMENT2_8BIT
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.adamw import NativeBatch
from halfbyte.kernels.cpu.library import ISAS, Missing
from halfbyte.kernels.reference.adamw import ReferenceBatch, round_stochastically
from halfbyte.kernels.slots import KINDS, Slot, make_options, random_keys
from halfbyte.optim.states import allocate_plain, new_state, slot_of

NATIVE = cpu.native_library()
GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# Odd first; around a vector, a block and a piece of work.
SHAPES = ((1,), (17,), (127,), (255,), (256,), (257,), (7, 333), (101, 41), (4095,), (4097,), (64, 256))

pytestmark = pytest.mark.skipif(isinstance(NATIVE, Missing), reason=getattr(NATIVE, "reason", ""))


HERE = () if isinstance(NATIVE, Missing) else NATIVE.isas()


@pytest.fixture(params=[isa for isa in HERE if isa in ISAS[:3]])  # the wider ones step as avx512 does
def isa(request):
    before = NATIVE.isa
    NATIVE.use(request.param)
    yield request.param
    NATIVE.use(before)


def twins(shape, kind, dtype, master):
    """Two slots with equal contents and memory of their own."""
    first = torch.randn(shape).to(dtype)
    return [
        slot_of(p, new_state(p, kind, master=master, allocate=allocate_plain), 0)
        for p in (first.clone(), first.clone())
    ]


def tensors(slot):
    names = ("param", "moment1", "moment2", "scale1", "scale2", "columns", "master")
    return {name: getattr(slot, name) for name in names if getattr(slot, name) is not None}


def assert_equal(a: Slot, b: Slot, *context):
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, tensors(b)[name]), (name, *context)


def step(batches, grad, number, group=GROUP):
    options = [make_options(group, number, 0.7)]
    keys = random_keys(3, np.array([number]), np.array([0]))
    for batch in batches:
        batch.step([grad], options, [0], keys)


@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_reference(isa, kind, dtype, master):
    torch.manual_seed(0)
    for shape in SHAPES:
        expected, found = twins(shape, kind, dtype, master)
        batches = [ReferenceBatch([expected]), NativeBatch(NATIVE, [found])]
        for number in range(1, 6):
            grad = torch.randn(shape) * torch.rand(shape) ** 4
            if number == 3:
                grad.view(-1)[::3] = 0
            norms = [batch.norms([grad])[0] for batch in batches]
            assert norms[0] == pytest.approx(norms[1], rel=1e-14 * grad.numel())
            step(batches, grad.bfloat16() if number == 4 else grad, number)
            assert_equal(expected, found, shape, number)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_gradients_and_settings(isa, kind):
    torch.manual_seed(1)
    for scale in (0.0, 1e-40, 1e-30, 1e-18, 1e15, 1e18):
        for group in (GROUP, {**GROUP, "betas": (0.0, 0.0)}, {**GROUP, "betas": (0.4, 0.999), "eps": 1e-3}):
            expected, found = twins((600,), kind, torch.float32, False)
            batches = [ReferenceBatch([expected]), NativeBatch(NATIVE, [found])]
            for number in range(1, 4):
                step(batches, torch.randn(600) * scale, number, group)
                assert_equal(expected, found, scale, group)


@pytest.mark.parametrize("book", [MOMENT1_8BIT, MOMENT2_8BIT], ids=lambda book: book.name)
def test_codes_at_every_threshold(isa, book):
    """Numbers at, just below and just above each midpoint get the code that a search finds."""
    thresholds = book.thresholds()
    signs = (1.0, -1.0) if book is MOMENT1_8BIT else (1.0,)
    values = torch.cat([thresholds, thresholds.nextafter(torch.tensor(2.0)), thresholds.nextafter(torch.tensor(-2.0))])
    values = torch.cat([sign * values for sign in signs])
    # One number of 1 in each block, so that nothing is scaled; beta = 0 lets the gradient through unchanged.
    blocks = values[: values.numel() // 255 * 255].view(-1, 255)
    wanted = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1).reshape(-1)
    grad = wanted if book is MOMENT1_8BIT else wanted.clamp(min=0).double().sqrt().float()
    expected, found = twins((wanted.numel(),), "8bit", torch.float32, False)
    batches = [ReferenceBatch([expected]), NativeBatch(NATIVE, [found])]
    options = make_options({**GROUP, "betas": (0.0, 0.0)}, 1, 1.0)
    for batch in batches:
        batch.step([grad], [options], [0], np.zeros((1, 2), np.uint32))
    assert_equal(expected, found)
    if book is MOMENT1_8BIT:
        assert torch.equal(found.moment1, torch.bucketize(wanted, thresholds).to(torch.uint8))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 4).map(lambda n: n * 256))
@settings(max_examples=30, deadline=None)
def test_stochastic_rounding_goes_to_a_neighbour(low, high, first):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.001, 3.4e38, -3.4e38, 1e-39, float("inf"), float("nan")])
    rounded = round_stochastically(x, first, (low, high))
    down = (x.view(torch.int32) >> 16).to(torch.int16)
    up = (down.int() + 1).to(torch.int16)
    found = rounded.view(torch.int16)
    assert ((found == down) | (found == up)).all()
    exact = (x.view(torch.int32) & 0xFFFF) == 0
    assert (found == down)[exact].all() and not torch.isinf(rounded[5:7]).any()


def test_what_does_not_belong_together_is_refused():
    def slot(**changes):
        p = torch.zeros(300)
        made = slot_of(p, new_state(p, "8bit", master=False, allocate=allocate_plain), 0)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    for name, value in (
        ("moment1", torch.zeros(299, dtype=torch.uint8)),
        ("moment2", torch.zeros(300)),
        ("scale1", torch.zeros(1)),
        ("scale2", None),
        ("master", torch.zeros(300, dtype=torch.float64)),
        ("columns", torch.zeros(2)),
        ("moment1", torch.zeros(600, dtype=torch.uint8)[::2]),
        ("first", 7),
    ):
        with pytest.raises(ShapeError):
            NativeBatch(NATIVE, [slot(**{name: value})])
    options, keys = [make_options(GROUP, 1, 1.0)], np.zeros((1, 2), np.uint32)
    for grad in (torch.zeros(299), torch.zeros(300, device="meta"), torch.zeros(300).to_sparse()):
        with pytest.raises(ShapeError, match="a gradient is"):
            NativeBatch(NATIVE, [slot()]).step([grad], options, [0], keys)
    moved = slot()
    batch = NativeBatch(NATIVE, [moved])
    batch.step([torch.zeros(300)], options, [0], keys)
    for data in (torch.zeros(299), torch.zeros(300, dtype=torch.float16)):
        other = slot()
        other.param = data
        with pytest.raises(ShapeError, match="a parameter is"):
            NativeBatch(NATIVE, [other]).step([torch.zeros(data.shape)], options, [0], keys)
