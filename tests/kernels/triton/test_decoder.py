"""The decoder step on Triton's kernels against torch's operations, which `tests/infer` compares with transformers."""

from __future__ import annotations

import pytest
import torch
from networks import VOCABULARY, branches, moved, network

from halfbyte.errors import ShapeError
from halfbyte.kernels.decoder import Branch, Cache
from halfbyte.kernels.reference.decoder import TorchDecoder

triton = pytest.importorskip("triton")
IDS = ([5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16])


@pytest.fixture
def both(device):
    """The reference on the CPU and the kernels on the device, for one network."""
    from halfbyte.kernels.triton.decoder import TritonDecoder

    def both(net, dtype=torch.float32, cache_dtype=torch.float32, slots=3):
        there = moved(net, device)
        reference = TorchDecoder(net, Cache.empty(net, slots, cache_dtype), dtype)
        return reference, TritonDecoder(there, Cache.empty(there, slots, cache_dtype), dtype)

    return both


def close(got, wanted, digits=2e-4):
    """Float32 sums of at most 320 terms in another order, through two layers; logits are around 1."""
    assert got.dtype == torch.float32
    assert torch.allclose(got, wanted, rtol=digits, atol=digits), (got - wanted).abs().max().item()


@pytest.mark.parametrize(
    ("shape", "window", "norms", "bias"),
    [
        ("one head of keys for all", 0, False, False),
        ("groups of two", 5, True, False),
        ("groups of seven", 70, False, True),
        ("groups of eight", 0, False, False),
    ],
)
def test_equals_torch_one_token_at_a_time_and_many(both, shape, window, norms, bias):
    """100 tokens cross the borders of key blocks (16) and of what attention takes at once (64)."""
    net = network(shape, layers=1, window=window, norms=norms, bias=bias)
    reference, ours = both(net)
    tokens = torch.randint(VOCABULARY, (100,)).tolist()
    wanted = reference.step(tokens, [1] * 100, list(range(100)))
    close(ours.step(tokens[:6], [1] * 6, list(range(6))), wanted[:6])
    for part in ("keys", "values"):  # the reference's cache, and behind position 92 what nobody may read
        getattr(ours.cache, part).copy_(getattr(reference.cache, part))
    ours.cache.values[:, :, :, 93:] = float("inf")
    close(ours.step([tokens[93]], [1], [93]), wanted[93:94])
    close(ours.step(tokens[94:], [1] * 6, list(range(94, 100))), wanted[94:])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_and_dense_matrices(both, activation, packed):
    reference, ours = both(network("groups of two", activation=activation, packed=packed))
    close(ours.step([1, 2, 3], [0, 1, 2], [0] * 3), reference.step([1, 2, 3], [0, 1, 2], [0] * 3))


def test_rows_of_several_slots_do_not_see_each_other(both):
    """Twelve rows and four that fill up, which must not write into slot 0."""
    reference, ours = both(network("groups of two"))
    rows = [(t, slot, at) for slot, ids in enumerate(IDS) for at, t in enumerate(ids)]
    close(ours.step(*map(list, zip(*rows, strict=True))), reference.step(*map(list, zip(*rows, strict=True))))
    following = [20, 21, 22], [0, 1, 2], [len(ids) for ids in IDS]
    close(ours.step(*following), reference.step(*following))
    close(ours.step(*following, wanted=[2, 0]), reference.step(*following, wanted=[2, 0]))
    assert ours.step(*following, wanted=()).shape == (0, VOCABULARY)


def test_each_row_has_its_own_mix_of_adapters(both, device):
    net = network("groups of two", bias=True)
    reference, ours = both(net)
    adapters = [branches(net, 1), branches(net, 7, skip=("value", "down", "output")), branches(net, 150)]
    adapters.append({(1, "output"): Branch(torch.randn(0, 80), torch.randn(64, 0))})
    reference.set_adapters(adapters)
    ours.set_adapters([moved(one, device) for one in adapters])
    mixes = [[(0, 1.0)], [(2, -0.5), (1, 2.0)], []]
    rows = [3, 4, 5], [0, 1, 2], [0, 0, 0]
    got, wanted = (decoder.step(*rows, mixes) for decoder in (ours, reference))
    close(got, wanted)
    plain = reference.step(*rows)
    close(ours.step(*rows), plain)  # nobody asks for one
    ours.set_adapters([])
    close(ours.step(*rows), plain)
    assert not torch.allclose(plain[:2], got[:2], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rows", [1, 5])
def test_bfloat16_stays_within_its_rounding(both, rows):
    """Its error is some times torch's in bfloat16, which rounds as often, to half as much as the interpreter cuts off.

    Seen over six networks: 1.5 to 2.3 times.
    """
    net = network("groups of two", norms=True)
    exact, _ = both(net)
    rounded, ours = both(net, torch.bfloat16, torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (rows,)).tolist()
    wanted, rounded, got = (d.step(tokens, [0] * rows, list(range(rows))) for d in (exact, rounded, ours))
    assert 0 < (got - wanted).norm() < 4 * (rounded - wanted).norm()


def test_an_8_bit_cache_rounds_each_key_and_value_to_one_part_in_254(both):
    net = network("groups of two", layers=1)
    reference, ours = both(net, cache_dtype=torch.int8)
    exact, _ = both(net)
    tokens = torch.randint(VOCABULARY, (30,)).tolist()
    rows = [tokens, [1] * 30, list(range(30))]
    close(ours.step(*rows), exact.step(*rows), 0.03)
    reference.step(*rows)
    for name, at in (("keys", (0, 1, slice(None), slice(0, 1))), ("values", (0, 1, slice(None), slice(0, 30)))):
        stored, theirs = (getattr(d.cache, name)[at].cpu().int() for d in (ours, reference))
        assert (stored - theirs).abs().max() <= 1  # the same code, or its neighbour
        assert stored.abs().max() == 127
    for name in ("key_scales", "value_scales"):
        stored, theirs = (getattr(d.cache, name)[0, 1, :, :30].cpu() for d in (ours, reference))
        assert torch.allclose(stored, theirs, rtol=1e-4)


def test_what_does_not_exist_is_refused(both):
    _, ours = both(network("groups of two", layers=1))
    for arguments in (([], [], []), ([1], [3], [0]), ([1], [0], [160]), ([1], [0], [-1]), ([1], [0], [0], [[(0, 1)]])):
        with pytest.raises(ShapeError):
            ours.step(*arguments)
    with pytest.raises(IndexError, match="token 97 is not among the 97"):
        ours.step([VOCABULARY], [0], [0])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_a_graph_gives_what_the_first_run_gave(both, device, cache_dtype):
    """The first step of as many rows is launched, the second captured, the third replayed; adapters change between."""
    if device == "cpu":
        pytest.skip("only a card captures graphs")
    net = network("groups of two")
    _, ours = both(net, cache_dtype=cache_dtype)
    for adapters in ([], [moved(branches(net, 8), device)]):
        ours.set_adapters(adapters)
        mixes = [[(0, 0.5)]] * 3 if adapters else None
        runs = [ours.step([1, 2, 3], [0, 1, 2], [at] * 3, mixes) for at in (0, 0, 0)]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])
        graphless = ours.step([4], [0], [1])
        assert torch.equal(ours.step([4], [0], [1]), graphless)
