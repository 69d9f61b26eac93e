"""Which models llama.cpp can run, and what it calls their parts.

GGUF holds tensors and numbers, no program: the program is llama.cpp's graph for `general.architecture`. A model may go
out only if that graph computes what transformers computes, so everything in a config that the graph does not know is
refused here by name, and so is a tensor that it would not load. llama.cpp itself would ignore most of them.

Three things are not one to one:

* llama's graph rotates neighbouring pairs of a head's dimensions, transformers the two halves. The rows of q and k are
  reordered so that the pairs lie where the graph looks; qwen's and gemma's graphs rotate halves and need nothing.
* Gemma's norms multiply by 1 + weight, llama.cpp's by the weight: the 1 is added.
* Llama 3's frequencies are no formula in llama.cpp but a tensor, `rope_freqs.weight`, of divisors.

Source: llama.cpp's graphs (src/models/*.cpp), and transformers' for what they have to equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.errors import RequestError, nearest

# transformers' name inside a layer -> GGUF's inside `blk.N`, and the shape in terms of the model's sizes.
Table = Mapping[str, tuple[str, tuple[str, ...]]]

_LAYER: Table = {
    "input_layernorm.weight": ("attn_norm.weight", ("embedding",)),
    "self_attn.q_proj.weight": ("attn_q.weight", ("query", "embedding")),
    "self_attn.k_proj.weight": ("attn_k.weight", ("key", "embedding")),
    "self_attn.v_proj.weight": ("attn_v.weight", ("key", "embedding")),
    "self_attn.o_proj.weight": ("attn_output.weight", ("embedding", "query")),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ("embedding",)),
    "mlp.gate_proj.weight": ("ffn_gate.weight", ("feed_forward", "embedding")),
    "mlp.up_proj.weight": ("ffn_up.weight", ("feed_forward", "embedding")),
    "mlp.down_proj.weight": ("ffn_down.weight", ("embedding", "feed_forward")),
}
_HEAD_NORMS: Table = {
    "self_attn.q_norm.weight": ("attn_q_norm.weight", ("head",)),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", ("head",)),
}
_FOUR_NORMS: Table = {
    "post_attention_layernorm.weight": ("post_attention_norm.weight", ("embedding",)),
    "pre_feedforward_layernorm.weight": ("ffn_norm.weight", ("embedding",)),
    "post_feedforward_layernorm.weight": ("post_ffw_norm.weight", ("embedding",)),
}
_QKV_BIAS: Table = {
    "self_attn.q_proj.bias": ("attn_q.bias", ("query",)),
    "self_attn.k_proj.bias": ("attn_k.bias", ("key",)),
    "self_attn.v_proj.bias": ("attn_v.bias", ("key",)),
}
_OTHER_BIAS: Table = {
    "self_attn.o_proj.bias": ("attn_output.bias", ("embedding",)),
    "mlp.gate_proj.bias": ("ffn_gate.bias", ("feed_forward",)),
    "mlp.up_proj.bias": ("ffn_up.bias", ("feed_forward",)),
    "mlp.down_proj.bias": ("ffn_down.bias", ("embedding",)),
}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_OUTSIDE: Table = {
    EMBEDDING: ("token_embd.weight", ("vocabulary", "embedding")),
    FINAL_NORM: ("output_norm.weight", ("embedding",)),
}
# Tables that old versions of transformers stored; every version computes them.
_COMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs.

    Attributes:
        name: its name, `general.architecture`.
        layer: what every layer has.
        optional: what a layer may have.
        activation: the only one that the graph has, by transformers' name.
        interleaved: whether the graph rotates neighbouring pairs, so that q and k have to be reordered.
        norm_offset: what is added to every norm's weight.
        own_head: whether the graph can have a head of its own.
    """

    name: str
    layer: Table
    optional: Table = field(default_factory=dict)
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    own_head: bool = True

    @property
    def gemma(self) -> bool:
        """Whether it is one of Gemma's."""
        return self.name.startswith("gemma")


