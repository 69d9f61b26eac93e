"""How the matrices of an adapter are stepped and stored: LoRA+ learning rates, and storage in 16 or 4 bits.

**LoRA+** (Hayou et al. 2024, arXiv:2402.12354). B starts at zero and A does not, and for wide layers both learn at an
equal pace only if the learning rate of B is several times that of A; the paper finds 16 a good factor.

**Storage between steps.** Some descriptions of QLoRA keep the adapter, too, in 4 bits and re-quantize it after every
update. `adapter_dtype` does that, to be measured: after each optimizer step every LoRA matrix is put onto the values
that bfloat16, or NF4 with a float32 scale for each 64 weights, can hold. The tensors themselves stay float32 while a
step is computed, so no memory is saved here; what is shown is what such storage does to learning.

An update is far smaller than the distance between two values of NF4, so *nearest* rounding takes most updates back.
*Stochastic* rounding goes to the upper of two neighbours with the probability of the place in between: right on
average, at the cost of noise. *Error feedback* adds what one rounding lost to the value that the next one starts from
(Seide et al. 2014). It needs a float32 beside each weight and so is no saving at all: it is the bound on what rounding
costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from halfbyte.formats import CODEBOOKS
from halfbyte.formats.blockwise import dequantize, quantize

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe
    from halfbyte.train.state import Tensors

BLOCK_SIZE = 64
_TINY = 1e-38  # a block of zeros


class AdapterTraining(transformers.Trainer):
    """Gives the optimizer LoRA+'s groups, and stores the adapter after each of its steps.

    Attributes:
        recipe: set by the trainer.
        storage: of the adapter; None where it stays float32.
    """

    recipe: Recipe
    storage: Storage | None = None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's, prepared."""
        optimizer = super().create_optimizer(model)
        matrices = lora_matrices(self.model if model is None else model)
        if self.recipe.loraplus_lr_ratio != 1:
            fast = {id(p) for name, p in matrices.items() if "lora_B" in name or "lora_embedding_B" in name}
            split_groups(optimizer, fast, self.recipe.loraplus_lr_ratio)
        if self.recipe.adapter_dtype != "float32":
            storage = self.storage = Storage(matrices, self.recipe)
            optimizer.register_step_post_hook(lambda *_: storage.store())
        return optimizer


class Storage:
    """Keeps matrices on the values that a format can hold.

    Args:
        matrices: by name.
        recipe: says which format, and how to round.
    """

    def __init__(self, matrices: Tensors, recipe: Recipe) -> None:
        self._matrices, self._recipe = matrices, recipe
        feedback = recipe.adapter_error_feedback
        self.errors = {name: torch.zeros_like(p.data) for name, p in matrices.items()} if feedback else {}

    @torch.no_grad()
    def store(self) -> None:
        """Round every matrix."""
        for name, parameter in self._matrices.items():
            wanted = parameter.data + self.errors[name] if self.errors else parameter.data
            held = rounded(wanted, self._recipe.adapter_dtype, stochastic=self._recipe.adapter_rounding == "stochastic")
            if self.errors:
                self.errors[name] = wanted - held
            parameter.copy_(held)


def lora_matrices(model: Any) -> Tensors:
    """The A and B that are trained, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "lora_" in n}


def split_groups(optimizer: torch.optim.Optimizer, fast: set[int], ratio: float) -> None:
    """Move parameters into groups of their own with a higher learning rate.

    Args:
        optimizer: any with torch's contract, before its first step.
        fast: ids of the parameters to move.
        ratio: of the learning rates.
    """
    for group in list(optimizer.param_groups):
        names = group.get("param_names")  # where parameters were given with their names
        items = list(zip(names, group["params"], strict=True)) if names else [(None, p) for p in group["params"]]
        moved = [(name, p) for name, p in items if id(p) in fast]
        if not moved:
            continue
        kept = [(name, p) for name, p in items if id(p) not in fast]
        group["params"] = [p for _, p in kept]
        if names:
            group["param_names"] = [name for name, _ in kept]
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        params: list[Any] = moved if names else [p for _, p in moved]
        optimizer.add_param_group({**settings, "params": params, "lr": group["lr"] * ratio})


def rounded(x: torch.Tensor, dtype: str, *, stochastic: bool) -> torch.Tensor:
    """The values that storage of `x` would give back.

    Args:
        x: float32, any shape.
        dtype: "bf16", or a 4-bit format, in row-major blocks of 64 weights with a float32 scale each.
        stochastic: to a neighbour by chance, right on average; else to the nearest one.

    Returns:
        float32, of the shape of `x`.
    """
    if dtype == "bf16":
        if not stochastic:
            return x.bfloat16().float()
        # Of the 32 bits bfloat16 keeps the upper 16: what is added below carries with the right probability.
        noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
        return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    book = CODEBOOKS[dtype]
    if not stochastic:
        codes, scales = quantize(x, book, BLOCK_SIZE)
        return dequantize(codes, scales, book, BLOCK_SIZE, x.numel(), torch.float32).view(x.shape)
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scale = flat.abs().amax(dim=1, keepdim=True)
    place = flat / scale.clamp(min=_TINY)
    levels = torch.tensor(sorted(book.values), device=x.device)
    upper = torch.bucketize(place, levels).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    goes_up = torch.rand_like(place) < (place - low) / (high - low)
    return (torch.where(goes_up, high, low) * scale).view(-1)[: x.numel()].view(x.shape)
