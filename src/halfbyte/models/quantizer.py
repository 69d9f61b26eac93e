"""The transformers integration: `AutoModelForX.from_pretrained(..., quantization_config=HalfbyteConfig())`.

transformers owns the loading: which file holds which key, how checkpoint names become parameter names, how per-expert
tensors are merged into one. This class adds three things: which parameters are quantized (before), how a dense tensor
becomes a `QuantizedTensor` (on the way), and how packed tensors are put together from their keys (for folders that are
quantized already). No class of transformers' is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from halfbyte.errors import CheckpointError, FormatError, HalfbyteError
from halfbyte.formats import QuantSpec
from halfbyte.models.checkpoint import is_finite
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.experts import choose_implementation
from halfbyte.models.input_grads import skip_in_traces
from halfbyte.models.peft_dispatch import register_dispatcher
from halfbyte.nn import output_layers, prepare, report
from halfbyte.nn.replace import EMBEDDING, EXPERTS, Plan, as_stored, make_plan, quantize_parameter
from halfbyte.tensor import LAYOUTS, QuantizedTensor, flatten, unflatten

_SUFFIXES = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(f".quant_state.{layout}__{name}" for layout in LAYOUTS for name in ("nf4", "fp4", "e2m1", "int4", "int8")),
)


# Where halfbyte's own errors, and a sink's of its disk, are kept while transformers loads: it would turn them into a
# report of tracebacks.
_failures: ContextVar[list[Exception] | None] = ContextVar("halfbyte_loading_failures", default=None)


@contextmanager
def collect_failures(failures: list[Exception]) -> Iterator[None]:
    """Append the errors raised on purpose, and the system's, while a model loads to `failures`."""
    token = _failures.set(failures)
    try:
        yield
    finally:
        _failures.reset(token)


@contextmanager
def _remembered() -> Iterator[None]:
    try:
        yield
    except (HalfbyteError, OSError) as error:
        kept = _failures.get()
        if kept is not None:
            kept.append(error)
        raise


@dataclass(frozen=True)
class Arrival:
    """A parameter that a loader has read, on its way into the model or, with a sink, elsewhere.

    Attributes:
        name: the parameter's.
        tensor: as it was stored: dense, or a `QuantizedTensor` that was one in the file.
        kind: as what it is to be quantized (see `halfbyte.nn.replace`); None: it is kept as it is.
        spec: how.
    """

    name: str
    tensor: torch.Tensor
    kind: str | None
    spec: QuantSpec

    def make(self) -> torch.Tensor:
        """The parameter.

        Raises:
            FormatError: the weight holds NaN or Inf; the message names it.
        """
        if self.kind is not None:
            return quantize_parameter(self.name, self.tensor, self.kind, self.spec)
        check_finite(self.name, self.tensor)
        return self.tensor

    def placeholder(self) -> nn.Parameter:
        """The parameter without its bytes, on the meta device.

        Raises:
            FormatError: it has a dtype that cannot be quantized; the message names it.
        """
        meta = self.tensor.detach().to("meta")
        made = meta if self.kind is None else quantize_parameter(self.name, meta, self.kind, self.spec)
        return nn.Parameter(made, requires_grad=False)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a dense tensor, perhaps one that is mapped and that nobody has looked at, that holds NaN or Inf.

    Raises:
        FormatError: it does; the message names it.
    """
    if not isinstance(tensor, QuantizedTensor) and not is_finite(tensor):
        raise FormatError(f"{name}: the weight holds NaN or Inf")


# Where parameters go instead of into the model, so that a model larger than the memory can be quantized. It gets the
# model and what has arrived, and returns the placeholder for it.
Sink = Callable[[nn.Module, Arrival], nn.Parameter]
_sink: ContextVar[Sink | None] = ContextVar("halfbyte_sink", default=None)


@contextmanager
def into_sink(sink: Sink) -> Iterator[None]:
    """Hand every parameter that is loaded and quantized to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


def has_sink() -> bool:
    """Whether parameters go to a sink, so that none is kept by the model."""
    return _sink.get() is not None


