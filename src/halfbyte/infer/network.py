"""transformers' model as the network that the decoder runs, or why it cannot be that.

A model is covered when its class is known here and its config asks for nothing else than the class's usual forward.
What is not covered is a sentence, and runs through transformers' own forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.kernels.cpu.ops import takes_few_rows
from halfbyte.kernels.decoder import KEY_BLOCK, Branch, Branches, Layer, Matrix, Network
from halfbyte.tensor import QuantizedTensor

_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on how long a sequence is
_PLACES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class NotCoveredError(HalfbyteError):
    """The decoder does not run this model; the message is a reason, a sentence fragment."""


def check_covered(model: Any) -> None:
    """Raise `NotCoveredError` with the reason where the decoder does not know the model's class."""
    name = type(_base(model)).__name__
    if name not in _FAMILY:
        raise NotCoveredError(f"{name} is not of the Llama family")


@torch.inference_mode(False)  # a caller's would make an inference tensor of a packed weight that is no such tensor
def make_network(model: Any, positions: int, dtype: torch.dtype) -> Network:
    """The network of a transformers causal language model, sharing its packed weights.

    Args:
        model: from `load_model`, on one device, with or without peft's layers, whose adapters are not part of it.
        positions: tokens of the longest sequence; rounded up to a multiple of 16.
        dtype: of activations. A matrix that the CPU's few-row products do not take is decoded into it, once.

    Raises:
        NotCoveredError: why the decoder does not run it.
    """
    check_covered(model)
    base = _base(model)
    config, name = base.config, type(base).__name__
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise NotCoveredError(f"its activation {activation!r} is none of: {', '.join(_ACTIVATIONS)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise NotCoveredError(f"its rotary angles are of type {rope!r}, which depend on the length")
    count = -(-positions // KEY_BLOCK) * KEY_BLOCK
    hidden = torch.empty(1, dtype=torch.float32, device=base.device)
    positions_of_all = torch.arange(count, device=base.device)[None]
    cosine, sine = (table[0].float().contiguous() for table in base.model.rotary_emb(hidden, positions_of_all))
    attention = base.model.layers[0].self_attn
    head_dim = attention.head_dim
    if cosine.shape[1] != head_dim:
        raise NotCoveredError(f"it rotates {cosine.shape[1]} of a head's {head_dim} numbers")
    gemma = name.startswith("Gemma")
    return Network(
        table=base.get_input_embeddings().weight.detach(),
        embedding_scale=math.sqrt(config.hidden_size) if gemma else 1.0,
        layers=[_layer(layer, config, gemma, dtype) for layer in base.model.layers],
        final_norm=_norm(base.model.norm, gemma),
        head=_matrix(base.lm_head, dtype),
        cosine=cosine,
        sine=sine,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        attention_scale=attention.scaling,
        activation=_ACTIVATIONS[activation],
    )


def branches(model: Any, adapter: str, dtype: torch.dtype) -> Branches:
    """What one of peft's adapters on `model` adds to each matrix.

    Raises:
        NotCoveredError: the adapter holds something else than plain LoRA matrices of the layers' projections.
    """
    config = model.peft_config[adapter]
    if config.peft_type.value != "LORA":
        raise NotCoveredError(f"adapter {adapter} is {config.peft_type.value}, not LoRA")
    for option in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if getattr(config, option, None):
            raise NotCoveredError(f"adapter {adapter} has {option}")
    if config.bias != "none" or getattr(config, "lora_bias", False):
        raise NotCoveredError(f"adapter {adapter} has trained biases")
    base = _base(model)
    found: dict[tuple[int, str], Branch] = {}
    for number, layer in enumerate(base.model.layers):
        for name, place in _PLACES.items():
            module: Any = layer.get_submodule(place)
            if adapter in getattr(module, "lora_A", {}):
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                scaled = b.detach().float() * module.scaling[adapter]
                found[number, name] = Branch(a.detach().to(dtype).contiguous(), scaled.to(dtype).contiguous())
    elsewhere = [key for key, module in base.named_modules() if adapter in getattr(module, "lora_A", {})]
    if len(elsewhere) != len(found):
        raise NotCoveredError(f"adapter {adapter} is on more than the layers' projections")
    return found


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _layer(layer: Any, config: Any, gemma: bool, dtype: torch.dtype) -> Layer:
    attention = layer.self_attn
    kind = getattr(config, "layer_types", None)
    sliding = getattr(attention, "sliding_window", None)
    if sliding is None and type(attention).__name__.startswith("Mistral"):
        sliding = config.sliding_window  # Mistral has it for all layers, in its config only
    if kind is not None and kind[attention.layer_idx] not in ("full_attention", "sliding_attention"):
        raise NotCoveredError(f"layer {attention.layer_idx} is {kind[attention.layer_idx]}")
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        matrices={name: _matrix(layer.get_submodule(place), dtype) for name, place in _PLACES.items()},
        attention_norm=_norm(layer.input_layernorm, gemma),
        mlp_norm=_norm(layer.post_attention_layernorm, gemma),
        query_norm=None if query_norm is None else _norm(query_norm, gemma),
        key_norm=None if key_norm is None else _norm(key_norm, gemma),
        window=int(sliding or 0),
    )


def _norm(module: Any, gemma: bool) -> torch.Tensor:
    weight = module.weight.detach().float()
    return (weight + 1.0 if gemma else weight).contiguous()  # Gemma stores what differs from one


def _matrix(module: Any, dtype: torch.dtype) -> Matrix:
    module = getattr(module, "base_layer", module)
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().float().contiguous()
    n, k = weight.shape
    if not isinstance(weight, QuantizedTensor):
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.to(dtype)
        return Matrix(weight.contiguous(), n, k, bias)
    packed = weight.packed()
    taken = weight.device.type != "cpu" or takes_few_rows(packed, k)
    return Matrix(packed if taken else weight.dequantize(dtype), n, k, bias)
