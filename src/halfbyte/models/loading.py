"""`load_model`: any transformers model from a local folder or the hub, quantized while it streams in.

transformers' own loader does the work (`quantizer.py`); this module feeds it tensors that are read one at a time, so
that loading peaks at what is kept and the largest tensor, and turns whatever is wrong with a folder into one
sentence.

A folder that is 4-bit already, made by halfbyte or by bitsandbytes, is recognised by its config.json and loaded as it
is; bitsandbytes need not be installed.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from halfbyte import env
from halfbyte.errors import CheckpointError, FormatError, RequestError, nearest
from halfbyte.formats import QuantSpec
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.fused import fuse
from halfbyte.models.quantizer import collect_failures, has_sink
from halfbyte.models.sources import model_files, open_checkpoint
from halfbyte.nn import report
from halfbyte.nn.parts import PARTS
from halfbyte.tensor import read_spec

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "encoder": "AutoModel",
}


def load_model(
    path: str | Path,
    *,
    quantization: HalfbyteConfig | None = None,
    dtype: torch.dtype | str | None = None,
    task: str = "causal-lm",
    num_labels: int | None = None,
    device: torch.device | str | None = None,
    fused: bool = True,
    verify: bool = True,
) -> Any:
    """Load a transformers model, quantizing it on the way if asked to.

    In training mode and with labels, a causal language model that is covered (see `halfbyte.models.fused`) gives its
    loss and `logits=None`: the logits would take more memory than the layers. `model(..., skip_logits=False)` gives
    both for one call, `fused=False` for the model; in eval mode there are always logits.

    Args:
        path: a model folder or a `.nf4dq` archive (nothing touches the network then), or a name on the hub.
        quantization: how to quantize; None loads the model as it is stored. A folder that is 4-bit already is loaded as
            it is when its encoding is the one asked for.
        dtype: dtype of everything that is not quantized, and the logical dtype of what is; None or "auto": the
            checkpoint's.
        task: "causal-lm", "sequence-classification", "token-classification" or "encoder".
        num_labels: classes of a new classification head.
        device: where to put it; None: the CPU.
        fused: whether modules run halfbyte's operations where these stand for the same computation.
        verify: compare an archive's checksums before it is used. Without, it is mapped and nothing of it is read until
            it is needed, and damage shows as wrong numbers.

    Returns:
        The model in eval mode; `model.halfbyte_report` says what was quantized, `model.halfbyte_fused` which parts were
        not fused and why.

    Raises:
        CheckpointError: the folder is incomplete or damaged; the message names file and tensor.
        FormatError: the model cannot be quantized as asked.
        RequestError: no such task.
    """
    env.quiet_libraries()
    if task not in TASKS:
        raise RequestError(f"task {task!r} is not offered; {nearest(task, TASKS)}")
    folder = resolve(path)
    checkpoint = open_checkpoint(folder, verify=verify)
    if has_sink():
        checkpoint.map_tensors()
    options = {} if num_labels is None else {"num_labels": num_labels}
    config = load_config(checkpoint.path, **options)
    stored = _stored_quantization(checkpoint, quantization)
    if stored is not None:
        config.quantization_config = stored.own_dict()
        quantization = None
    model = _load(checkpoint, config, task, quantization, dtype)
    _read_generation_config(model, checkpoint.path)
    model.config._name_or_path = str(path)
    model.name_or_path = str(path)
    if not hasattr(model, "halfbyte_report"):
        model.halfbyte_report = report(model)
    model.halfbyte_fused = fuse(model) if fused else dict.fromkeys(PARTS, "fused=False asks for it")
    return model.to(device).eval() if device is not None else model.eval()


def load_config(path: str | Path, **options: Any) -> Any:
    """transformers' config of a model folder, an archive, or a name on the hub.

    Args:
        path: as for `load_model`.
        options: fields to set.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        with model_files(path) as folder:
            return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{Path(path) / 'config.json'}: {_first_line(error)}") from None


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder or an archive (nothing touches the network then) or of a name on the hub.

    Raises:
        CheckpointError: there is none.
    """
    env.quiet_libraries()
    if Path(path).exists():
        env.go_offline()
    from transformers import AutoTokenizer

    try:
        with ExitStack() as files:
            tokenizer = AutoTokenizer.from_pretrained(files.enter_context(model_files(path)))
            # A tokenizer may copy its files when it is saved: an archive's, unpacked, stay as long as it does.
            weakref.finalize(tokenizer, files.pop_all().close)
        tokenizer.name_or_path = str(path)
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has no tokenizer that transformers can read: {_first_line(error)}") from None


def resize_vocabulary(model: Any, count: int) -> None:
    """Let a model's embeddings, and its head, have rows for at least `count` tokens. Those added are random."""
    if count > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(count, mean_resizing=False)
        model.halfbyte_report = report(model)


