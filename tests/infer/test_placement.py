"""Devices by name, and how many sequences a card has memory for; cards are described, not had."""

from __future__ import annotations

import pytest
import torch
from networks import moved, network

from halfbyte.errors import RequestError
from halfbyte.infer import Engine, SamplingParams, few_rows
from halfbyte.infer.placement import choose_device, slots_that_fit, workspace
from halfbyte.infer.scheduler import CHUNK_ALONE
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu import Missing
from halfbyte.kernels.decoder import Cache
from halfbyte.models import HalfbyteConfig, load_model

MIB = 2**20


@pytest.fixture
def cards(monkeypatch):
    def cards(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return cards


def test_the_first_card_is_taken_where_there_is_one(cards):
    cards(0)
    assert choose_device(None) == choose_device("cpu") == torch.device("cpu")
    cards(2)
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "said"),
    [
        (0, "cuda", "'cuda' is not there: torch sees no card; choose cpu"),
        (1, "cuda:1", "'cuda:1' is not there: torch sees one card, cuda:0"),
        (3, "cuda:3", "'cuda:3' is not there: torch sees cards 0 to 2"),
        (1, "gpu", "'gpu' is not offered; choose cpu, cuda or cuda:NUMBER"),
        (1, "cuda:-1", "'cuda:-1' is not offered"),
        (1, "", "'' is not offered"),
    ],
)
def test_a_device_that_is_not_there_is_refused(cards, count, name, said):
    cards(count)
    with pytest.raises(RequestError, match=said):
        choose_device(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_slot_takes_what_an_empty_cache_does(dtype):
    net = network("groups of seven")
    assert 5 * Cache.bytes_of_slot(net, dtype) == Cache.empty(net, 5, dtype).nbytes


def test_slots_are_as_many_as_there_is_room_for(monkeypatch):
    net = network("groups of two")
    assert slots_that_fit(net, torch.float32, 1000, torch.float32) == 1000  # the CPU takes memory when it is used
    monkeypatch.setitem(CHUNK_ALONE, "meta", 2048)
    net = moved(net, "meta")
    reserve = 256 * MIB + workspace(net, torch.bfloat16, 2048)
    assert workspace(net, torch.bfloat16, 2048) == 2 * (2048 * (4 * 64 + 3 * 192 + 4 * 80) + 64 * 192)
    each = Cache.bytes_of_slot(net, torch.bfloat16)
    for free, unused, fit in ((3 * each, 0, 3), (2 * each, each + 1, 3), (4 * each - 1, 0, 3), (99 * each, 0, 8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free + reserve, 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, unused=unused: 7 + unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
        assert slots_that_fit(net, torch.bfloat16, 8, torch.bfloat16) == fit
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (each // 2 + reserve, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    with pytest.raises(RequestError, match="give max_length 80 or less, or cache_dtype int8"):
        slots_that_fit(net, torch.bfloat16, 8, torch.bfloat16)


def test_an_engine_says_what_a_device_does_not_offer(tiny_llama, cards):
    with pytest.raises(RequestError, match="is offered on a card only"):
        Engine(tiny_llama, device="cpu", dtype="float16")
    cards(1)
    with pytest.raises(RequestError, match="max_memory is for the CPU"):
        Engine(tiny_llama, max_memory=1 << 30)


def test_an_engine_may_be_made_in_somebodys_inference_mode(tiny_llama):
    """There torch makes inference tensors, which a packed weight's views cannot be."""
    model = load_model(tiny_llama, quantization=HalfbyteConfig(block_size=32))
    with torch.inference_mode(), Engine(model) as engine:
        (answer,) = engine.generate(["abc"], SamplingParams(max_tokens=3, ignore_end=True))
    assert len(answer.choices) == 3


def test_what_takes_steps_is_chosen_with_a_reason(monkeypatch):
    net = network("groups of two")
    cache = Cache.empty(net, 1, torch.float32)
    away = moved(net, "meta")
    decoder, said = few_rows.few_rows_decoder(away, Cache.empty(away, 1, torch.float32), torch.float32, None)
    if not torch.backends.cuda.is_built():
        assert decoder is None
        assert said.startswith("torch operations, because this torch is built without CUDA; ")
    monkeypatch.setattr(cpu, "native_library", lambda: Missing("there is no compiler", "install one"))
    decoder, said = few_rows.few_rows_decoder(net, cache, torch.float32, None)
    assert (decoder, said) == (None, "torch operations, because there is no compiler; install one")
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    decoder, said = few_rows.few_rows_decoder(net, cache, torch.float32, None)
    assert (decoder, said) == (None, "torch operations, because HALFBYTE_KERNELS=reference asks for it")
    assert [(choice.device, choice.name) for choice in few_rows.chosen_decoders()] == [
        ("cpu", "torch"),
        ("cuda", "torch"),
    ]
