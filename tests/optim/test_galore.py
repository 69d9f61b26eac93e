"""GaLore: the steps of galore-torch's own optimizer, with every kind of state, and stopped and gone on with."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import CheckpointError, NonFiniteError, RequestError
from halfbyte.optim import AdamW, GaLoreAdamW

galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")

SHAPES = {"tall": (33, 17), "wide": (5, 70), "square": (24, 24), "below the rank": (3, 9), "bias": (33,)}
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-12}
INTERVAL = 3


def weights(scale=1.0, shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape) * scale) for shape in shapes.values()]


def groups(params, rank=4, **keys):
    return [
        {"params": [p for p in params if p.ndim == 2], "rank": rank, **keys},
        {"params": [p for p in params if p.ndim != 2]},
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def ours(params, **options):
    matrices, rest = groups(params)
    return GaLoreAdamW([matrices, {**rest, "rank": 0}], update_interval=INTERVAL, **{**SETTINGS, **options})


def test_the_steps_of_galore_torch():
    """Both compute the same in float32 and in another order: a few roundings a step, over 7 steps, of what moved."""
    expected, found = weights(), weights()
    peer = galore_torch.GaLoreAdamW(
        groups(expected, update_proj_gap=INTERVAL, scale=0.25, proj_type="std"),
        weight_decay=0.1,
        no_deprecation_warning=True,
        **SETTINGS,
    )
    optimizer = ours(found, weight_decay=0.1)
    for step in range(7):
        for params, stepped in ((expected, peer), (found, optimizer)):
            set_gradients(params, step)
            stepped.step()
    for name, p, q, start in zip(SHAPES, expected, found, weights(), strict=True):
        moved = (p - start).norm()
        assert moved > 0
        # AdamW decays what is not projected before its update, galore-torch after it: lr * decay of what moved.
        bound = 1e-5 if p.ndim == 2 else 2 * SETTINGS["lr"] * 0.1
        assert (p - q).norm() / moved < bound, name


@pytest.mark.parametrize("state", ["float32", "8bit", "4bit"])
@pytest.mark.parametrize("paged", [False, "file"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_and_gone_on_with_it_gives_the_same_bits(state, paged, stop):
    shapes = {"tall": (1200, 17), "wide": (30, 1100), "bias": (5000,)}  # states large enough for codes
    whole, parted = weights(shapes=shapes), weights(shapes=shapes)
    options = {"state": state, "paged": paged}
    uninterrupted, first = ours(whole, **options), ours(parted, **options)
    for step in range(6):
        set_gradients(whole, step)
        uninterrupted.step()
        if step == stop:
            saved = first.state_dict()
            first = ours(parted, **options)
            first.load_state_dict(saved)
        set_gradients(parted, step)
        first.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, parted, strict=True))
    kinds = {"float32": "exp_avg", "8bit": "state1", "4bit": "codes1"}
    adamw = first.state_dict()["adamw"]["state"]
    assert kinds[state] in adamw[0]


def test_low_bit_state_follows_float32():
    shapes = {"tall": (1200, 40), "wide": (40, 1200)}
    after = {}
    for state in ("float32", "8bit", "4bit"):
        params = weights(shapes=shapes)
        optimizer = ours(params, state=state)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
        after[state] = params
    for at, start in enumerate(weights(shapes=shapes)):
        moved = (after["float32"][at] - start).norm()
        for state, most in (("8bit", 0.05), ("4bit", 0.4)):  # as for AdamW itself, benchmarks/optimizer_step.py
            assert 0 < (after[state][at] - after["float32"][at]).norm() / moved < most


def test_a_rank_of_zero_is_plain_adamw_and_its_settings_can_change():
    expected, found = weights(), weights()
    plain = AdamW(expected, **SETTINGS, weight_decay=0.1)
    optimizer = GaLoreAdamW(found, rank=0, **SETTINGS, weight_decay=0.1)
    for step in range(3):
        for params, stepped in ((expected, plain), (found, optimizer)):
            set_gradients(params, step)
            stepped.param_groups[0]["lr"] = 0.01 / (step + 1)  # what a scheduler does
            stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(expected, found, strict=True))


def test_a_weight_without_a_gradient_stays_and_a_closure_is_called():
    params = weights()
    optimizer = ours(params)
    start = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[0].grad = None
    assert optimizer.step(lambda: 3.0) == 3.0
    moved = [not torch.equal(p, q) for p, q in zip(params, start, strict=True)]
    assert moved == [False, True, True, True, True]
    assert len(optimizer.state_dict()["state"]) == 3


def test_what_cannot_be_projected_is_a_sentence():
    (bias,) = (p for p in weights() if p.ndim == 1)
    with pytest.raises(RequestError, match=r"float32 matrices, and a parameter is torch.float32 \(33,\)"):
        GaLoreAdamW([bias])
    with pytest.raises(RequestError, match="put it into a group of rank 0"):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))])
    for keys, sentence in (
        ({"rank": -1}, "rank is -1; give a whole number of at least 0"),
        ({"rank": 2.5}, "rank is 2.5; give a whole number"),
        ({"update_interval": 0}, "update_interval is 0; give a whole number of at least 1"),
        ({"scale": 0}, "scale is 0; give a number above 0"),
        ({"state": "2bit"}, "state is '2bit', which is not offered"),
    ):
        with pytest.raises(RequestError, match=sentence):
            GaLoreAdamW([torch.nn.Parameter(torch.zeros(4, 4))], **keys)


def test_a_gradient_that_is_not_finite_changes_nothing():
    params = weights()
    named = [(f"w{n}", p) for n, p in enumerate(params) if p.ndim == 2]
    optimizer = GaLoreAdamW(named, rank=4, **SETTINGS)
    set_gradients(params, 0)
    params[1].grad[2, 3] = float("nan")
    start = [p.detach().clone() for p in params]
    with pytest.raises(NonFiniteError, match="the gradient of w1 is not finite; no parameter was changed"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    params = weights()
    optimizer = ours(params)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = GaLoreAdamW([{**group, "rank": min(group.get("rank", 0), 2)} for group in groups(params)], **SETTINGS)
    with pytest.raises(CheckpointError, match=r"projection is \(4, 17\) in the .* has to be \(2, 17\)"):
        other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="no optimizer state of GaLore: it lacks adamw"):
        other.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    with pytest.raises(CheckpointError, match="it lacks state and param_groups"):
        other.load_state_dict({"adamw": saved["adamw"]})
    with pytest.raises(CheckpointError, match=r"a projection is missing in the .* has to be \(4, 17\)"):
        without = {n: {key: v for key, v in state.items() if key != "basis"} for n, state in saved["state"].items()}
        ours(params).load_state_dict({**saved, "state": without})
    with pytest.raises(CheckpointError, match=r"groups of \[.*\] parameters, the optimizer \[5\]"):
        GaLoreAdamW(params, rank=0).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="has 5 parameters, the optimizer 1"):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(4, 4))]).load_state_dict(saved)
    assert not other.state
    assert not other.adamw.state
