"""`halfbyte generate`: ask a model, a run directory, or a model with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"


def generate(
    model: Annotated[str, typer.Argument(help="Model folder, hub name, adapter folder or run directory.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to ask; may repeat.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder to put on the model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
) -> None:
    """Answer prompts with a model."""
    from halfbyte import env

    if Path(model).exists():
        env.go_offline()
    for folder in (Path(model), adapter):
        if folder is not None:
            _refuse_classifier(folder)
    loaded, tokenizer = load_for_inference(model, adapter)
    from halfbyte.infer import generate as answer

    for text in answer(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature):
        typer.echo(text)


def _refuse_classifier(folder: Path) -> None:
    """A classifier's config would load as a language model of the same type, with a head that nobody trained."""
    path = folder / "config.json"
    architectures = (_json(path).get("architectures") if path.is_file() else None) or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        raise RequestError(
            f"{folder} is a classifier ({architectures[0]}) and writes no answers; load it in Python with "
            "transformers' AutoModelForSequenceClassification, or name a run of task causal-lm."
        )


def load_for_inference(model: str, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, with an adapter where one is given or where `model` is one itself.

    A run directory's recipe says how its base was quantized; the adapter was fitted to exactly those weights.

    Raises:
        CheckpointError: see `load_model`; or the folder is an adapter whose base is not named.
        RequestError: an adapter was given twice.
    """
    import torch

    from halfbyte.models import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = model
    if (Path(model) / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise RequestError(f"{model} is an adapter itself; leave --adapter out, or give its base as MODEL.")
        adapter = Path(model)
        base = str(_adapter_config(adapter).get("base_model_name_or_path") or "")
    if adapter is None:
        return load_model(model, device=device), load_tokenizer(model)
    if not base:
        raise CheckpointError(
            f"adapter {adapter} does not name its base; give the base as MODEL and --adapter {adapter}."
        )
    from peft import PeftModel
    from safetensors import SafetensorError

    from halfbyte.models import other_base

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"adapter {adapter} has no {weights.name}; other files (pickles) are not read.")
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()  # with the chat template of the training
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else base)
    if warning := other_base(adapter, base):
        typer.echo(f"halfbyte: {warning}", err=True)
    quantized = _load_base(base, adapter)
    try:
        loaded: Any = PeftModel.from_pretrained(quantized, str(adapter))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"adapter {adapter} does not fit {base} or is damaged: {reason}") from error
    return loaded.to(device), tokenizer


def _load_base(base: str, adapter: Path) -> PreTrainedModel:
    from halfbyte.models import load_model

    recipe_file = adapter / "recipe.yaml"
    if not recipe_file.is_file():
        return load_model(base)
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import load_base

    return load_base(load_recipe(recipe_file, [f"model_name_or_path={base}"]))


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"adapter folder {adapter} has no {ADAPTER_CONFIG}.")
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
