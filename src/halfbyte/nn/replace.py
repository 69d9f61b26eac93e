"""Which parameters of a model are quantized, and a report that says so.

The choice is made by *parameter*, not by module class: a swap of `nn.Linear` modules silently skips the 3-D expert
weights of mixture-of-experts models, which hold nine tenths of their parameters (bitsandbytes#1849). What is not
quantized is listed with its reason, and a model of which too little would be quantized is refused.

Kinds:
* a linear layer's weight: the module becomes `Linear4bit`;
* GPT-2's `Conv1D`, which stores its weight transposed: becomes `Linear4bit`, the weight turned to [out, in];
* a 3-D parameter [experts, out, in]: stays where it is and becomes a `QuantizedTensor`; an expert is a slice of it;
* an embedding's table, when asked for: stays where it is; only the rows looked up are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.errors import FormatError, RequestError, nearest
from halfbyte.formats import QuantSpec
from halfbyte.nn.linear import Linear4bit
from halfbyte.tensor import QuantizedTensor, quantize

LINEAR, CONV1D, EXPERTS, EMBEDDING = "linear", "conv1d", "experts", "embedding"


@dataclass(frozen=True)
class Plan:
    """What will happen to each parameter.

    Attributes:
        chosen: parameter name -> kind.
        skipped: parameter name -> reason, for every parameter that is not chosen.
    """

    chosen: dict[str, str]
    skipped: dict[str, str]


@dataclass(frozen=True)
class QuantizationReport:
    """What a model holds, counted from its real tensors; tied parameters count once.

    Attributes:
        quantized: parameters stored in packed form.
        total: all parameters.
        nbytes: bytes of all parameters and their scales.
        quantized_nbytes: bytes of the packed ones.
        skipped: parameter name -> why it is not quantized; norms and biases are left out.
    """

    quantized: int
    total: int
    nbytes: int
    quantized_nbytes: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Quantized parameters over all parameters, 0 to 1."""
        return self.quantized / self.total if self.total else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized parameter takes, scales included."""
        return 8 * self.quantized_nbytes / self.quantized if self.quantized else 0.0

    def __str__(self) -> str:
        text = f"quantized {100 * self.share:.1f} % of {self.total:,} parameters"
        if self.quantized:
            text += f" at {self.bits_per_weight:.3f} bits each"
        if self.skipped:
            text += "; skipped: " + ", ".join(f"{name} ({reason})" for name, reason in self.skipped.items())
        return text


def make_plan(
    model: nn.Module, *, skip: Iterable[str] = (), heads: Iterable[str] = (), quantize_embeddings: bool = False
) -> Plan:
    """Decide for every parameter of `model`; looks at names and shapes only, so the meta device will do.

    Args:
        model: any module.
        skip: module or parameter names that the user keeps unquantized: a whole name, or its last parts.
        heads: names of output layers, kept unquantized because the loss is most sensitive to them.
        quantize_embeddings: whether tables of `nn.Embedding` are quantized.

    Raises:
        RequestError: a name in `skip` matches nothing.
    """
    skip, heads = list(skip), list(heads)
    chosen: dict[str, str] = {}
    skipped: dict[str, str] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        kind, reason = _kind(module, name.rpartition(".")[2], parameter, quantize_embeddings)
        matches = [pattern for pattern in skip if _matches(name, pattern)]
        used.update(matches)
        if kind and matches:
            kind, reason = "", "asked for"
        elif kind and kind != EMBEDDING and any(_matches(name, head) for head in heads):
            kind, reason = "", "output layer"
        if kind:
            chosen[name] = kind
        elif reason:
            skipped[name] = reason
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        names = sorted(
            {part for name, _ in model.named_modules() for part in name.split(".") if part and not part.isdigit()}
        )
        hint = nearest(unused[0].rpartition(".")[2], names)
        raise RequestError(f"nothing in the model is called {unused[0]!r}, so it cannot be skipped; {hint}")
    return Plan(chosen, skipped)


def prepare(model: nn.Module, plan: Plan, compute_dtype: torch.dtype | None = None) -> None:
    """Swap the planned linear layers for empty `Linear4bit` ones and freeze the other planned parameters, in place."""
    for name, kind in plan.chosen.items():
        path, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if kind in (LINEAR, CONV1D):
            rows, columns = weight_shape(module)
            bias = getattr(module, "bias", None)
            layer = Linear4bit(columns, rows, bias is not None, compute_dtype=compute_dtype, dtype=module.weight.dtype)
            if bias is not None:
                layer.bias = bias.requires_grad_(False)
            layer.train(module.training)
            model.set_submodule(path, layer)
        else:
            getattr(module, attribute).requires_grad_(False)


def as_stored(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A dense weight with the rows that it is quantized in: Conv1D keeps [in, out], and products want [out, in]."""
    return weight.T if kind == CONV1D else weight