def resolve(path: str | Path) -> Path:
    """A local folder; a hub name is downloaded (safetensors, config and tokenizer only) and its folder returned.

    Raises:
        CheckpointError: the hub does not have it or cannot be reached.
    """
    folder = Path(path)
    name = str(path)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        env.go_offline()
        return folder.expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{name} is neither a folder here nor to be had from the hub: {reason}") from None


def _stored_quantization(checkpoint: Checkpoint, wanted: HalfbyteConfig | None) -> HalfbyteConfig | None:
    """How the folder is quantized already, or None."""
    method = checkpoint.quant_method
    if method is None:
        packed = next((key for key in checkpoint if ".quant_state." in key), None)
        if packed is not None:
            raise CheckpointError(f"{checkpoint.path} holds {packed}, and its config.json has no quantization_config")
        return None
    declared = dict(checkpoint.config["quantization_config"])
    if method == "bitsandbytes":
        spec = _first_spec(checkpoint)
        if spec is None:
            raise CheckpointError(f"{checkpoint.path} says it is 4-bit bitsandbytes and holds no packed weight")
        stored = HalfbyteConfig.from_bitsandbytes(declared, spec)
    elif method == "halfbyte":
        stored = HalfbyteConfig(**declared)
    else:
        raise CheckpointError(
            f"{checkpoint.path} is quantized by {method!r}; halfbyte reads bitsandbytes' and its own 4-bit folders"
        )
    if wanted is not None and wanted.spec != stored.spec:
        raise FormatError(
            f"{checkpoint.path} is already quantized as {stored.spec}; to have it as {wanted.spec}, start from the "
            "unquantized model"
        )
    if wanted is not None and wanted.compute_dtype is not None:
        stored.compute_dtype = wanted.compute_dtype
    return stored


def _first_spec(checkpoint: Checkpoint) -> QuantSpec | None:
    """The encoding of the first packed tensor; only its description is read."""
    return next((read_spec(key, checkpoint[key].read()) for key in checkpoint if ".quant_state." in key), None)


def _load(
    checkpoint: Checkpoint, config: Any, task: str, quantization: HalfbyteConfig | None, dtype: torch.dtype | str | None
) -> Any:
    # Only for its class: the Auto classes take a name, and the tensors come from here, not from a name.
    model_class = type(skeleton(config, task, checkpoint.path))
    try:
        with collect_failures(checkpoint.failures):
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(checkpoint),
                quantization_config=quantization,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, and are refused below by name
            )
    except Exception:
        if checkpoint.failures:
            raise checkpoint.failures[0] from None
        raise
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(f"{checkpoint.path} has {name} as {tuple(stored)}, and the model's is {tuple(expected)}")
    missing = sorted(name for name in info["missing_keys"] if not _may_be_new(model, name, task))
    if missing:
        raise CheckpointError(f"{checkpoint.path} lacks {len(missing)} weights of the model, the first is {missing[0]}")
    return model


def skeleton(config: Any, task: str, path: Path) -> Any:
    """The model that a config describes, unquantized and on the meta device: names and shapes, no bytes.

    Args:
        config: transformers'.
        task: as for `load_model`.
        path: where the config came from, for the message.

    Raises:
        CheckpointError: there is no such model.
    """
    import transformers

    try:
        with torch.device("meta"):
            return getattr(transformers, TASKS[task]).from_config(without_quantization(config))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be loaded as {task}: {_first_line(error)}") from None


def _read_generation_config(model: Any, path: Path) -> None:
    """The generation config beside the weights; transformers reads it only where it was given a name to load from."""
    from transformers import GenerationConfig

    with model_files(path) as folder:
        if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{path} has a damaged generation_config.json: {_first_line(error)}") from None


def _may_be_new(model: Any, name: str, task: str) -> bool:
    """Whether a weight that the folder lacks may be made anew: a classifier, a pooler that pretraining did not use."""
    if task == "causal-lm":
        return False
    body = model.base_model_prefix
    return "pooler" in name.split(".") or (hasattr(model, body) and not name.startswith(f"{body}."))


def without_quantization(config: Any) -> Any:
    """A copy of a config that does not say how its model is quantized."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
