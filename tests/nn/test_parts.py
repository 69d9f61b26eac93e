"""Which implementation computes which part, on machines that are not this one: each choice has a reason."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.nn import parts

HERE = Path(__file__).parent


@pytest.fixture
def machine(monkeypatch):
    """Says what is installed, and what the card can do."""

    def make(*packages, capability=(8, 0), cuda=True, liger="0.8.5", triton="3.2.0"):
        versions = {"liger-kernel": liger, "flash-attn": "2.8.3", "triton": triton}
        found = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn"}
        modules = {found.get(package, package) for package in packages}
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
        monkeypatch.setattr(parts, "version", versions.__getitem__)
        monkeypatch.setattr(parts, "_liger_operations", lambda: "liger's")
        forget()

    def forget():
        parts.liger_available.cache_clear()
        parts._compiles_bfloat16.cache_clear()

    yield make
    forget()


def names(device):
    return {choice.op: choice.name for choice in parts.chosen_parts() if choice.device == device}


OWN = dict.fromkeys(parts.PARTS, "halfbyte")
PLAIN = {**dict.fromkeys(parts.PARTS, "transformers"), "loss": "halfbyte"}
LIGER = dict.fromkeys(parts.PARTS, "liger")


def test_every_part_is_named_with_a_reason():
    choices = parts.chosen_parts()
    assert {(c.op, c.device) for c in choices} == {(p, d) for p in ("attention", *parts.PARTS) for d in ("cpu", "cuda")}
    assert all(choice.name and choice.reason for choice in choices)


@pytest.mark.parametrize(
    ("packages", "options", "expected", "said"),
    [
        ((), {"cuda": False}, PLAIN, "this torch is built without CUDA"),
        ((), {}, PLAIN, "triton is not installed; pip install triton"),
        (("triton",), {}, PLAIN, "liger-kernel is not installed; pip install liger-kernel"),
        (("liger-kernel",), {}, PLAIN, "triton is not installed"),
        (("triton", "liger-kernel"), {}, LIGER, "liger-kernel 0.8.5"),
        (("triton", "liger-kernel"), {"liger": "0.7.9"}, PLAIN, "0.7.9 is too old; pip install 'liger-kernel>=0.8'"),
        (("triton", "liger-kernel"), {"liger": "0.10.0rc1"}, LIGER, "liger-kernel 0.10.0rc1"),
        (("triton", "liger-kernel"), {"liger": "1.0"}, LIGER, "liger-kernel 1.0"),
    ],
)
def test_norms_gates_rotations_and_loss(machine, packages, options, expected, said):
    machine(*packages, **options)
    assert names("cuda") == {**expected, "attention": "sdpa"}
    assert names("cpu") == {**OWN, "attention": "sdpa"}
    for choice in parts.chosen_parts():
        if choice.device == "cuda" and choice.op != "attention":
            assert said in f"{choice.reason}; {choice.remedy}"


def test_the_reference_can_be_asked_for(machine, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    machine("triton", "liger-kernel")
    assert names("cuda") == {**PLAIN, "attention": "sdpa"}


@pytest.mark.parametrize(
    ("packages", "options", "dtype", "expected"),
    [
        (("triton", "liger-kernel"), {}, torch.bfloat16, "liger's"),
        (("triton", "liger-kernel"), {"capability": (7, 5)}, torch.float16, "liger's"),
        (("triton", "liger-kernel"), {"capability": (7, 5)}, torch.bfloat16, None),
        (("triton", "liger-kernel"), {"capability": (7, 5), "triton": "3.3.0+git"}, torch.bfloat16, "liger's"),
        ((), {"capability": (9, 0)}, torch.float32, None),
    ],
)
def test_operations_go_by_where_a_tensor_is(machine, packages, options, dtype, expected):
    machine(*packages, **options)
    assert parts.operations(torch.zeros(1, dtype=dtype)) is parts.OWN
    with FakeTensorMode():
        assert parts.operations(torch.zeros(1, dtype=dtype, device="cuda")) == expected
    assert parts.operations(torch.zeros(1, dtype=dtype, device="meta")) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "flash_attention_2"),
        ({"packages": ()}, "sdpa"),
        ({"packed": True}, "sdpa"),
        ({"device": "cpu"}, "sdpa"),
        ({"capability": (7, 5)}, "sdpa"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"supports": False}, "sdpa"),
        ({"chosen": "eager"}, "eager"),
        ({"chosen": "flex_attention"}, "flex_attention"),
    ],
)
def test_flash_attention_where_it_fits(machine, change, expected):
    case = {
        "packages": ("flash-attn",),
        "packed": False,
        "device": "cuda",
        "capability": (8, 0),
        "dtype": torch.bfloat16,
        "supports": True,
        "chosen": "sdpa",
        **change,
    }
    machine(*case["packages"], capability=case["capability"])
    model = SimpleNamespace(
        dtype=case["dtype"],
        _supports_flash_attn=case["supports"],
        config=SimpleNamespace(_attn_implementation=case["chosen"]),
    )
    model.set_attn_implementation = lambda name: setattr(model.config, "_attn_implementation", name)
    parts.set_attention(model, torch.device(case["device"]), packed=case["packed"])
    assert model.config._attn_implementation == expected


def test_flash_attention_is_told(machine):
    machine("flash-attn")
    assert names("cuda")["attention"] == "flash_attention_2"
    machine()
    (choice,) = [c for c in parts.chosen_parts() if (c.op, c.device) == ("attention", "cuda")]
    assert "flash-attn is not installed" in choice.reason and "pip install flash-attn" in choice.remedy


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of work, on a machine that may have other work
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_liger_kernels_operations_under_tritons_interpreter(tmp_path):
    """`tests/nn/liger`, which a card runs as it is; the interpreter is chosen before triton is imported."""
    options = ["-q", "-W", "ignore", "-o", f"cache_dir={tmp_path}", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "liger"), *options],
        capture_output=True,
        text=True,
        timeout=850,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "40 passed" in done.stdout
