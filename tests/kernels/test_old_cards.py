"""Cards that Triton does not compile for: torch operations run there, and whoever asks is told why."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.cli.info import machine_info
from halfbyte.infer import few_rows
from halfbyte.kernels import adamw, reference, registry, tuning
from halfbyte.nn import parts

CARD = torch.device("cuda", 0)
SAID = "GTX 1080 has compute capability 6.1, and Triton's kernels need 7.5"


@pytest.fixture
def card(monkeypatch):
    """One card, described and not had."""

    def card(capability):
        tuning.too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GTX 1080")

    yield card
    tuning.too_old.cache_clear()


@pytest.mark.parametrize(
    ("capability", "said"), [((6, 1), SAID), ((7, 0), SAID.replace("6.1", "7.0")), ((7, 5), ""), ((12, 0), "")]
)
def test_a_card_is_too_old_below_7_5(card, capability, said):
    card(capability)
    assert tuning.too_old(CARD) == said
    assert tuning.too_old(torch.device("cpu")) == ""


def test_an_op_on_such_a_card_is_the_references(card, monkeypatch):
    weight, x = hb.quantize(torch.randn(6, 64)).packed(), torch.randn(3, 64)
    monkeypatch.setattr(registry, "too_old", lambda device: SAID)
    found = registry._triton_op("linear", *weight, 6, x, None)
    assert torch.equal(found, reference.OPS["linear"](*weight, 6, x, None))


def test_everything_that_chooses_asks(card, monkeypatch):
    card((6, 1))
    assert adamw.why_not_captured(CARD) == SAID
    network = type("Network", (), {"device": CARD})()
    assert few_rows._on_card(network, None, torch.float16) == (None, f"torch operations, because {SAID}")
    monkeypatch.setattr(parts, "liger_available", lambda: parts.Availability(True, "liger-kernel"))
    tensor = type("Tensor", (), {"is_cpu": False, "is_cuda": True, "device": CARD, "dtype": torch.float16})()
    assert parts.operations(tensor) is None


def test_info_says_it(card, monkeypatch):
    card((6, 1))
    properties = type("Properties", (), {"total_memory": 8e9})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert machine_info()["gpu"] == f"GTX 1080 (8 GB); {SAID}: torch operations run there instead"
