"""The suite that runs once, on a card: what fails costs its own row and nothing else, and peers get equal weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAND_IN = """
import peft, torch, transformers

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, **options):
        assert load_in_4bit and options["local_files_only"] and max_seq_length == 16, options
        assert options["use_gradient_checkpointing"] == "unsloth"
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name)
        assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", "<pad>")
        return transformers.AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), tokenizer

    @staticmethod
    def get_peft_model(model, r, target_modules, lora_alpha, use_gradient_checkpointing, random_state, **options):
        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
"""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def folder(tmp_path):
    """A small random model as the suite writes it for Unsloth, and the model."""
    from _gpu_models import random_llama, write_folder
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_llama(LlamaConfig(**sizes, vocab_size=96, max_position_embeddings=64), "halfbyte", "cpu")
    write_folder(model, tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def unsloth(tmp_path, monkeypatch):
    """Puts source code in the place of Unsloth, for processes that are started."""

    def install(source: str) -> None:
        (tmp_path / "peers" / "unsloth").mkdir(parents=True)
        (tmp_path / "peers" / "unsloth" / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "peers"), os.environ.get("PYTHONPATH", "")]))

    return install


def test_bitsandbytes_reads_the_folder_with_the_same_weights(folder):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    path, model = folder
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = loaded.get_submodule(name).weight
            decoded = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert decoded.dtype == torch.bfloat16
            assert torch.equal(decoded, module.weight.data.dequantize(torch.bfloat16)), name
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight), name


def test_the_step_in_unsloth_is_the_step_of_the_others(folder, unsloth):
    pytest.importorskip("bitsandbytes")
    from _gpu_models import with_adapter
    from _gpu_training import in_unsloth, timed_steps

    unsloth(STAND_IN)
    line = in_unsloth(folder[0], "offloaded", 120, "cpu", 16)
    ours = timed_steps(with_adapter(folder[1], "halfbyte", "kept"), "cpu", time.monotonic() + 60, 16)
    assert line.keys() == {"tokens/s", "peak GB", "loss"} == ours.keys()
    assert line["tokens/s"] > 0 and abs(line["loss"] - ours["loss"]) < 0.02, (line, ours)


@pytest.mark.parametrize(
    ("source", "seconds", "why"),
    [
        ("raise NotImplementedError('only blue cards\\nsecond line')", 60, "NotImplementedError: only blue cards"),
        ("import os; os._exit(9)", 60, "its process ended with 9: it said nothing"),
        ("import sys; sys.exit('libcuda is missing')", 60, "its process ended with 1: libcuda is missing"),
        ("import time; time.sleep(60)", 1, "out of time"),
        ("class FastLanguageModel: pass", 60, "AttributeError: type object 'FastLanguageModel' has no attribute"),
    ],
)
def test_what_fails_in_unsloth_is_its_row(tmp_path, unsloth, source, seconds, why):
    from _gpu_training import in_unsloth

    unsloth(source)
    line = in_unsloth(tmp_path / "nothing", "kept", seconds, "cpu")
    assert line.keys() == {"why not"} and line["why not"].startswith(why), line


def test_a_section_that_fails_leaves_the_others(tmp_path, capsys):
    from gpu_suite import Report

    report = Report(tmp_path / "result.json")
    assert report.section("first", lambda: {"value": 1}) == {"value": 1}
    assert report.section("second", lambda: 1 / 0) is None
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["first"] == {"value": 1} and "second" not in kept
    assert report.section("third", lambda: [2]) == [2]
    said = json.loads(report.text())
    assert said["third"] == [2] and said["failed"] == {"second": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert report.section("unshown", lambda: 3, show=lambda value: value.missing) == 3
    assert report.result["unshown"] == 3 and "unshown" in report.failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a card, the suite is run and not failed")
def test_a_machine_where_everything_fails(tmp_path, monkeypatch):
    """Every section is tried and named, and the last line is still JSON."""
    import gpu_suite

    monkeypatch.setattr(gpu_suite, "verified", lambda: {"plain": "ok", "shuffled": "wrong", "pairs": "ok"})
    report = gpu_suite.Report(tmp_path / "result.json")
    gpu_suite.measure(report, time.monotonic(), False)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["failed"].keys() >= {"machine", "verified, shuffled", "limits", "kernels", "experts"}
    assert "halfbyte, not measured" in kept["decode"]
    assert {step["why not"] for step in kept["training"]} == {"out of time"}
    gpu_suite.measure(report, time.monotonic(), True)
    assert "crossover" in report.failed


@pytest.fixture
def tiny(monkeypatch):
    """The suite with small sizes on the CPU, whatever it takes from CUDA replaced."""
    import contextlib

    import _gpu_models
    import gpu_suite

    def once(call):
        call()
        return 0.5

    sizes = {"SIZE": 64, "LARGE": (96, 64), "EXPERTS": (4, 32, 64, 2), "ROWS": (1, 2, 32, 64, 128), "DEVICE": "cpu"}
    changes = {"seconds": once, "changed_tuning": lambda **changes: contextlib.nullcontext()}
    changes["graph_seconds"] = lambda layers: len(layers) / 14
    for name, value in (sizes | changes).items():
        monkeypatch.setattr(gpu_suite, name, value)
    monkeypatch.setitem(_gpu_models.SHAPES, "7 B", (64, 128, 2, 4, 4))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu_suite


def test_every_line_is_measured(tiny):
    limits, variants = {"bytes": 1e6, "flops": 1e9}, ["shuffled", "pairs"]
    lines = tiny.kernels(limits, variants)
    assert all("ours" in line and line["share"] > 0 for line in lines), lines
    works = [line["work"] for line in lines]
    assert works[2:5] == ["1 row", "1 row, shuffled", "1 row, pairs"] and "2 rows, pairs" not in works
    assert works[-5:-2] == ["1 row, 96 x 64", "1 row, 96 x 64, shuffled", "1 row, 96 x 64, pairs"]
    experts = tiny.experts(limits)
    assert [line["work"] for line in experts][:2] == ["experts, 1 token", "experts, 8 tokens"]
    assert all("ours" in line for line in experts)
    assert all(len(tiny.row(line)) == 10 for line in [*lines, *experts])
    by_work = {line["work"]: tiny.row(line) for line in lines}
    assert by_work["1 row, pairs"][6] == by_work["1 row"][6] == "3.3" and by_work["1 row, pairs"][8] == "85%"
    assert by_work["4096 rows, forward + backward"][6] == ""


def test_each_way_of_a_product_is_measured(tiny):
    times = tiny.crossover(["shuffled", "pairs"])
    assert list(times) == [
        *("row", "row, shuffled", "row, pairs", "tiles", "tiles, shuffled", "decoded", "dense"),
        *("g W, tiles", "g W, tiles, shuffled", "g W, decoded"),
    ]
    assert all(column == [0.5] * 4 for column in times.values())
    assert tiny.crossover_table(times).count("500.0000") == 40


def test_decoding_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "find_spec", lambda name: None)
    decoded = tiny.decode({"bytes": 1e6})
    assert decoded["the products of a token, CUDA graph"] == 1
    assert decoded["halfbyte's decoder"].startswith("the native decoder")
    assert all(decoded[f"halfbyte's decoder, {count}"] > 0 for count in ("1 sequence", "8 sequences", "32 sequences"))
    assert decoded["halfbyte, transformers' generate"] > 0
    assert tiny.decode_table(decoded | {"bitsandbytes, not measured": "ImportError: x"}).count("\n") == 9


def test_a_contender_that_fails_leaves_its_line(monkeypatch):
    import gpu_suite

    def fail():
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(gpu_suite, "seconds", lambda call: call())
    line = gpu_suite.line("1 row", lambda: 2.0, fail, lambda: 8.0, 10, 20)
    assert line == {"work": "1 row", "ours": 2.0, "dense": 8.0, "share": 0.25} | {"why not": line["why not"]}
    assert line["why not"] == "bitsandbytes: RuntimeError: no kernel image"
    cells = gpu_suite.row(line)
    assert cells == ["1 row", "2000.0000", "", "8000.0000", "", "4.00", "3.3", "25%", "85%", line["why not"]]
    line = gpu_suite.line("1 row", fail, None, lambda: 8.0, 10, 20)
    assert "share" not in line and gpu_suite.row(line)[1:8] == ["", "", "8000.0000", "", "", "3.3", ""]
    assert gpu_suite.crossover_table({"row": [None] * 10, "dense": [1.0] * 10}).count("1000.0000") == 10


def test_contenders_that_disagree_are_named():
    from _gpu_training import note_disagreement

    steps = [
        {"model": "1 B", "loss": 10.0},
        {"model": "1 B", "loss": 10.2},
        {"model": "7 B", "loss": 9.0},
        {"model": "7 B"},
    ]
    note_disagreement(steps)
    assert not any("why not" in step for step in steps)
    steps[1]["loss"] = math.nan
    note_disagreement(steps)
    assert [("why not" in step) for step in steps] == [True, True, False, False]


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ('{"plain": "ok"}\n{"shuffled": "off"}\n', 139, ["ok", "off", "the process that checked it ended with 139"]),
        ('noise\n{"plain": "ok"}\n{"shuffled": "ok"}\n{"pairs": "ok"}\n', 0, ["ok", "ok", "ok"]),
    ],
)
def test_variants_are_checked_elsewhere(monkeypatch, said, code, expected):
    import _gpu_verify

    ended = subprocess.CompletedProcess([], code, said, "")
    monkeypatch.setattr(_gpu_verify.subprocess, "run", lambda *arguments, **options: ended)
    assert list(_gpu_verify.verified().values()) == expected

    def run(*arguments, **options):
        raise subprocess.TimeoutExpired([], 1, said.encode())

    monkeypatch.setattr(_gpu_verify.subprocess, "run", run)
    assert _gpu_verify.verified()["plain"] == "ok"
    assert ("not checked" in _gpu_verify.verified()["pairs"]) == (expected[2] != "ok")