def quantize_parameter(name: str, weight: torch.Tensor, kind: str, spec: QuantSpec) -> nn.Parameter:
    """The frozen, quantized parameter for a dense one.

    Raises:
        FormatError: the weight holds NaN or Inf; the message names it.
    """
    try:
        dense = as_stored(weight, kind)
        return nn.Parameter(quantize(dense, spec.format, spec.block_size, spec.scale_bits), requires_grad=False)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def quantize_model(
    model: nn.Module,
    spec: QuantSpec | None = None,
    *,
    skip: Iterable[str] = (),
    quantize_embeddings: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> QuantizationReport:
    """Quantize a model that is in memory, in place; loading streamed (`halfbyte.load_model`) needs less memory.

    Returns:
        The report.

    Raises:
        FormatError: a weight holds NaN or Inf; nothing has been replaced then.
    """
    spec = spec or QuantSpec()
    plan = make_plan(model, skip=skip, heads=output_layers(model), quantize_embeddings=quantize_embeddings)
    ready = {
        name: quantize_parameter(name, model.get_parameter(name), kind, spec) for name, kind in plan.chosen.items()
    }
    prepare(model, plan, compute_dtype)
    for name, parameter in ready.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, parameter)
    return report(model, plan.skipped)


def output_layers(model: nn.Module) -> list[str]:
    """Names of the modules that make a model's outputs: its head, whatever is tied to it, a classifier."""
    names = []
    anything: Any = model
    head = anything.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        is_classifier = "." not in name and name in ("score", "classifier", "qa_outputs", "lm_head", "cls")
        if name and ((head is not None and module is head) or is_classifier):
            names.append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names += [key.rpartition(".")[0] for pair in dict(tied).items() for key in pair]
    return sorted(set(names))


def report(model: nn.Module, skipped: dict[str, str] | None = None) -> QuantizationReport:
    """Count what a model holds.

    Args:
        model: any module.
        skipped: parameter name -> why it is not quantized. It may come from before the model's parameters were tied:
            a head that is quantized after all, as the embedding that it is tied to, is left out.
    """
    quantized = total = nbytes = quantized_nbytes = 0
    for parameter in model.parameters():
        total += parameter.numel()
        size = parameter.nbytes
        nbytes += size
        if isinstance(parameter, QuantizedTensor):
            quantized += parameter.numel()
            quantized_nbytes += size
    dense = {name for name, p in model.named_parameters(remove_duplicate=False) if not isinstance(p, QuantizedTensor)}
    kept = {name: reason for name, reason in (skipped or {}).items() if name in dense}
    return QuantizationReport(quantized, total, nbytes, quantized_nbytes, kept)


def weight_shape(module: Any) -> tuple[int, int]:
    """Rows (out) and columns (in) of a linear layer's weight, whichever way it is stored."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _kind(module: nn.Module, attribute: str, parameter: nn.Parameter, embeddings: bool) -> tuple[str, str]:
    """The kind of a parameter ("" when it cannot be quantized) and, where that deserves a line, the reason."""
    if not parameter.is_floating_point() or isinstance(parameter, QuantizedTensor):
        return "", ""
    if attribute == "weight" and type(module) is nn.Linear:
        return LINEAR, ""
    if attribute == "weight" and is_conv1d(module):
        return CONV1D, ""
    if isinstance(module, nn.Embedding):
        return (EMBEDDING, "") if embeddings else ("", "embedding")
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return EXPERTS, ""
    if parameter.dim() >= 2:
        return "", f"{type(module).__name__} of {'x'.join(map(str, parameter.shape))}"
    return "", ""


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer that stores its weight transposed, [in, out]."""
    # By name: transformers is not imported here, and its Conv1D is the only one with a 2-D weight and `nf`.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is `name`, a part of its path, or its module's last parts."""
    return f".{pattern}." in f".{name}."