_GELU = "gelu_pytorch_tanh"
_LLAMA = Architecture("llama", _LAYER, {**_QKV_BIAS, **_OTHER_BIAS}, interleaved=True)
# The class that config.json names -> the graph that computes the same.
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", _LAYER, _QKV_BIAS),
    "Qwen3ForCausalLM": Architecture("qwen3", {**_LAYER, **_HEAD_NORMS}, _QKV_BIAS),
    "GemmaForCausalLM": Architecture("gemma", _LAYER, _QKV_BIAS, _GELU, norm_offset=1.0, own_head=False),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", {**_LAYER, **_FOUR_NORMS}, _QKV_BIAS, _GELU, norm_offset=1.0, own_head=False
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", {**_LAYER, **_FOUR_NORMS, **_HEAD_NORMS}, _QKV_BIAS, _GELU, norm_offset=1.0
    ),
}


def find_architecture(config: Mapping[str, Any], where: object) -> Architecture:
    """The graph for a config.json.

    Raises:
        RequestError: there is none.
    """
    name = next(iter(config.get("architectures") or []), None)
    if name is None:
        raise RequestError(f"{where} does not name its architecture in config.json, so nothing says what to write")
    found = ARCHITECTURES.get(name)
    if found is None:
        raise RequestError(f"{name} is not known as GGUF here; {nearest(name, ARCHITECTURES)}")
    return found


