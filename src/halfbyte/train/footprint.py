"""How much memory a run will take, from the model's config and the recipe, before a weight is read.

Four parts: the weights, the gradients, the optimizer's state, and the activations that the backward pass needs. The
first three are counted. Activations follow from what autograd keeps of a layer; for one token, with h the hidden size,
a the width of all heads, m the width of the MLP and e the bytes of the compute dtype:

| kept                                              | bytes                                                          |
|---|---|
| inputs of the two norms                           | 2 h e; their float32 copies as well where they are not fused   |
| dropout of the model's own, its masks             | 2 h e                                                          |
| inputs of adapted modules, one for what shares it | attention h e, MLP h e, its way down m e                       |
| with lora_dropout: a copy for each module         | its input features (e + 1) instead                             |
| x A of each adapted module                        | lora_r e                                                       |
| attention: queries, keys, values, result          | 4 a e, and for a row of T tokens the mask, T e                 |
| attention with dropout, on the CPU                | 3 a 4 + 3 heads T 4: torch writes the T x T weights out        |
| between the projections of a gated MLP            | 2 m e fused, 3 m e not                                         |
| between those of a plain MLP                      | m e; 4 m e where GELU is written as tanh of a polynomial       |
| between those of experts, k to a token            | 2 k m e, with m the width of one; 4 k m e where they are dense |
| with an adapter on experts                        | h e (dense: k h e), and k m e between them; 2 k lora_r e       |

A frozen projection without an adapter keeps nothing. Full fine-tuning keeps the input of every projection, in 16 bits
beside float32 norms. With gradient checkpointing each layer keeps its input, and one layer at a time the rest. With
activation offloading three of these inputs are on the GPU at a time (that of the layer in work, the next one, and the
embeddings' output, which is a leaf and stays), and all of them in pinned memory, of which torch takes powers of two.
Behind the layers comes one chunk of logits. tests/train/test_footprint.py compares this with what autograd keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.formats import QuantSpec
from halfbyte.nn.cross_entropy import chunk_rows
from halfbyte.train.targets import in_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.train.recipe import Recipe
    from halfbyte.train.targets import Outline, Shapes

COMPUTE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "adamw_4bit": 1.03}  # of a parameter, see `halfbyte.optim.states`
_INPUTS_ON_DEVICE = 3  # see `halfbyte.train.offload`
_BETWEEN_EXPERTS = 2  # widths: gate and up; what follows is computed again, see `halfbyte.models.experts`
_BETWEEN_DENSE_EXPERTS = 4  # in transformers' own way: the gate's activation and its product with up besides
_ROUTING = 44  # bytes of a pair of token and expert: five indices, and its share
_POLYNOMIAL_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run.

    Attributes:
        weights: the base and what is trained, masters included.
        gradients: of what is trained.
        state: of the optimizer, as far as it lies in memory.
        activations: of the largest micro-batch.
        trained: parameters that are trained, not bytes.
        quantized: parameters of the base that are quantized, not bytes.
        host: pinned memory of the machine, for activation offloading; not in the total.
    """

    weights: float
    gradients: float
    state: float
    activations: float
    trained: int
    quantized: int
    host: float

    @property
    def total(self) -> float:
        """All that lies where the model does."""
        return self.weights + self.gradients + self.state + self.activations


