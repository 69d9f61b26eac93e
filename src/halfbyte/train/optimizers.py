"""The recipe's optimizer: which one a name means, and the one that a trainer steps with.

`adamw`, `adamw_8bit` and `adamw_4bit` are `halfbyte.optim.AdamW`; the names that transformers and bitsandbytes gave to
such optimizers are understood, too. GaLore (arXiv 2403.03507) is galore-torch's, through transformers: it projects the
gradients of whole matrices to a low rank, so it is for full fine-tuning only.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import RequestError
from halfbyte.optim import AdamW

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
    if recipe.optim == "galore_adamw_8bit" and not torch.cuda.is_available():
        raise RequestError("optim is 'galore_adamw_8bit', which galore-torch has for CUDA only; choose galore_adamw.")


def library_options(recipe: Recipe) -> dict[str, Any]:
    """What transformers' TrainingArguments have to say about the optimizer."""
    if recipe.optim.startswith("galore"):
        return {"optim": recipe.optim, "optim_target_modules": "all-linear"}
    return {"optim": "adamw_torch"}  # replaced by `make_optimizer`


def make_optimizer(recipe: Recipe, model: torch.nn.Module, decayed: list[str]) -> torch.optim.Optimizer | None:
    """The optimizer of a recipe, or None where transformers makes it.

    Gradients are clipped and looked at by the trainer, so the step does neither.

    Args:
        recipe: how to train.
        model: its parameters that require gradients are stepped.
        decayed: names of the parameters that weight decay applies to.
    """
    if recipe.optim.startswith("galore"):
        return None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [(n, p) for n, p in trained if (n in decayed) == decays],
            "weight_decay": recipe.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        state={"adamw": "float32", "adamw_8bit": "8bit", "adamw_4bit": "4bit"}[recipe.optim],  # type: ignore[arg-type]
        paged=False if recipe.paged == "none" else recipe.paged,
        seed=recipe.seed,
        check_finite=False,
    )
