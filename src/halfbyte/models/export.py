"""A model, however it is stored, as a folder for other programs: dense safetensors, or bitsandbytes' 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.loading import load_model, load_tokenizer, resolve
from halfbyte.models.saving import check_output_folder, save_model
from halfbyte.models.sources import open_checkpoint
from halfbyte.nn import QuantizationReport
from halfbyte.nn.replace import is_conv1d
from halfbyte.tensor import QuantizedTensor


def export_bitsandbytes(source: str | Path, output: str | Path, *, task: str = "causal-lm") -> QuantizationReport:
    """Write a 4-bit folder that transformers loads with bitsandbytes and without halfbyte.

    Args:
        source: a model folder, an archive, or a name on the hub. One that is 4-bit already keeps its bytes; another is
            quantized to nf4, block 64, with 8-bit scales.
        output: a new folder.
        task: as for `load_model`.

    Returns:
        What is quantized.

    Raises:
        FormatError: bitsandbytes has no name for the encoding, or for a part that is quantized (experts, embeddings).
        CheckpointError, OutputError: see `load_model` and `save_model`.
    """
    check_output_folder(output)
    folder = resolve(source)
    dense = open_checkpoint(folder, verify=False).quant_method is None
    model = load_model(folder, quantization=HalfbyteConfig() if dense else None, task=task, fused=False)
    config = model.hf_quantizer.quantization_config
    if not config.bitsandbytes_readable:
        raise FormatError(
            f"{source} has parts that bitsandbytes cannot read ({config.spec}): it reads linear layers in nf4 and fp4 "
            "with 8-bit or float32 scales; export it to safetensors, and that to bitsandbytes"
        )
    save_model(model, output, _tokenizer(folder))
    report: QuantizationReport = model.halfbyte_report
    return report


def export_safetensors(
    source: str | Path, output: str | Path, dtype: torch.dtype | None = None, *, task: str = "causal-lm"
) -> torch.dtype:
    """Write a dense folder that transformers loads by itself.

    Args:
        source: a model folder, an archive, or a name on the hub.
        output: a new folder.
        dtype: of the weights, rounded once from float32; None: the one that the model computes in.
        task: as for `load_model`.

    Returns:
        The dtype.

    Raises:
        CheckpointError, OutputError: see `load_model` and `save_model`.
    """
    check_output_folder(output)
    folder = resolve(source)
    model = load_model(folder, dtype=dtype, task=task, fused=False)
    dense = _decoded(model, model.dtype)
    save_model(dense, output, _tokenizer(folder))
    written: torch.dtype = model.dtype
    return written


def _decoded(model: Any, dtype: torch.dtype) -> Any:
    """The same model without halfbyte's layers and tensors."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).to(dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, QuantizedTensor):
            tensor = tensor.dequantize(torch.float32).to(dtype)
            if is_conv1d(plain.get_submodule(name.rpartition(".")[0])):
                tensor = tensor.T.contiguous()
        state[name] = tensor
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _tokenizer(folder: Path) -> Any:
    """The tokenizer, where the model has one."""
    try:
        return load_tokenizer(folder)
    except CheckpointError:
        return None
