"""Each pitfall is told when it is there, in figures and with the key that mends it, and not when it is not."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from transformers import LlamaConfig

from halfbyte.device import Machine
from halfbyte.train.pitfalls import USABLE, Setting, find_pitfalls
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train
from halfbyte.train.targets import check_targets, outline

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
)
MODEL = outline(CONFIG)
LENGTH = 512
HOST = 10**9  # bytes of a machine with a card


def setting(memory=10**15, gpu=False, **keys):
    paths = {"model_name_or_path": "base", "output_dir": "run", "dataset": "rows.jsonl"}
    recipe = make_recipe({**paths, "lora_r": 2, **keys})  # of a small model a higher rank is a large part
    targets = None if recipe.method == "full" else check_targets(recipe, MODEL)
    gpus = (("card", int(memory)),) if gpu else ()
    return Setting(recipe, CONFIG, MODEL, targets, LENGTH, Machine("", 2, int(HOST if gpu else memory), "", gpus, ""))


def memory_for(*keys_that_fit, **keys):
    """Just enough for a run with those keys changed."""
    made = setting(**keys)
    return 1.02 / USABLE * made.footprint(**dict(keys_that_fit)).total


def told(memory=10**15, **keys):
    return find_pitfalls(setting(memory, **keys))


def the_one(warnings, key):
    (found,) = [warning for warning in warnings if f"Set {key}" in warning]
    assert found.count(". ") <= 2
    return found


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"learning_rate": 1e-5}, "0.0002"),
        ({"learning_rate": 5e-5, "method": "lora"}, "0.0002"),
        ({"learning_rate": 1e-6, "task": "preference"}, "2e-05"),
        ({"learning_rate": 1e-6, "loraplus_lr_ratio": 16}, "0.0002"),
    ],
)
def test_a_learning_rate_of_full_fine_tuning(keys, advice):
    assert the_one(told(**keys), "learning_rate").endswith(f"Set learning_rate: {advice}.")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"learning_rate": 1e-4},
        {"learning_rate": 1e-5, "method": "full"},
        {"learning_rate": 2e-5, "task": "preference"},
        {"learning_rate": 1e-5, "loraplus_lr_ratio": 16},
    ],
)
def test_a_learning_rate_of_an_adapter(keys):
    assert told(**keys) == []


def test_activations_that_do_not_fit_without_checkpointing():
    enough_with = memory_for(("gradient_checkpointing", True))
    assert enough_with < memory_for()
    (warning,) = told(enough_with)
    assert f"8 x 512 tokens take about {setting().footprint().activations / 1e6:.1f} MB" in warning
    assert "Set gradient_checkpointing: true, which keeps" in warning
    assert "max_length besides" not in warning
    assert told(enough_with, gradient_checkpointing=True) == []
    assert told(memory_for()) == []
    assert "max_length besides" in the_one(told(enough_with / 2), "gradient_checkpointing")


CHECKPOINTED = {"gradient_checkpointing": True, "gpu": True, "per_device_train_batch_size": 32}


def test_checkpoints_that_do_not_fit_on_the_card(monkeypatch):
    monkeypatch.setattr(CONFIG, "num_hidden_layers", 12)
    enough_with = memory_for(("activation_offloading", True), **CHECKPOINTED)
    moved = 9 * 32 * LENGTH * CONFIG.hidden_size * 2
    (warning,) = told(enough_with, **CHECKPOINTED)
    assert f"32 x 512 tokens leave checkpoints of {moved / 1e6:.1f} MB" in warning
    assert "Set activation_offloading: true, which keeps them in 100.7 MB of pinned host memory." in warning
    assert told(enough_with, **CHECKPOINTED, activation_offloading=True) == []
    assert told(memory_for(**CHECKPOINTED), **CHECKPOINTED) == []
    assert not any("Set activation" in w for w in told(enough_with / 2, **CHECKPOINTED))  # it would not fit either
    assert not any("activation_offloading" in w for w in told(enough_with, **{**CHECKPOINTED, "gpu": False}))
    unchecked = the_one(told(enough_with, **{**CHECKPOINTED, "gradient_checkpointing": False}), "gradient_check")
    assert "and activation_offloading: true, with which that is" in unchecked


def test_liger_kernel_is_counted_on(monkeypatch):
    """Its norms keep no float32 copies, its gates one tensor less; on a CPU it changes nothing."""
    from halfbyte.kernels.registry import Availability
    from halfbyte.train import pitfalls

    found = {}
    for there in (True, False):
        monkeypatch.setattr(pitfalls, "liger_available", lambda there=there: Availability(there, ""))
        found[there] = {gpu: setting(gpu=gpu).footprint().activations for gpu in (True, False)}
    norms, gates = 2 * 256 * (4 - 2), 768 * 2
    larger_chunk = (1024 - 256) * 1000 * 2  # of its loss: a quarter of the tokens, as the hidden size is of the words
    less = CONFIG.num_hidden_layers * 8 * LENGTH * (norms + gates) - larger_chunk
    assert found[False][True] - found[True][True] == less
    assert found[True][False] == found[False][False]


def test_more_pinned_memory_than_the_machine_has():
    keys = {**CHECKPOINTED, "activation_offloading": True, "per_device_train_batch_size": 4096}
    warning = the_one(told(10**15, **keys), "per_device_train_batch_size or max_length")
    assert "takes 3.2 GB of pinned memory, and this machine has 1.0 GB" in warning
    assert told(10**15, **{**keys, "per_device_train_batch_size": 1024}) == []


def test_more_target_modules_than_fit():
    """Checkpointing is on already, and short rows leave the adapter to be what is large."""
    keys = {"gradient_checkpointing": True, "lora_r": 128, "per_device_train_batch_size": 1, "optim": "adamw_4bit"}
    made = setting(**keys)
    memory = 1.02 / USABLE * made.footprint(attention=True).total
    warning = the_one(told(memory, **keys), "target_modules: attention")
    assert f"train {made.footprint().trained:,} parameters" in warning
    assert told(memory_for(**keys), **keys) == [w for w in told(memory_for(**keys), **keys) if "lora_r" in w]
    fewer = told(memory, **keys, target_modules="attention")
    assert not any("target_modules" in w for w in fewer)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_rank_whose_state_eats_the_saving(method):
    keys = {"method": method, "lora_r": 128}
    made = setting(**keys).footprint()
    # 16 bytes of each trained parameter: master, gradient, two moments
    warning = the_one(told(16 * made.trained * 99, **keys), "lora_r")
    assert f"lora_r 128 makes {made.trained:,} trained parameters" in warning
    advised = int(warning.split("Set lora_r: ")[1].split(",")[0])
    assert 1 <= advised < 128
    assert told(16 * made.trained * 99, **{**keys, "lora_r": advised}) == []
    assert told(16 * made.trained * 101, **keys) == []  # less than a hundredth of the memory


def test_float32_state_where_8_bit_would_fit():
    keys = {"method": "full", "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    enough = memory_for(("optim", "adamw_8bit"), **keys)
    warning = the_one(told(enough, **keys), "optim: adamw_8bit")
    assert "float32 optimizer state takes" in warning
    assert told(enough, **keys, optim="adamw_8bit") == []
    assert told(memory_for(**keys), **keys) == []
    assert not any("Set optim" in w for w in told(enough / 2, **keys))  # it would not fit either


def test_nothing_is_said_about_memory_that_nobody_knows():
    assert told(0, per_device_train_batch_size=10**6) == []


def test_a_run_prints_and_keeps_them(tiny_llama, write_rows, tmp_path):
    recipe = make_recipe(
        {
            "model_name_or_path": str(tiny_llama),
            "output_dir": str(tmp_path / "run"),
            "dataset": str(write_rows([{"prompt": "a", "completion": "b"}])),
            "learning_rate": 2e-5,
            "lora_r": 4,
            "max_steps": 1,
        }
    )
    screen = io.StringIO()
    summary = train(recipe, console=Console(file=screen, width=500))
    assert "warning: learning_rate 2e-05 is one for full fine-tuning" in screen.getvalue()
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]
    assert kept == summary["warnings"] and len(kept) == 1
