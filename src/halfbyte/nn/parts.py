"""The one place that decides what computes a model beside its 4-bit products: attention, norms, gates, rotations, loss.

| part | on a CPU | on a GPU |
|---|---|---|
| attention | torch's SDPA | in training, flash-attn where it is installed and fits, else torch's SDPA |
| norm, mlp, rotary | halfbyte's operations | liger-kernel's where it is installed, else transformers' own code |
| loss | halfbyte's, in chunks | liger-kernel's where it is installed, else halfbyte's, in chunks |

`halfbyte info` prints `chosen_parts`. `halfbyte.models.fused` asks for `operations` at each call, by where its tensors
are, and trainers call `set_attention`. `HALFBYTE_KERNELS=reference` keeps liger-kernel out.

flash-attn knows no masks: transformers takes packed rows apart for it by their positions, in a batch of one row only,
and asks the device in each layer. So packed rows stay with torch's, whose mask keeps them apart in any batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from halfbyte import env
from halfbyte.kernels import Choice
from halfbyte.kernels.registry import NO_CUDA, REFERENCE_ASKED_FOR, Availability, triton_available
from halfbyte.kernels.tuning import too_old
from halfbyte.nn.rowwise import rms_norm, rotary, swiglu

PARTS = ("loss", "norm", "mlp", "rotary")
FLASH = "flash_attention_2"  # what transformers calls flash-attn
FLASH_CAPABILITY = (8, 0)
LIGER_VERSION = (0, 8)  # the oldest that it was tried with
BFLOAT16_CAPABILITY = (8, 0)
BFLOAT16_TRITON = (3, 3)  # the first that writes out what older cards lack


class Operations(NamedTuple):
    """What computes the covered parts of a layer, and the loss behind the layers.

    Attributes:
        rms_norm: x, weight, eps -> y.
        swiglu: gate, up -> silu(gate) * up.
        rotate: queries, keys [batch, heads, tokens, dim], cos, sin -> rotated queries and keys.
        summed_loss: hidden, weight, labels, bias -> the summed loss; None: halfbyte's.
    """

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    summed_loss: Callable[..., torch.Tensor] | None


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Tokens before heads is how the projections wrote them, so this copies nothing.
    q, k = (rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    return q, k


OWN = Operations(rms_norm, swiglu, _rotate, None)


def operations(tensor: torch.Tensor) -> Operations | None:
    """What computes on `tensor`'s device and in its dtype; None: the model's own code."""
    if tensor.is_cpu:
        return OWN
    if not tensor.is_cuda or not liger_available().possible or too_old(tensor.device):
        return None
    if tensor.dtype == torch.bfloat16 and not _compiles_bfloat16(tensor.device):
        return None
    return _liger_operations()


@functools.cache
def _compiles_bfloat16(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
        return True
    return _release("triton") >= BFLOAT16_TRITON


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


@functools.cache
def _liger_operations() -> Operations:
    from halfbyte.nn import liger

    return Operations(liger.rms_norm, liger.swiglu, liger.rotate, liger.summed_cross_entropy)


@functools.cache
def liger_available() -> Availability:
    """Whether liger-kernel's operations run on a GPU of this machine, if it has one."""
    if env.kernels() == "reference":
        return REFERENCE_ASKED_FOR
    triton = triton_available()
    if not triton.possible:
        return triton
    if importlib.util.find_spec("liger_kernel") is None:
        return Availability(False, "liger-kernel is not installed", "pip install liger-kernel")
    found = version("liger-kernel")
    if _release("liger-kernel") < LIGER_VERSION:
        wanted = ".".join(map(str, LIGER_VERSION))
        return Availability(False, f"liger-kernel {found} is too old", f"pip install 'liger-kernel>={wanted}'")
    return Availability(True, f"liger-kernel {found}, in training")


def flash_available() -> Availability:
    """Whether flash-attn can be used on a GPU of this machine, if it has one."""
    if not torch.backends.cuda.is_built():
        return NO_CUDA
    if importlib.util.find_spec("flash_attn") is None:
        return Availability(False, "flash-attn is not installed", "pip install flash-attn --no-build-isolation")
    where = "in training in 16 bits, rows not packed, from compute capability 8.0 on; else sdpa"
    return Availability(True, f"flash-attn {version('flash-attn')}, {where}")


def chosen_parts() -> tuple[Choice, ...]:
    """Which implementation computes each part in training on a CPU and on a GPU, and why."""
    fused = "one pass over its inputs, forward and backward, in training"
    choices = [Choice("attention", "cpu", "sdpa", "torch's, fused")]
    choices += [Choice(part, "cpu", "halfbyte", fused) for part in PARTS[1:]]
    choices.append(Choice("loss", "cpu", "halfbyte", "in chunks of tokens, without logits, in training"))
    flash, liger = flash_available(), liger_available()
    choices.append(Choice("attention", "cuda", FLASH if flash.possible else "sdpa", flash.reason, flash.remedy))
    for part in (*PARTS[1:], PARTS[0]):
        name = "liger" if liger.possible else "halfbyte" if part == "loss" else "transformers"
        choices.append(Choice(part, "cuda", name, liger.reason, liger.remedy))
    return tuple(choices)


def set_attention(model: Any, device: torch.device, *, packed: bool) -> None:
    """Let a model that is trained on `device` use flash-attn where that is chosen; else it keeps what it has.

    Args:
        model: transformers'.
        device: where it lies.
        packed: whether its rows are packed.
    """
    if packed or device.type != "cuda" or not flash_available().possible:
        return
    fits = model.dtype in (torch.float16, torch.bfloat16) and getattr(model, "_supports_flash_attn", False)
    capable = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    if fits and capable and model.config._attn_implementation == "sdpa":  # another one is somebody's wish
        model.set_attn_implementation(FLASH)