class _Quantize(ConversionOps):
    """A dense tensor from a checkpoint becomes a quantized parameter."""

    def __init__(self, quantizer: HalfbyteQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Parameter name -> dense tensor, to parameter name -> parameter."""
        result = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            with _remembered():
                result[name] = self._convert_one(kwargs["model"], name, dense)
        return result

    def _convert_one(self, model: nn.Module, name: str, dense: torch.Tensor) -> torch.Tensor:
        spec, sink = self.quantizer.quantization_config.spec, _sink.get()
        arrival = Arrival(name, dense, self.quantizer.plan.chosen.get(name), spec)
        _check_shape(model, name, dense if arrival.kind is None else as_stored(dense, arrival.kind))
        return arrival.make() if sink is None else sink(model, arrival)


class _Assemble(ConversionOps):
    """The keys of a packed tensor become a quantized parameter; a key that stands alone is a dense tensor."""

    def __init__(self, quantizer: HalfbyteQuantizer) -> None:
        # Under this name transformers looks for it: without, it casts float32 scales and tables to the model's dtype.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Assemble:
        # transformers copies the operation for each parameter, and the model's whole plan hangs on it.
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The stored keys of one parameter ("weight", "weight.absmax", ...) to that parameter."""
        model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        attribute = full_layer_name.rpartition(".")[2]
        with _remembered():
            if len(parts) == 1:
                (key, dense), target = next(iter(parts.items())), model.get_parameter_or_buffer(full_layer_name)
                if isinstance(dense, QuantizedTensor):  # an archive's, put together already
                    return {key: self._kept(model, full_layer_name, dense)}
                if not dense.is_floating_point():
                    raise CheckpointError(
                        f"{full_layer_name} is stored as {dense.dtype} and nothing says how to decode it"
                    )
                return {key: self._kept(model, full_layer_name, dense.to(target.dtype))}
            flat = {full_layer_name + key.removeprefix(attribute): value for key, value in parts.items()}
            return {attribute: self._kept(model, full_layer_name, unflatten(full_layer_name, flat))}

    def _kept(self, model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as transformers is to keep it: a packed one as a frozen parameter, or what the sink gives."""
        _check_shape(model, name, tensor)
        sink = _sink.get()
        if sink is not None:
            return sink(model, Arrival(name, tensor, None, self.hf_quantizer.quantization_config.spec))
        return nn.Parameter(tensor, requires_grad=False) if isinstance(tensor, QuantizedTensor) else tensor


@register_quantizer("halfbyte")
class HalfbyteQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves a model.

    Attributes:
        quantization_config: the `HalfbyteConfig`.
        plan: which parameters are quantized and why the others are not.
    """

    requires_calibration = False
    quantization_config: HalfbyteConfig
    # Every parameter name that may be packed -> the keys that may stand for it in a file.
    serialized_names: ClassVar[dict[str, list[str]]] = {  # type: ignore[misc]  # untyped upstream
        attribute: [attribute + suffix for suffix in _SUFFIXES]
        for attribute in ("weight", "gate_up_proj", "down_proj", "gate_proj", "up_proj")
    }

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = Plan({}, {})

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        # A folder that is quantized already may name modules to skip that this task's model does not have.
        skip = [name for name in config.skip_modules if not self.pre_quantized or _names_something(model, name)]
        embeddings = config.quantize_embeddings
        self.plan = make_plan(model, skip=skip, heads=output_layers(model), quantize_embeddings=embeddings)
        if not self.pre_quantized:
            _check_share(model, self.plan, config.min_quantized_share)
        prepare(model, self.plan, config.compute_dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in model.parameters():
            if isinstance(parameter, QuantizedTensor):
                parameter.requires_grad_(False)
        kinds = set(self.plan.chosen.values())
        config = self.quantization_config
        config.model_dtype = model.dtype
        config.bitsandbytes_readable = config.spec.interchange and not kinds & {EXPERTS, EMBEDDING}
        if EXPERTS in kinds:
            choose_implementation(model)
        anew = [name for name in self.plan.chosen if not isinstance(model.get_parameter(name), QuantizedTensor)]
        model.halfbyte_report = report(model, self.plan.skipped | dict.fromkeys(anew, "made anew"))
        skip_in_traces(model)
        register_dispatcher()
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the plan chose a parameter; with a sink, whatever has the model's dtype goes through us."""
        if param_name in self.plan.chosen or _sink.get() is None:
            return param_name in self.plan.chosen
        # What has a dtype of its own (an int64 buffer) transformers would cast to the model's on this path.
        return bool(model.get_parameter_or_buffer(param_name).dtype == model.dtype)  # type: ignore[operator]

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to a dense tensor on its way into the model."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """What is done to the keys of a packed tensor."""
        return {"deserialize": _Assemble}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state dict with every packed tensor flattened to its keys."""
        layout = self.quantization_config.layout
        state: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            state.update(flatten(name, tensor, layout) if isinstance(tensor, QuantizedTensor) else {name: tensor})
        if not any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters()):
            # Adapters were merged, the weights are dense now; a config that says otherwise makes a broken folder.
            self.remove_quantization_config(model)
        # Packed experts cannot be split back into the per-expert tensors of the original checkpoint.
        model._weight_conversions = []
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, parameter in list(model.named_parameters()):
            if isinstance(parameter, QuantizedTensor):
                path, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(path), attribute, nn.Parameter(parameter.dequantize(dtype)))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Every encoding has a layout in files."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on the frozen weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have fakes and the tensor is traceable."""
        return True


def _check_shape(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """transformers does not compare the shape of what a quantizer hands it."""
    expected = model.get_parameter_or_buffer(name).shape  # type: ignore[operator]  # transformers' own
    if tensor.shape != expected:
        raise CheckpointError(f"{name} is stored as {tuple(tensor.shape)}, and the model's is {tuple(expected)}")


def _check_share(model: nn.Module, plan: Plan, minimum: float) -> None:
    """Refuse a model of which too little would be quantized: some weights have a shape nobody thought of."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside = sum(size for name, size in sizes.items() if plan.skipped.get(name) not in ("embedding", "output layer"))
    inside = sum(sizes[name] for name in plan.chosen)
    if inside < minimum * outside:
        skipped = ", ".join(f"{name} ({why})" for name, why in list(plan.skipped.items())[:3]) or "every layer"
        raise FormatError(
            f"only {100 * inside / max(outside, 1):.0f} % of the parameters outside embeddings and output layers would "
            f"be quantized (min_quantized_share is {minimum}); skipped: {skipped}"
        )


def _names_something(model: nn.Module, pattern: str) -> bool:
    return any(f".{pattern}." in f".{name}." for name, _ in model.named_modules())