def estimate(
    recipe: Recipe, config: PretrainedConfig, outline: Outline, adapted: Shapes, length: int, *, gpu: bool, fused: bool
) -> Footprint:
    """What a run takes at its peak.

    Args:
        recipe: how it trains.
        config: of the model.
        outline: of the model.
        adapted: the matrices that get an adapter, of linear modules and of experts; empty for `method: full`.
        length: tokens of the longest row, padding and both answers of a pair included.
        gpu: whether it runs on one.
        fused: whether its norms, gates and loss are fused there: by halfbyte on a CPU, by liger-kernel on a GPU.
    """
    linear = matrices_of(outline)
    full, compute = recipe.method == "full", COMPUTE_BYTES[recipe.compute_dtype]
    quantized = linear if recipe.method == "qlora" else 0
    bits = QuantSpec(recipe.format, recipe.block_size, recipe.scale_bits).nominal_bits()
    base = quantized * bits / 8 + (outline.parameters - quantized) * (4 if full else compute)
    adapter = sum(
        math.prod(experts) * (recipe.lora_r * (rows + columns) + rows * recipe.use_dora)
        for *experts, rows, columns in adapted.values()
    )
    trained = outline.parameters if full else adapter
    casts = (linear if full else adapter) * compute if compute < 4 else 0  # autocast's copies, kept until the step
    return Footprint(
        weights=base + 4 * adapter + casts,
        gradients=4 * trained,
        state=0 if recipe.paged != "none" else trained * STATE_BYTES.get(recipe.optim, 8.0),
        activations=activation_bytes(recipe, config, adapted, length, gpu=gpu, fused=fused),
        trained=trained,
        quantized=quantized,
        host=_pinned_bytes(recipe, config, length),
    )


def matrices_of(outline: Outline) -> int:
    """Parameters of the linear layers and the experts, which are what qlora quantizes."""
    return sum(math.prod(shape) for shape in (*outline.shapes.values(), *outline.experts.values()))


def activation_bytes(
    recipe: Recipe, config: PretrainedConfig, adapted: Shapes, length: int, *, gpu: bool, fused: bool
) -> float:
    """What the backward pass of the largest micro-batch needs; arguments as `estimate` takes them."""
    sizes: Any = config.get_text_config()
    layers, hidden, compute = sizes.num_hidden_layers, sizes.hidden_size, COMPUTE_BYTES[recipe.compute_dtype]
    residual = _residual_bytes(recipe)
    tokens = recipe.per_device_train_batch_size * length
    layer = tokens * _layer_bytes(recipe, sizes, adapted, length, gpu=gpu, fused=fused)
    if recipe.method == "lora":  # peft adds the change of dense experts to the parameter, and autograd keeps the sum
        layer += compute * sum(math.prod(shape) for shape in adapted.values() if len(shape) == 3) / layers
    kept = layers * layer
    if recipe.gradient_checkpointing:
        inputs = min(layers, _INPUTS_ON_DEVICE) if recipe.activation_offloading else layers
        kept = inputs * tokens * hidden * residual + layer
    words = 0 if recipe.task == "sequence-classification" else sizes.vocab_size
    chunk = 0
    if words:
        rows = _liger_rows(tokens, words, hidden) if gpu and fused else chunk_rows(words, compute)
        chunk = min(tokens, rows) * words * compute
    return float(kept + tokens * hidden * (residual + compute) + chunk)


def _liger_rows(tokens: int, words: int, hidden: int) -> int:
    """Of a chunk of logits, which liger-kernel makes about as large as the hidden states."""
    return _power_of_two(math.ceil(tokens / math.ceil(words / hidden)))


def _power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _pinned_bytes(recipe: Recipe, config: PretrainedConfig, length: int) -> float:
    if not recipe.activation_offloading:
        return 0.0
    sizes: Any = config.get_text_config()
    tokens = recipe.per_device_train_batch_size * length
    checkpoint = tokens * sizes.hidden_size * _residual_bytes(recipe)
    return float(sizes.num_hidden_layers * _power_of_two(checkpoint))


def _residual_bytes(recipe: Recipe) -> int:
    """Of a number between two layers."""
    return 4 if recipe.method == "full" else COMPUTE_BYTES[recipe.compute_dtype]


