"""Llamas of the sizes that QLoRA's paper trained, with random 4-bit weights that are made on the card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

# hidden, width of the MLP, layers, heads, heads of keys and values; vocabulary 32,000.
SHAPES = {
    "1 B": (2048, 5632, 22, 32, 4),
    "7 B": (4096, 11008, 32, 32, 32),
    "13 B": (5120, 13824, 40, 40, 40),
    "33 B": (6656, 17920, 60, 52, 52),
    "65 B": (8192, 22016, 80, 64, 64),
    "70 B": (8192, 28672, 80, 64, 8),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK, SPREAD = 64, 0.02  # of the weights: random codes with scales of this order keep activations finite


def llama_config(name: str) -> Any:
    """The config of one of `SHAPES`."""
    from transformers import LlamaConfig

    hidden, width, layers, heads, kv_heads = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32_000,
        max_position_embeddings=4096,
    )


def random_weight(rows: int, columns: int, device: str) -> Any:
    """A QuantizedTensor [rows, columns] of NF4, double-quantized, that was never dense."""
    from halfbyte.formats import SCALE_BLOCK, QuantSpec
    from halfbyte.tensor import QuantizedTensor

    count = rows * columns
    blocks = math.ceil(count / BLOCK)
    inner = {
        "codes": torch.randint(256, (count // 2,), dtype=torch.uint8, device=device),
        "scales": torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        "scale_absmax": torch.full((math.ceil(blocks / SCALE_BLOCK),), SPREAD / 4, device=device),
        "scale_offset": torch.tensor(SPREAD, device=device),
    }
    return QuantizedTensor(inner, QuantSpec("nf4", BLOCK, 8), (rows, columns), torch.bfloat16)


def random_llama(config: Any, contender: str, device: str) -> Any:
    """A causal language model, 4-bit but for embeddings and head, in "halfbyte"'s or "bitsandbytes"'s layers."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    make = {"halfbyte": _halfbyte_layer, "bitsandbytes": _bitsandbytes_layer}[contender]
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make(random_weight(module.out_features, module.in_features, device)))
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1) if parameter.dim() == 1 else value.normal_(std=SPREAD)
            setattr(module, own, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def write_folder(model: Any, folder: Path) -> None:
    """A model of `random_llama` as a folder in bitsandbytes' own serialization, with a tokenizer of four words."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from halfbyte.tensor import QuantizedTensor, flatten

    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.data
        tensors |= flatten(name, weight) if isinstance(weight, QuantizedTensor) else {name: weight}
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # the key's name before transformers 4.56
        "pad_token_id": 3,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }
    folder.mkdir(parents=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special.values())}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def with_adapter(model: Any, contender: str, activations: str) -> Any:
    """The model with LoRA of rank 16 on all projections, ready to train; activations: kept, checkpointed, offloaded."""
    import peft

    if contender == "halfbyte":
        from halfbyte.models.fused import fuse
        from halfbyte.models.peft_dispatch import register_dispatcher

        register_dispatcher()
        fuse(model)
    else:
        model.is_loaded_in_4bit = True  # what peft asks before it takes its layer for bitsandbytes
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
    if activations != "kept":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if activations == "offloaded":
        from halfbyte.train.offload import Offload

        Offload().attach(model)
    return model.train()


def _halfbyte_layer(weight: Any) -> nn.Module:
    import halfbyte as hb

    layer = hb.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _bitsandbytes_layer(weight: Any) -> nn.Module:
    import bitsandbytes as bnb

    from halfbyte.tensor import flatten

    stored = {key.removeprefix("weight."): tensor for key, tensor in flatten("weight", weight).items()}
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        data=stored.pop("weight"), quantized_stats=stored, requires_grad=False, device=weight.device, module=layer
    )
    return layer
