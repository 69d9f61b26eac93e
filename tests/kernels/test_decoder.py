"""The decoder step: torch operations against transformers' way of writing them, native kernels against both."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from networks import SHAPES, VOCABULARY, branches, matrix, moved, network

from halfbyte.errors import ShapeError
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.decoder import PARTS, STEP_ROWS, Branch, Cache
from halfbyte.kernels.reference import decoder as reference
from halfbyte.kernels.reference.decoder import TorchDecoder

NATIVE = cpu.native_library()
pytestmark = pytest.mark.skipif(not isinstance(NATIVE, Native), reason="there is no native library")


def both(net, dtype=torch.float32, cache_dtype=torch.float32, slots=3):
    caches = [Cache.empty(net, slots, cache_dtype) for _ in range(2)]
    return TorchDecoder(net, caches[0], dtype), NativeDecoder(NATIVE, net, caches[1], dtype)


def close(got, wanted, digits=2e-4):
    """Float32 sums of at most 320 terms in another order, through two layers; logits are around 1."""
    assert got.dtype == torch.float32
    assert torch.allclose(got, wanted, rtol=digits, atol=digits), (got - wanted).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 5, 70])
def test_native_equals_torch_one_token_at_a_time_and_many(isa, shape, window):
    """100 tokens cross the borders of key blocks (16) and of what attention takes at once (64)."""
    net = network(shape, window=window, norms=window == 5, bias=window == 70)
    reference, native = both(net)
    tokens = torch.randint(VOCABULARY, (100,)).tolist()
    wanted = reference.step(tokens, [0] * 100, list(range(100)))
    singly = [native.step([token], [1], [at]) for at, token in enumerate(tokens[:67])]
    close(torch.cat(singly), wanted[:67])
    close(native.step(tokens[67:], [1] * 33, list(range(67, 100))), wanted[67:])
    # The reference, too, gives the same numbers in pieces as in one.
    pieces = [reference.step(tokens[a:b], [2] * (b - a), list(range(a, b))) for a, b in ((0, 3), (3, 60), (60, 100))]
    close(torch.cat(pieces), wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_and_dense_matrices(isa, activation, packed):
    net = network("groups of two", activation=activation, packed=packed)
    reference, native = both(net)
    close(native.step([1, 2, 3], [0, 1, 2], [0] * 3), reference.step([1, 2, 3], [0, 1, 2], [0] * 3))


def test_rows_of_several_slots_do_not_see_each_other(isa):
    net = network("groups of two")
    _, native = both(net)
    alone = [torch.cat([native.step([t], [slot], [at]) for at, t in enumerate(ids)]) for slot, ids in enumerate(IDS)]
    _, native = both(net)
    rows = [(t, slot, at) for slot, ids in enumerate(IDS) for at, t in enumerate(ids)]
    together = native.step(*map(list, zip(*rows, strict=True)))
    close(together, torch.cat(alone))


IDS = ([5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_mix_of_adapters(isa, dtype):
    net = network("groups of two", bias=True)
    reference, native = both(net)
    adapters = [branches(net, 1, dtype), branches(net, 7, dtype, skip=("value", "down")), branches(net, 64, dtype)]
    mixes = [[(0, 1.0)], [(2, -0.5), (1, 2.0)], []]
    for decoder in (reference, native):
        decoder.set_adapters(adapters)
    got, wanted = (d.step([3, 4, 5], [0, 1, 2], [0, 0, 0], mixes) for d in (native, reference))
    # bf16 adapters: the reference rounds x, x A and the branch to 8 bits, the native step nothing.
    close(got, wanted, 2e-4 if dtype == torch.float32 else 0.1)
    for decoder in (reference, native):
        decoder.set_adapters([])
    plain = [d.step([3, 4, 5], [0, 1, 2], [0, 0, 0]) for d in (native, reference)]
    close(*plain)
    close(plain[0][2:], got[2:])  # the row without adapters did not notice the others'
    assert not torch.allclose(plain[0][:2], got[:2], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rows", [3, 17, 20, 33, 64, STEP_ROWS])
def test_bfloat16_activations_stay_within_their_rounding(isa, rows):
    """Two layers of products whose inputs are rounded to 2**-9; logits around 1, sums of squares of 9 roundings."""
    net = network("groups of two")
    exact, _ = both(net)
    _, native = both(net, torch.bfloat16, torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (rows,)).tolist()
    got, wanted = (d.step(tokens, [0] * rows, list(range(rows))) for d in (native, exact))
    assert (got - wanted).square().mean().sqrt() < 9 * 2**-9 * wanted.square().mean().sqrt()
    assert not torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_some_rows_are_those_rows(isa, dtype):
    net = network("groups of two")
    rows = [1] * 70, [0] * 70, list(range(70))
    for decoder in both(net, dtype):
        whole = decoder.step(*rows)
        for wanted in ([69], [0, 33, 5], list(range(70)), ()):
            got = decoder.step(*rows, wanted=wanted)
            assert got.shape == (len(wanted), VOCABULARY)
            # Fewer rows may take another kernel, whose sums are in another order.
            close(got, whole[list(wanted)], 2e-4 if dtype == torch.float32 else 0.1)


def test_a_step_says_where_its_time_went():
    net = network("groups of two")
    for decoder in both(net):
        before = dict(decoder.seconds)
        began = time.perf_counter()
        decoder.step([1] * 40, [0] * 40, list(range(40)))
        took = time.perf_counter() - began
        spent = {part: seconds - before[part] for part, seconds in decoder.seconds.items()}
        assert tuple(spent) == PARTS
        assert all(seconds > 0 for seconds in spent.values())
        assert sum(spent.values()) <= took


def test_an_8_bit_cache_rounds_each_key_and_value_to_one_part_in_254(isa):
    net = network("groups of two", layers=1)
    reference, native = both(net, cache_dtype=torch.int8)
    exact, _ = both(net)
    tokens = torch.randint(VOCABULARY, (90,)).tolist()
    rows = [list(tokens), [1] * 90, list(range(90))]
    close(native.step(*rows), exact.step(*rows), 0.03)
    reference.step(*rows)
    for name in ("keys", "values"):  # what is stored is the same code, or its neighbour
        ours, theirs = (getattr(d.cache, name)[:, 1].int() for d in (native, reference))
        at = (slice(None), slice(None), slice(0, 5)) if name == "keys" else (slice(None), slice(None), slice(0, 80))
        assert (ours[at] - theirs[at]).abs().max() <= 1
    assert torch.allclose(
        native.cache.value_scales[:, 1, :, :90], reference.cache.value_scales[:, 1, :, :90], rtol=1e-4
    )


def test_bits_do_not_depend_on_threads_or_on_the_run(isa):
    net = network("groups of seven")
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        _, native = both(net)
        native.set_adapters([branches(net, 0)])
        results.append(native.step(list(range(40)), [0] * 20 + [1] * 20, [*range(20)] * 2))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_copied_slot_goes_on_as_the_original():
    net = network("groups of two")
    for cache_dtype in (torch.float32, torch.int8):
        _, native = both(net, cache_dtype=cache_dtype)
        native.step(list(range(30)), [0] * 30, list(range(30)), wanted=())
        native.cache.copy(0, 2, 21)
        assert torch.equal(native.step([7], [2], [21]), native.step([7], [0], [21]))


def test_bad_input_is_refused_before_a_pointer_is_handed_out():
    net = network("groups of two")
    _, native = both(net)
    for arguments in (
        ([], [], []),
        ([1] * (STEP_ROWS + 1), [0] * (STEP_ROWS + 1), list(range(STEP_ROWS + 1))),
        ([1], [3], [0]),
        ([1], [-1], [0]),
        ([1], [0], [160]),
        ([1], [0], [-1]),
        ([1, 2], [0], [0, 1]),
        ([1], [0], [0], [[(0, 1.0)]]),
        ([1], [0], [0], [[], []]),
        ([1], [0], [0], None, [1]),
        ([1], [0], [0], None, [-1]),
        ([1], [0], [0], None, [0, 0]),
    ):
        with pytest.raises(ShapeError):
            native.step(*arguments)
    with pytest.raises(IndexError):
        native.step([VOCABULARY], [0], [0])
    with pytest.raises(ShapeError, match="adapter matrices"):
        native.set_adapters([{(0, "query"): Branch(torch.randn(4, 63), torch.randn(80, 4))}])
    cache = Cache.empty(net, 1, torch.float32)
    for change in (
        {"final_norm": net.final_norm[:-1]},
        {"cosine": net.cosine[:-1].clone()},
        {"heads": 3},
        {"head": matrix(VOCABULARY, 128)},
        {"sine": net.sine.double()},
        {"table": net.table[:, 1:]},
    ):
        with pytest.raises(ShapeError):
            NativeDecoder(NATIVE, dataclasses.replace(net, **change), cache, torch.float32)
    with pytest.raises(ShapeError, match="float32 or bfloat16"):
        NativeDecoder(NATIVE, net, cache, torch.float16)
    with pytest.raises(ShapeError):
        NativeDecoder(NATIVE, net, Cache(cache.keys, cache.values.transpose(1, 2)), torch.float32)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_torch_operations_ask_a_device_for_nothing_but_the_logits(monkeypatch, cache_dtype):
    """On tensors without data, which can neither be read nor meet one of the CPU: as on a card, in any order."""
    monkeypatch.setattr(reference, "narrow", lambda weight, dtype: weight.to(dtype))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    net = moved(network("groups of two", norms=True, bias=True, window=5), "meta")
    decoder = TorchDecoder(net, Cache.empty(net, 3, cache_dtype), torch.bfloat16)
    decoder.set_adapters([moved(branches(net, 4), "meta")])
    rows = [1] * 40, [0] * 20 + [2] * 20, [*range(20)] * 2
    assert decoder.step(*rows, [[(0, 1.0)]] * 40, [39]).shape == (1, VOCABULARY)
    assert decoder.step([1] * 4, [0] * 4, [20, 21, 22, 23]).shape == (4, VOCABULARY)
    assert tuple(decoder.seconds) == ("forward",)
