"""What `generate`, `chat` and `serve` share: from a name on the command line to an engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from halfbyte.infer import Engine

ADAPTER_CONFIG = "adapter_config.json"


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


def open_engine(model: str, adapters: dict[str, Path], **options: Any) -> Engine:
    """The engine of an archive, a model folder, a hub name, an adapter folder or a run directory.

    An adapter's own recipe says how its base was quantized; the adapter was fitted to exactly those weights. An adapter
    that is named as the model is loaded under its folder's name, and `engine.adapters[0]` is it.

    Raises:
        CheckpointError: see `load_model`; or an adapter whose base is not named.
        RequestError: a classifier, which writes no answers.
    """
    from halfbyte import env
    from halfbyte.infer import Engine
    from halfbyte.models import load_model, load_tokenizer

    if Path(model).exists():
        env.go_offline()
    for path in (Path(model), *adapters.values()):
        _refuse_classifier(path)
    base, recipe = model, None
    if (Path(model) / ADAPTER_CONFIG).is_file():
        own = Path(model)
        adapters = {own.resolve().name: own, **adapters}
        base = str(_json(own / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if not base:
            raise CheckpointError(f"adapter {own} does not name its base; give the base as MODEL and --adapter {own}.")
    for path in adapters.values():
        if (path / "recipe.yaml").is_file():
            recipe = recipe or path / "recipe.yaml"
    loaded = load_model(base) if recipe is None else _load_as_trained(base, recipe)
    with_tokenizer = next((path for path in adapters.values() if (path / "tokenizer_config.json").is_file()), None)
    tokenizer = load_tokenizer(with_tokenizer or base)  # an adapter's has the chat template of its training
    return Engine(loaded, adapters, tokenizer=tokenizer, **options)


def _load_as_trained(base: str, recipe: Path) -> Any:
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import load_base

    return load_base(load_recipe(recipe, [f"model_name_or_path={base}"]))


def _refuse_classifier(folder: Path) -> None:
    """A classifier's config would load as a language model of the same type, with a head that nobody trained."""
    path = folder / "config.json"
    architectures = (_json(path).get("architectures") if path.is_file() else None) or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        raise RequestError(
            f"{folder} is a classifier ({architectures[0]}) and writes no answers; load it in Python with "
            "transformers' AutoModelForSequenceClassification, or name a run of task causal-lm."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
