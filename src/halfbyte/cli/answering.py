"""What `generate`, `chat` and `serve` share: from a name on the command line to an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.infer import Engine

ADAPTER_CONFIG = "adapter_config.json"
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for the weights, like 6GiB; what does not fit is read from the file at each step. "
        "By default what is available."
    ),
]

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:NUMBER; by default the first card, or the CPU where there is none."),
]


def memory_size(text: str) -> int:
    """Bytes of a size like 6GiB, 1.5GB or 300MB.

    Raises:
        RequestError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None:
        raise RequestError(f"{text!r} is no size of memory; write it like 6GiB or 500MB.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2].upper())))


def named_adapters(options: Iterable[str]) -> dict[str, Path]:
    """`NAME=FOLDER` options; a folder alone goes by its own name.

    Raises:
        RequestError: two of one name.
    """
    found: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        path = Path(folder if equals else option)
        name = name if equals else path.name
        if name in found:
            raise RequestError(f"two adapters are named {name!r}; write NAME={path} with another name.")
        found[name] = path
    return found


def open_engine(
    model: str, adapters: dict[str, Path], max_memory: str | None = None, device: str | None = None, **options: Any
) -> Engine:
    """The engine of an archive, a model folder, a hub name, an adapter folder or a run directory.

    An adapter's own recipe says how its base was quantized; the adapter was fitted to exactly those weights. An adapter
    that is named as the model is loaded under its folder's name, and `engine.adapters[0]` is it.

    Raises:
        CheckpointError: see `load_model`; or an adapter whose base is not named.
        RequestError: a classifier, which writes no answers; `max_memory` is no size; or there is no such device.
    """
    from halfbyte.infer import Engine
    from halfbyte.infer.placement import choose_device

    base = model
    memory = None if max_memory is None else memory_size(max_memory)
    place = str(choose_device(device))
    for path in (Path(model), *adapters.values()):
        _refuse_classifier(path)
    if (Path(model) / ADAPTER_CONFIG).is_file():
        own = Path(model)
        adapters = {own.resolve().name: own, **adapters}
        base = str(_json(own / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if not base:
            raise CheckpointError(f"adapter {own} does not name its base; give the base as MODEL and --adapter {own}.")
    loaded, tokenizer = _load(base, list(adapters.values()))
    return Engine(loaded, adapters, tokenizer=tokenizer, device=place, max_memory=memory, **options)


def load_adapted(base: str, adapter: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """peft's model: a base, quantized as the adapter's recipe says, with the adapter on it; and the tokenizer.

    Raises:
        CheckpointError: see `load_model`; or the adapter is incomplete, damaged or made for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from halfbyte.infer.placement import choose_device

    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"adapter {adapter} has no adapter_model.safetensors; other files (pickles) are not read."
        )
    loaded, tokenizer = _load(base, [adapter])
    try:
        loaded.to(choose_device(None))
        return PeftModel.from_pretrained(loaded, str(adapter)), tokenizer
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"adapter {adapter} does not fit {base} or is damaged: {reason}") from error


def _load(base: str, adapters: list[Path]) -> tuple[Any, PreTrainedTokenizerBase]:
    """A base as its adapters were trained on it, but without them, and their tokenizer."""
    from halfbyte import env
    from halfbyte.models import load_model, load_tokenizer, other_base, resize_vocabulary

    if Path(base).exists():
        env.go_offline()
    rows = 0
    for path in adapters:
        rows = max(rows, 1 + max(_trained_rows(path), default=-1))
        if warning := other_base(path, base):
            typer.echo(f"halfbyte: {warning}", err=True)
    recipe = next((path / "recipe.yaml" for path in adapters if (path / "recipe.yaml").is_file()), None)
    loaded = load_model(base) if recipe is None else _load_as_trained(base, recipe)
    resize_vocabulary(loaded, rows)
    with_tokenizer = next((path for path in adapters if (path / "tokenizer_config.json").is_file()), None)
    tokenizer = load_tokenizer(with_tokenizer or base)  # an adapter's has the chat template of its training
    return loaded, tokenizer


def _load_as_trained(base: str, recipe: Path) -> Any:
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import load_base

    return load_base(load_recipe(recipe, [f"model_name_or_path={base}"]))


def _trained_rows(adapter: Path) -> list[int]:
    """The tokens whose rows of the embeddings an adapter holds; the base may have to grow to have them."""
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"adapter folder {adapter} has no {ADAPTER_CONFIG}.")
    rows = _json(path).get("trainable_token_indices") or []
    return [index for group in (rows.values() if isinstance(rows, dict) else [rows]) for index in group]


def _refuse_classifier(folder: Path) -> None:
    """A classifier's config would load as a language model of the same type, with a head that nobody trained."""
    path = folder / "config.json"
    architectures = (_json(path).get("architectures") if path.is_file() else None) or [""]
    kind = architectures[0].partition("For")[2]
    if kind in ("SequenceClassification", "TokenClassification"):
        raise RequestError(
            f"{folder} is a classifier ({architectures[0]}) and writes no answers; load it in Python with "
            f"transformers' AutoModelFor{kind}, or name a run of task causal-lm."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