@dataclass(frozen=True)
class Sizes:
    """The sizes that shapes are made of, from a transformers config."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    key_heads: int
    head: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Read them."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            embedding=config.hidden_size,
            feed_forward=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def shape(self, names: tuple[str, ...], vocabulary: int = 0) -> tuple[int, ...]:
        """A table's shape in numbers."""
        known = {"query": self.heads * self.head, "key": self.key_heads * self.head, "vocabulary": vocabulary}
        return tuple(known.get(name) or getattr(self, name) for name in names)

    def order(self, name: str) -> torch.Tensor | None:
        """For q and k of an interleaved graph: int64 [rows], the row to put at each place; else None."""
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}.get(name.split(".")[-2])
        if heads is None:
            return None
        return torch.arange(heads * self.head).view(heads, 2, self.head // 2).transpose(1, 2).reshape(-1)


def locate(name: str, architecture: Architecture) -> tuple[str, tuple[str, ...]] | None:
    """GGUF's name for a tensor and its shape in names; None where the graph has no place for it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if name == HEAD and architecture.own_head:
        return "output.weight", ("vocabulary", "embedding")
    prefix, _, rest = name.partition(".layers.")
    number, _, inside = rest.partition(".")
    if prefix != "model" or not number.isdecimal():
        return None
    found = architecture.layer.get(inside) or architecture.optional.get(inside)
    return None if found is None else (f"blk.{number}.{found[0]}", found[1])


def required(architecture: Architecture, layers: int) -> list[str]:
    """The tensors that the graph cannot do without, by transformers' names (the head may be tied)."""
    return [
        *_OUTSIDE,
        *(f"model.layers.{number}.{inside}" for number in range(layers) for inside in architecture.layer),
    ]


def is_computed(name: str) -> bool:
    """Whether a tensor in a checkpoint is a table that is computed anyway."""
    return name.endswith(_COMPUTED)


def hyperparameters(architecture: Architecture, config: Any) -> dict[str, Any]:
    """The numbers that the graph is built from, by key, from a transformers config.

    Raises:
        RequestError: the config asks for something that the graph does not compute.
    """
    sizes = Sizes.of(config)
    _check(architecture, config, sizes)
    values: dict[str, Any] = {
        "block_count": sizes.layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": sizes.embedding,
        "feed_forward_length": sizes.feed_forward,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.key_heads,
        "attention.key_length": sizes.head,
        "attention.value_length": sizes.head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": sizes.head,
    }
    if architecture.name in ("gemma2", "gemma3"):
        values |= _windows(architecture, config)
    values |= _rotation(architecture, config)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def _check(architecture: Architecture, config: Any, sizes: Sizes) -> None:
    name = architecture.name
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        raise RequestError(
            f"hidden_act {activation!r} is not what llama.cpp's graph {name!r} computes ({architecture.activation!r})"
        )
    if name == "qwen2" and sizes.heads * sizes.head != sizes.embedding:
        raise RequestError(f"llama.cpp's graph 'qwen2' needs heads x head_dim = hidden_size; head_dim is {sizes.head}")
    if getattr(config, "use_bidirectional_attention", None):
        raise RequestError(f"use_bidirectional_attention is not what llama.cpp's graph {name!r} computes")
    if name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise RequestError(
            "llama.cpp's graph 'gemma2' caps all logits; attn_logit_ or final_logit_softcapping is unset"
        )
    if name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        raise RequestError("attn_logit_softcapping is not what llama.cpp's graph 'gemma3' computes")
    if name in ("gemma2", "gemma3"):
        # The graph knows Gemma's 27 B by its number of layers, and scales differently for it alone.
        largest = sizes.layers == {"gemma2": 46, "gemma3": 62}[name]
        scaled = sizes.embedding // sizes.heads if largest else sizes.head
        if config.query_pre_attn_scalar != scaled:
            raise RequestError(
                f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not what llama.cpp's graph {name!r} computes "
                f"({scaled})"
            )
    elif "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise RequestError(f"sliding_attention (use_sliding_window) is not what llama.cpp's graph {name!r} computes")


def _windows(architecture: Architecture, config: Any) -> dict[str, Any]:
    """Gemma 2's and 3's alternating attention, and the caps on their logits."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    every = {"gemma2": 2, "gemma3": 6}[architecture.name]
    values: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    if sliding != [bool((layer + 1) % every) for layer in range(len(sliding))]:
        values["attention.sliding_window_pattern"] = sliding
    if getattr(config, "attn_logit_softcapping", None):
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def _rotation(architecture: Architecture, config: Any) -> dict[str, Any]:
    parameters = dict(config.rope_parameters)
    values: dict[str, Any] = {}
    if "full_attention" in parameters:
        sliding = parameters["sliding_attention"]
        if sliding.get("rope_type", "default") != "default":
            raise RequestError(f"rope_type {sliding['rope_type']!r} of sliding attention cannot be said in GGUF")
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
        parameters = parameters["full_attention"]
    values["rope.freq_base"] = float(parameters["rope_theta"])
    if float(parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise RequestError(f"partial_rotary_factor is not what llama.cpp's graph {architecture.name!r} computes")
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        return values | _yarn(parameters, config)
    if kind == "default" or (kind == "llama3" and architecture.name == "llama"):
        return values
    offered = ["default", "linear", "yarn", *(["llama3"] if architecture.name == "llama" else [])]
    raise RequestError(f"rope_type {kind!r} cannot be said in GGUF for {architecture.name}; {nearest(kind, offered)}")


def _yarn(parameters: Mapping[str, Any], config: Any) -> dict[str, Any]:
    unknown = next((key for key in ("mscale", "mscale_all_dim") if parameters.get(key)), None)
    if unknown or parameters.get("truncate") is False:
        raise RequestError(f"yarn's {unknown or 'truncate: false'} cannot be said in GGUF for this model")
    factor = float(parameters["factor"])
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": parameters.get("original_max_position_embeddings")
        or config.max_position_embeddings,
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if parameters.get(ours) is not None:
            values[f"rope.scaling.{theirs}"] = float(parameters[ours])
    if parameters.get("attention_factor") is not None:
        # llama.cpp multiplies its own default by this.
        values["rope.scaling.attn_factor"] = float(parameters["attention_factor"]) / (0.1 * math.log(factor) + 1)
    return values


def rope_divisors(config: Any) -> torch.Tensor | None:
    """Llama 3's `rope_freqs`, float32 [head / 2]: plain frequencies over scaled ones; None for other models."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = Sizes.of(config).head
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    divisors: torch.Tensor = plain / scaled
    return divisors


def window_note(config: Any) -> str | None:
    """What llama.cpp's graph leaves out of Mistral's attention, in one sentence, or None."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "layer_types", None) or window >= config.max_position_embeddings:
        return None
    return (
        f"the sliding window of {window:,} tokens is left out (llama.cpp's graph attends to all), so outputs are the "
        f"same up to {window:,} tokens of context"
    )
