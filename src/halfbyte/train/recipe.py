"""The recipe: everything that decides what a training run does, in one flat, frozen, typed object.

Names follow transformers and peft, so that what a person knows from there holds here. A default is written once, on its
field. `load_recipe` reports all mistakes of a file at once, each in a sentence that names the key, the value and the
nearest valid choice: a person who mends one mistake should not have to start again to hear of the next.

**Relative paths.** A path in a recipe file is relative to the file's folder, so a recipe and its data can be moved
together and run from anywhere. A path given on the command line (`--set dataset=mine.jsonl`) is relative to the
current directory, where the person who types it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from halfbyte.data.sources import Source, is_hub_dataset
from halfbyte.errors import RecipeError, nearest
from halfbyte.formats import BLOCK_SIZES, FORMATS

Method = Literal["qlora", "lora", "full"]
TaskName = Literal["causal-lm", "preference", "kto", "sequence-classification", "token-classification"]
OptimizerName = Literal["adamw", "adamw_8bit", "adamw_4bit", "galore_adamw", "galore_adamw_8bit"]
# What transformers and bitsandbytes call them; a name that begins with "paged_" also says so.
OPTIMIZER_ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_32bit": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
}
PATH_KEYS = ("model_name_or_path", "output_dir")
DATA_KEYS = ("dataset", "eval_dataset")
_SOURCE_KEYS = tuple(field.name for field in fields(Source))


class Recipe(BaseModel):
    """A training run. See `docs/` for one sentence on each key; the descriptions below are that text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    model_name_or_path: str = Field(description="model folder, or a name on the Hugging Face hub")
    output_dir: str = Field(description="run directory; must not exist, or be empty")
    method: Method = Field("qlora", description="qlora: frozen base in few bits; lora: frozen base; full: all weights")
    task: TaskName = Field(
        "causal-lm",
        description="what is learnt: to write, to prefer one answer of two (DPO), to give good answers (KTO), or to "
        "say the class of a text, or of a word",
    )
    seed: int = Field(42, ge=0, description="of initialisation, order and dropout")

    dataset: tuple[Source, ...] = Field(
        description="what to train on: a file, a folder or a hub data set; a list of them; or `{name: weight}`, where "
        "weights are shares of the rows. An entry of a list may be `{path, weight, split, name}`",
        min_length=1,
    )
    eval_dataset: tuple[Source, ...] = Field((), description="what to measure on, before and after; as dataset")
    eval_split: float | int | None = Field(
        None, gt=0, description="measure on rows held out of dataset: their share if below 1, else their number"
    )
    eval_metric: Literal["loss", "exact_match", "accuracy", "f1"] = Field(
        "loss", description="what to measure on eval_dataset; loss, accuracy and F1 come together where there are such"
    )
    max_new_tokens: int = Field(128, ge=1, description="longest answer, of exact_match and of samples")
    max_length: int | None = Field(
        None, ge=2, description="tokens of the longest row; null: 1024, or what the model was made for if that is less"
    )
    train_on: Literal["completion", "all_assistant", "last_turn", "all"] = Field(
        "completion",
        description="loss on the answers (but for those in a given prompt), on every turn of the assistant, on its "
        "last turn, or on every token",
    )
    packing: bool = Field(False, description="several rows in one of max_length, each of which sees only itself")
    label_names: tuple[str, ...] = Field(
        (), description="names of the classes, by number where labels are integers; []: those of the training data"
    )
    group_by_length: bool = Field(False, description="rows of a batch about equally long: less padding, less chance")
    dpo_beta: float = Field(
        0.1, gt=0, description="preference and kto: how dear it is to move away from the model at the start"
    )

    format: str = Field("nf4", description="number format of the frozen base (qlora)")
    block_size: int = Field(64, description="weights that share a scale (qlora)")
    scale_bits: Literal[4, 6, 8] | None = Field(8, description="bits of a double-quantized scale; null: float32 scales")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="of the matrix products")

    lora_r: int = Field(16, ge=1, description="rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="the adapter is scaled by lora_alpha / lora_r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained")
    target_modules: Literal["all-linear", "attention"] | tuple[str, ...] = Field(
        "all-linear", description="linear modules that get an adapter: a group, or a list of names"
    )
    target_parameters: Literal["experts"] | tuple[str, ...] | None = Field(
        None,
        description="weights of a mixture's experts that get an adapter for each expert: all of them, or those named; "
        "null: all, if target_modules is all-linear, and else none",
    )
    modules_to_save: tuple[str, ...] = Field((), description="modules that are trained whole and saved")
    new_tokens: tuple[str, ...] = Field(
        (), description="words that the tokenizer gets; of the embeddings only their rows are trained"
    )
    rank_pattern: dict[str, int] = Field({}, description="ranks of single modules, by name")
    alpha_pattern: dict[str, float] = Field({}, description="alphas of single modules, by name")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(lora_r)")
    use_dora: bool = Field(False, description="train a magnitude beside the direction")
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq"] = Field(
        True, description="how the adapter starts; true: it changes nothing at first; loftq: at what quantization lost"
    )

    adapter_dtype: Literal["float32", "bf16", "nf4"] = Field(
        "float32", description="what the adapter is rounded to after each step; float32 loses nothing"
    )
    adapter_rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="how, where adapter_dtype is not float32; nearest takes small updates back"
    )
    adapter_error_feedback: bool = Field(False, description="add what rounding the adapter lost at the next step")

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+: the learning rate of the adapter's B over that of its A; the paper advises 16"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; max_steps takes precedence")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; null: num_train_epochs decides")
    per_device_train_batch_size: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    activation_offloading: bool = Field(
        False, description="keep what gradient_checkpointing keeps in pinned host memory (CUDA): for long rows"
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    optim: OptimizerName = Field(
        "adamw", description="AdamW with 32, 8 or 4 bits of state; galore_adamw: full fine-tuning only"
    )
    paged: Literal["none", "host", "file"] = Field(
        "none", description="where optimizer state lies when not in memory: host (CUDA) or file (CPU)"
    )
    galore_rank: int = Field(128, ge=1, description="of the gradients' projections, for galore_adamw")
    galore_update_interval: int = Field(200, ge=1, description="steps after which a projection is made anew")
    galore_scale: float = Field(0.25, gt=0, description="what projected updates are multiplied by")

    logging_steps: int = Field(10, ge=1)
    report_to: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="a tracker that gets every log besides metrics.jsonl; its package has to be installed"
    )
    samples: int = Field(3, ge=0, description="prompts to answer before and after, greedily, into samples.jsonl")
    eval_steps: int | None = Field(None, ge=1, description="measure the loss on eval_dataset every so many steps")

    load_best_model_at_end: bool = Field(
        False, description="keep the weights of the lowest eval_loss, measured every eval_steps, and not the last"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop when so many measurements in a row have not lowered the best eval_loss"
    )
    save_steps: int | None = Field(500, ge=1, description="write a checkpoint every so many steps; null: at no step")
    save_total_limit: int = Field(
        2, ge=1, description="checkpoints to keep: the last ones, and the best of those with a loss on eval_dataset"
    )

    @field_validator("dataset", "eval_dataset", mode="before")
    @classmethod
    def _as_sources(cls, value: Any) -> Any:
        """A name, a list of names or of mappings, or a mapping of names to weights."""
        return tuple(_source(entry) for entry in _entries(value))

    @field_validator("eval_split")
    @classmethod
    def _share_or_number(cls, value: float | int | None) -> float | int | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("is neither a share below 1 nor a number of rows")
        return value

    @field_validator("label_names")
    @classmethod
    def _different_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and len(set(value)) < max(2, len(value)):
            raise ValueError("needs at least two names, no two of which are equal")
        return value

    @field_validator("new_tokens")
    @classmethod
    def _different_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or not all(token.strip() for token in value):
            raise ValueError("names a token twice, or an empty one")
        return value

    @field_serializer("dataset", "eval_dataset")
    def _plain(self, sources: tuple[Source, ...]) -> list[Any]:
        """As short as a person would write it."""
        plain = [{key: value for key, value in vars(source).items() if value is not None} for source in sources]
        bare = [source == Source(source.path) for source in sources]
        return [entry["path"] if alone else entry for entry, alone in zip(plain, bare, strict=True)]

    @field_validator(
        "target_modules", "target_parameters", "modules_to_save", "label_names", "new_tokens", mode="before"
    )
    @classmethod
    def _as_tuple(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML has lists; a frozen object holds tuples; a single name stands for a list of one."""
        if isinstance(value, str) and value not in _choices(cls.model_fields[str(info.field_name)].annotation):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _known_optimizers(cls, values: Any) -> Any:
        """Names from other libraries become ours."""
        name = values.get("optim") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        plain = name.removeprefix("paged_")
        ours = OPTIMIZER_ALIASES.get(plain, plain)
        if ours not in get_args(OptimizerName):
            return values
        paged = {"paged": "host" if torch.cuda.is_available() else "file"} if plain != name else {}
        return {**paged, **values, "optim": ours}

    @field_validator("format")
    @classmethod
    def _offered_format(cls, value: str) -> str:
        if value not in FORMATS:
            raise ValueError(f"is not offered; {nearest(value, FORMATS)}")
        return value

    @field_validator("block_size")
    @classmethod
    def _offered_block_size(cls, value: int) -> int:
        if value not in BLOCK_SIZES:
            near = min(BLOCK_SIZES, key=lambda size: abs(size - value))
            raise ValueError(f"is not offered; the nearest is {near} (of {', '.join(map(str, BLOCK_SIZES))})")
        return value

    @property
    def is_local(self) -> bool:
        """Whether everything it names lies on this machine, so that nothing has to reach for a network."""
        sources = (*self.dataset, *self.eval_dataset)
        return not is_hub_name(self.model_name_or_path) and not any(is_hub_dataset(s.path) for s in sources)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal: equal digests mean equal recipes."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file.
        overrides: "key=value" strings that replace what the file says; values are YAML.

    Raises:
        RecipeError: with every mistake found.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there are no recipes in {path.parent}"
        raise RecipeError(str(path), [f"the recipe does not exist; {hint}."]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"the recipe cannot be read: {error}."]) from error
    except yaml.YAMLError as error:
        raise RecipeError(str(path), ["not YAML: " + " ".join(str(error).split()) + "."]) from error
    if not isinstance(values, dict):
        raise RecipeError(str(path), ["a recipe is a list of `key: value` lines."])
    mistakes: list[str] = []
    values = _resolve(values, path.parent)
    values |= _resolve(_parse_overrides(overrides, mistakes), Path())
    return make_recipe(values, source=str(path), mistakes=mistakes)


def make_recipe(values: Mapping[str, Any], *, source: str = "recipe", mistakes: Iterable[str] = ()) -> Recipe:
    """Make a recipe from a dictionary, with the same messages as from a file.

    Raises:
        RecipeError: with every mistake found, those in `mistakes` first.
    """
    mistakes = list(mistakes)
    recipe = None
    wrong: set[str] = set()
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        told = {(str(e["loc"][0]), _sentence(e)) for e in _one_for_each_key(error.errors())}
        wrong = {key for key, _ in told}
        mistakes += sorted(sentence for _, sentence in told)
    mistakes += _contradictions({key: None if key in wrong else value for key, value in values.items()})
    if mistakes or recipe is None:
        raise RecipeError(source, mistakes)
    return recipe


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Keys that are right alone and wrong together."""
    found = []
    task = values.get("task", Recipe.model_fields["task"].default)
    metric = values.get("eval_metric")
    if metric in ("accuracy", "f1") and task == "causal-lm":
        found.append(f"eval_metric is {metric!r} but task is 'causal-lm', whose answers are texts; choose exact_match.")
    if task == "kto" and values.get("per_device_train_batch_size") == 1:
        found.append("task is 'kto', which compares rows of a batch, but per_device_train_batch_size is 1; choose 2.")
    if metric == ("f1" if task in ("preference", "kto") else "exact_match") and task not in ("causal-lm", None):
        found.append(f"eval_metric is {metric!r} but task is {task!r}; choose accuracy.")
    if values.get("label_names") and task in ("causal-lm", "preference", "kto"):
        found.append(f"label_names are set but task is {task!r}, which has no classes; leave them out.")
    if values.get("eval_steps") is None:
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if values.get(key) not in (None, False):
                found.append(f"{key} is {values[key]!r} but eval_steps is not set; say how often to measure.")
    if values.get("method") == "full":
        for key in ("adapter_dtype", "loraplus_lr_ratio"):
            if values.get(key) not in (None, Recipe.model_fields[key].default):
                found.append(
                    f"{key} is {values[key]!r} but method is 'full', which has no adapter; choose qlora or lora."
                )
    method = values.get("method", Recipe.model_fields["method"].default)
    if values.get("init_lora_weights") == "loftq" and method in ("lora", "full"):
        found.append(f"init_lora_weights is 'loftq' but method is {method!r}, whose base loses nothing; choose qlora.")
    if values.get("init_lora_weights") == "loftq" and values.get("use_dora"):
        found.append(
            "init_lora_weights is 'loftq', but use_dora is true, whose magnitudes are of other weights; choose one."
        )
    optim, paged = values.get("optim"), values.get("paged")
    if isinstance(optim, str) and optim.startswith("galore"):
        if method not in ("full", None):
            found.append(
                f"optim is {optim!r}, which projects whole matrices, but method is {method!r}; choose adamw_8bit, or "
                "method full."
            )
    else:
        for key in ("galore_rank", "galore_update_interval", "galore_scale"):
            if values.get(key) not in (None, Recipe.model_fields[key].default):
                found.append(f"{key} is {values[key]!r} but optim is {optim or 'adamw'!r}; choose galore_adamw.")
    if isinstance(optim, str) and optim.startswith("paged_") and paged == "none":
        found.append(f"optim is {optim!r} but paged is 'none'; choose host or file, or leave it out.")
    if values.get("eval_dataset") and values.get("eval_split"):
        found.append("eval_dataset and eval_split are both set; measure on the one or on the other.")
    if not values.get("eval_dataset") and not values.get("eval_split"):
        for key in ("eval_metric", "eval_steps"):
            if values.get(key) not in (None, Recipe.model_fields[key].default):
                found.append(f"{key} is {values[key]!r} but eval_dataset is not set; name the file to measure on.")
    if values.get("activation_offloading") is True and values.get("gradient_checkpointing", False) is False:
        found.append("activation_offloading is true but gradient_checkpointing is not, which it depends on; set both.")
    if values.get("packing") and task != "causal-lm":
        found.append(f"packing is true but task is {task!r}; only causal-lm rows can be packed.")
    if values.get("group_by_length") and task == "preference":
        found.append("group_by_length is true but task is 'preference', whose rows are two answers; leave it out.")
    return found


def _entries(value: Any) -> list[Any]:
    """What `dataset` names, one by one."""
    if isinstance(value, Mapping) and "path" not in value:
        return [{"path": path, "weight": weight} for path, weight in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _source(entry: Any) -> Source:
    """One entry of `dataset`, checked."""
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ValueError("must be a name, a list of names, or a mapping of names to weights")
    for key, value in entry.items():
        if key not in _SOURCE_KEYS:
            raise ValueError(f"has the unknown entry {key!r}; {nearest(key, _SOURCE_KEYS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "weight" and value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"has the weight {value!r}; a weight is a number above 0")
        if key in ("split", "name") and not isinstance(value, str | None):
            raise ValueError(f"has the {key} {value!r}, which must be text")
    return Source(**entry)


def _parse_overrides(overrides: Sequence[str], mistakes: list[str]) -> dict[str, Any]:
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            mistakes.append(f"--set {override!r} is not of the form key=value.")
            continue
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key.strip()] = value
    return values


def _resolve(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths among `values` absolute, taking `folder` as their start. Other types are left for validation."""
    resolved = dict(values)
    for key in PATH_KEYS:
        value = values.get(key)
        if key == "model_name_or_path" and isinstance(value, str) and is_hub_name(value, folder):
            continue
        if isinstance(value, str):
            resolved[key] = str((folder / Path(value).expanduser()).resolve())
    for key in DATA_KEYS:
        if values.get(key):
            resolved[key] = [_resolve_source(entry, folder) for entry in _entries(values[key])]
    return resolved


def _resolve_source(entry: Any, folder: Path) -> Any:
    if isinstance(entry, Mapping):
        return {**entry, "path": _resolve_source(entry.get("path"), folder)}
    if not isinstance(entry, str) or is_hub_dataset(entry, folder):
        return entry
    return str((folder / Path(entry).expanduser()).resolve())


def is_hub_name(name: str, folder: Path = Path()) -> bool:
    """Whether a model is named on the hub and not by a path: `owner/model`, with no such folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not (folder / name).exists()


def _one_for_each_key(errors: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """pydantic reports each member of a union; the first says enough."""
    first: dict[str, ErrorDetails] = {}
    for error in errors:
        first.setdefault(str(error["loc"][0]), error)
    return list(first.values())


def _sentence(error: ErrorDetails) -> str:
    """A pydantic error as one sentence that names the key, the value and the nearest valid choice."""
    key, kind, value = str(error["loc"][0]), error["type"], error["input"]
    if kind == "extra_forbidden":
        return _stop(f"unknown key {key!r}; {nearest(key, Recipe.model_fields)}")
    field = Recipe.model_fields[key]
    if kind == "missing":
        return f"the key {key!r} is missing ({field.description})."
    choices = _choices(field.annotation)
    if choices:
        names = ["null" if choice is None else str(choice) for choice in choices]
        listed = " or a list of names" if "tuple" in str(field.annotation) else ""
        return _stop(f"{key} is {value!r}, which is not offered; {nearest(str(value), names)}{listed}")
    if kind == "value_error":
        return _stop(f"{key} is {value!r}, which {error['msg'].removeprefix('Value error, ')}")
    return _stop(f"{key} is {value!r} and {error['msg'].removeprefix('Input ')}")


def _stop(sentence: str) -> str:
    return sentence if sentence.endswith("?") else sentence + "."


def _choices(annotation: Any) -> list[Any]:
    """The literal values that an annotation offers, through unions; empty where it is no choice."""
    if annotation is type(None):
        return [None]
    if annotation is bool:
        return ["true", "false"]
    members = get_args(annotation)
    if not any(isinstance(member, str | int) or get_args(member) or member is bool for member in members):
        return []
    found: list[Any] = []
    for member in members:
        found += [member] if isinstance(member, str | int) else _choices(member)
    return found
