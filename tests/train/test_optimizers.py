"""The recipe's optimizer keys: names from other libraries, contradictions, and runs that use each of them."""

from __future__ import annotations

import importlib.util
import io
import re

import pytest
import torch
from rich.console import Console

from halfbyte.errors import RecipeError, RequestError
from halfbyte.optim import AdamW, GaLoreAdamW
from halfbyte.train.optimizers import check_optimizer, make_optimizer
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

NEEDED = {"model_name_or_path": "/m", "output_dir": "o", "dataset": "d.jsonl"}
PAGED = "host" if torch.cuda.is_available() else "file"


@pytest.mark.parametrize(
    ("name", "optim", "paged"),
    [
        ("adamw_torch", "adamw", "none"),
        ("adamw_bnb_8bit", "adamw_8bit", "none"),
        ("paged_adamw", "adamw", PAGED),
        ("paged_adamw_32bit", "adamw", PAGED),
        ("paged_adamw_8bit", "adamw_8bit", PAGED),
        ("adamw_4bit", "adamw_4bit", "none"),
    ],
)
def test_names_that_people_know(name, optim, paged):
    recipe = make_recipe({**NEEDED, "optim": name})
    assert (recipe.optim, recipe.paged) == (optim, paged)


def test_what_is_said_about_paging_wins_and_contradictions_are_told():
    assert make_recipe({**NEEDED, "optim": "paged_adamw_8bit", "paged": "host"}).paged == "host"
    for keys, sentence in (
        ({"optim": "adamw8bit"}, "optim is 'adamw8bit', which is not offered; did you mean 'adamw_8bit'?"),
        ({"paged": "disk"}, "paged is 'disk', which is not offered"),
        ({"optim": "paged_adamw_8bit", "paged": "none"}, "optim is 'paged_adamw_8bit' but paged is 'none'"),
        ({"optim": "galore_adamw"}, "which projects whole matrices, but method is 'qlora'; choose adamw_8bit"),
        ({"galore_rank": 8}, "galore_rank is 8 but optim is 'adamw'; choose galore_adamw"),
    ):
        with pytest.raises(RecipeError, match=re.escape(sentence)):
            make_recipe({**NEEDED, **keys})


def test_what_is_missing_here_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs galore-torch; run `pip install galore-torch`"):
        check_optimizer(make_recipe({**NEEDED, "method": "full", "optim": "galore_adamw"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="needs a CUDA device, and there is none; choose 'file'"):
        check_optimizer(make_recipe({**NEEDED, "paged": "host"}))


def test_only_what_is_trained_is_stepped_and_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    recipe = make_recipe({**NEEDED, "weight_decay": 0.1, "learning_rate": 0.5, "optim": "adamw_8bit"})
    optimizer = make_optimizer(recipe, model, ["0.weight", "2.weight"])
    assert isinstance(optimizer, AdamW)
    told = [(g["param_names"], g["weight_decay"], g["lr"], g["state"]) for g in optimizer.param_groups]
    assert told == [(["0.weight"], 0.1, 0.5, "8bit"), (["0.bias", "1.weight", "1.bias"], 0.0, 0.5, "8bit")]


def test_galore_projects_the_layers_and_not_the_vocabulary(tiny_llama):
    from halfbyte.models import load_model

    model = load_model(tiny_llama, dtype=torch.float32)
    keys = {"method": "full", "optim": "galore_adamw_8bit", "galore_rank": 3, "galore_scale": 0.5, "weight_decay": 0.1}
    optimizer = make_optimizer(make_recipe({**NEEDED, **keys}), model, [n for n, p in model.named_parameters()])
    assert isinstance(optimizer, GaLoreAdamW)
    ranks = {n: g["rank"] for g in optimizer.param_groups for n in g["param_names"]}
    assert all(rank == (3 if "_proj" in name else 0) for name, rank in ranks.items())
    assert {3, 0} == set(ranks.values())
    assert ranks.keys() == dict(model.named_parameters()).keys()
    assert {g["scale"] for g in optimizer.param_groups} == {0.5}
    assert {g["state"] for g in optimizer.adamw.param_groups} == {"8bit"}


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adamw_4bit", "galore_adamw", "galore_adamw_8bit"])
def test_runs_learn_and_paging_changes_nothing(tiny_llama, write_rows, tmp_path, optim):
    if optim.startswith("galore"):
        pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    data = str(write_rows([{"prompt": c, "completion": c.upper() * n} for n, c in enumerate("abcdefgh", 1)]))
    after = {}
    for paged in ("none", PAGED):
        recipe = make_recipe(
            {
                "model_name_or_path": str(tiny_llama),
                "output_dir": str(tmp_path / f"run-{paged}"),
                "dataset": data,
                "eval_dataset": data,
                "method": "full",
                "compute_dtype": "float32",
                "max_length": 32,
                "learning_rate": 2e-3,
                "max_steps": 5,
                "per_device_train_batch_size": 4,
                "optim": optim,
                "paged": paged,
                **({"galore_rank": 8, "galore_update_interval": 2} if optim.startswith("galore") else {}),
            }
        )
        summary = train(recipe, console=Console(file=io.StringIO()))
        assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
        after[paged] = summary["after"]["eval_loss"]
    assert len(set(after.values())) == 1
