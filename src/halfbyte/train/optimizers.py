"""The recipe's optimizer: which one a name means, and the one that a trainer steps with.

`adamw`, `adamw_8bit` and `adamw_4bit` are `halfbyte.optim.AdamW`; the names that transformers and bitsandbytes gave to
such optimizers are understood, too. `galore_adamw` and `galore_adamw_8bit` are `halfbyte.optim.GaLoreAdamW`, which
projects the gradients of whole matrices to a low rank: it is for full fine-tuning only.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import RequestError
from halfbyte.optim import AdamW, GaLoreAdamW

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe


def check_optimizer(recipe: Recipe) -> None:
    """What the recipe's optimizer needs is here.

    Raises:
        RequestError: a GPU or a package is missing.
    """
    if recipe.paged == "host" and not torch.cuda.is_available():
        raise RequestError("paged is 'host', which needs a CUDA device, and there is none; choose 'file'.")
    if recipe.optim.startswith("galore") and importlib.util.find_spec("galore_torch") is None:
        raise RequestError(f"optim is {recipe.optim!r}, which needs galore-torch; run `pip install galore-torch`.")


def make_optimizer(recipe: Recipe, model: torch.nn.Module, decayed: list[str]) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Gradients are clipped and looked at by the trainer, so the step does neither.

    Args:
        recipe: how to train.
        model: its parameters that require gradients are stepped.
        decayed: names of the parameters that weight decay applies to.
    """
    galore = recipe.optim.startswith("galore")
    projected = linear_weights(model) if galore else set()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [(n, p) for n, p in trained if (n in decayed) == decays and (n in projected) == projects],
            "weight_decay": recipe.weight_decay * decays,
            **({"rank": recipe.galore_rank * projects} if galore else {}),
        }
        for decays in (True, False)
        for projects in (True, False)
    ]
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "state": {"8bit": "8bit", "4bit": "4bit"}.get(recipe.optim.rpartition("_")[2], "float32"),
        "paged": False if recipe.paged == "none" else recipe.paged,
        "seed": recipe.seed,
        "check_finite": False,
    }
    if galore:
        options |= {"update_interval": recipe.galore_update_interval, "scale": recipe.galore_scale}
    return (GaLoreAdamW if galore else AdamW)([group for group in groups if group["params"]], **options)


def linear_weights(model: torch.nn.Module) -> set[str]:
    """Names of the weights that GaLore projects: those of linear layers, the output embeddings left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (head is None or module.weight is not head.weight)
    }