def _layer_bytes(recipe: Recipe, sizes: Any, adapted: Shapes, length: int, *, gpu: bool, fused: bool) -> float:
    """Of one token in one layer."""
    hidden, compute = sizes.hidden_size, COMPUTE_BYTES[recipe.compute_dtype]
    between, gated = _mlp(sizes, fused=fused)
    top_k = _top_k(sizes)
    width = _mlp_width(sizes)
    inside: float = between * width
    if top_k:
        widths = _BETWEEN_EXPERTS if recipe.method == "qlora" else _BETWEEN_DENSE_EXPERTS
        inside = between * _shared_width(sizes) + widths * width + top_k * _ROUTING / compute
    own_dropout = any(getattr(sizes, name, 0) for name in ("resid_pdrop", "hidden_dropout_prob", "dropout"))
    kept = _attention_bytes(sizes, compute, length, gpu=gpu) + 2 * hidden * compute * own_dropout
    if recipe.method == "full":
        inputs = 5 if gated else 4  # each projection has a cast of its own, where there is one to cast
        of_projections = (inputs if compute < 4 else 2) * hidden + width + top_k * hidden
        return kept + 4 * hidden * 4 + (of_projections + inside) * compute
    kept += 2 * hidden * (4 if not fused and gated and compute < 4 else compute) + inside * compute
    per_layer = sizes.num_hidden_layers
    linear = {name: shape[1] for name, shape in adapted.items() if len(shape) == 2}
    experts = [shape[2] for shape in adapted.values() if len(shape) == 3]
    gathered = recipe.method == "lora"  # a row for each pair of token and expert
    narrow = sum(columns for columns in experts if gathered or columns != hidden)
    kept += (recipe.lora_r * (len(linear) + top_k * len(experts)) + top_k * narrow) * compute / per_layer
    if recipe.lora_dropout:
        return kept + sum(linear.values()) * (compute + 1) / per_layer
    attention = any(in_attention(name) for name in linear)
    up = hidden in [*experts, *(columns for name, columns in linear.items() if not in_attention(name))]
    down = sum(columns for name, columns in linear.items() if not in_attention(name) and columns != hidden) / per_layer
    return kept + (attention * hidden + up * hidden + down) * compute


def _attention_bytes(sizes: Any, compute: int, length: int, *, gpu: bool) -> float:
    heads = sizes.num_attention_heads
    width = heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
    dropout = any(getattr(sizes, n, 0) for n in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"))
    if dropout and not gpu:
        return 3 * width * 4 + 3 * heads * length * 4 + width * compute
    return 4 * width * compute + length * compute + 4 * heads


def _mlp(sizes: Any, *, fused: bool) -> tuple[int, bool]:
    """How many tensors of the MLP's width lie between its projections, and whether it is gated."""
    activation = str(getattr(sizes, "hidden_act", None) or getattr(sizes, "activation_function", ""))
    if activation in ("silu", "swish") or getattr(sizes, "hidden_activation", None):
        return (2 if fused else 3), True
    return (4 if activation in _POLYNOMIAL_GELUS else 1), False


def _top_k(sizes: Any) -> int:
    """Experts that a token is sent to; 0 where there are none."""
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    return int(next((count for name in names if (count := getattr(sizes, name, None))), 0))


def _mlp_width(sizes: Any) -> int:
    """Features between the projections that a token passes; of experts, those that it is sent to."""
    experts = _top_k(sizes)
    width = getattr(sizes, "moe_intermediate_size", None) if experts else None
    width = width or getattr(sizes, "intermediate_size", None) or getattr(sizes, "n_inner", None)
    return int(width or 4 * sizes.hidden_size) * (experts or 1)


def _shared_width(sizes: Any) -> int:
    """Features between the projections of the experts that every token passes."""
    width = getattr(sizes, "shared_expert_intermediate_size", None)
    each = getattr(sizes, "moe_intermediate_size", None) or 0
    return int(width or (getattr(sizes, "n_shared_experts", None) or 0) * each)


def rounded_down(rank: float) -> int:
    """The largest power of two that is not above `rank`, at least 1: a rank to advise."""
    return 1 << max(0, math.floor(math.log2(max(rank, 1))))
