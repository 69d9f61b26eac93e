"""Supervised fine-tuning: a recipe in, a run directory out. What a task has of its own is in `tasks.py`.

The order is that of cost. What can be wrong with a request (paths, columns, module names, ranks, the place to write) is
checked before a weight is read; the weights are read before anything is trained; and the run directory appears when
everything in it is complete. Until then its log and its checkpoints lie beside it, see `halfbyte.train.unfinished`.

    recipe.yaml            resolved, every key written out: `halfbyte train` of it repeats the run
    metrics.jsonl          one JSON object for each log
    loss.png               the same as a curve, where matplotlib is installed
    samples.jsonl          what the model said to a few prompts before and after
    tensorboard/           for `report_to: tensorboard`
    adapter_config.json    the adapter in peft's own format, with the base it belongs to;
    adapter_model.safetensors                                   or the whole model, for `method: full`
    base.json              which base that is, by a hash
    config.json            of a classifier: the names of its classes, and the pad token it was trained with
    tokenizer files        with the chat template that the model was trained on
    summary.json           what it cost and what came out
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from halfbyte import env
from halfbyte.device import this_machine
from halfbyte.errors import RequestError
from halfbyte.tensor import QuantizedTensor
from halfbyte.train import ranks
from halfbyte.train.memory import PeakMemory
from halfbyte.train.new_tokens import Pieces, add_rows, show_bias, tokenizer_of, trained_rows
from halfbyte.train.offload import check_offloading
from halfbyte.train.optimizers import check_optimizer
from halfbyte.train.pitfalls import Setting, find_pitfalls
from halfbyte.train.progress import Metrics
from halfbyte.train.recipe import Recipe, is_hub_name
from halfbyte.train.targets import Outline, Targets, check_targets, outline, trainable_report
from halfbyte.train.tasks import TASKS, Task
from halfbyte.train.unfinished import Unfinished, finished_summary, unfinished_run
from halfbyte.train.watching import PLOT, SAMPLES, Sampler, Samples, Tracker, check_tracker, plot_losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.data import Tokenized

USUAL_LENGTH = 1024  # tokens of a row where the recipe does not say and the model allows it
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")

# Measures a model on examples: the name of the metric and its value, "exact_match" -> 0.91. It comes from the caller,
# since evaluation stands above training in the layer order.
Evaluator = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", Collection[Any]], dict[str, float]]


@dataclass(frozen=True)
class DataInputs:
    """What the rows of a run are made of."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pieces: Pieces  # of the new tokens


@dataclass(frozen=True)
class Inputs(DataInputs):
    """What was asked for, read and checked."""

    targets: Targets | None  # of an adapter
    config: PretrainedConfig
    outline: Outline

    def rows(self) -> tuple[Tokenized, Tokenized | None]:
        """What is trained on, and what is measured on."""
        task, options = self.task, (self.tokenizer, self.max_length)
        measured_on = task.tokenize(task.eval_examples, *options) if task.eval_examples else None
        return task.tokenize(task.examples, *options), measured_on


@dataclass(frozen=True)
class Measures:
    """What is done with a model before and after; see `train`."""

    evaluator: Evaluator | None
    sampler: Sampler | None

    def of(self, trainer: Any, inputs: Inputs) -> dict[str, float] | None:
        """The metrics of a trainer's model; None where there is nothing to measure on."""
        examples = inputs.task.eval_examples
        if not examples:
            return None
        if self.evaluator is None:
            return dict(trainer.evaluate())
        with trainer.accelerator.autocast():  # as in training: masters are float32, the base is in the compute dtype
            return self.evaluator(trainer.model, inputs.tokenizer, examples)

    def answers(self, trainer: Any, inputs: Inputs, asked: Samples) -> list[str]:
        """What it says to the prompts."""
        if self.sampler is None or not asked.prompts:
            return []
        with trainer.accelerator.autocast():
            return self.sampler(trainer.model, inputs.tokenizer, asked.prompts)


def train(
    recipe: Recipe,
    *,
    evaluator: Evaluator | None = None,
    sampler: Sampler | None = None,
    console: Console | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train as the recipe says.

    Args:
        recipe: what to do.
        evaluator: measures the model on `eval_dataset` before and after; None measures the loss.
        sampler: answers a few prompts before and after; None: nobody does.
        console: where progress is shown; None is stderr.
        resume: go on from the newest checkpoint of an unfinished run of this recipe, if there is one.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        RequestError: the request is wrong; nothing was written.
        NonFiniteError: a loss or a gradient is not finite; the message names the first tensor.
        StoppedError: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    from halfbyte.models import check_output_folder

    if recipe.is_local:
        env.go_offline()
    env.quiet_libraries()
    with ranks.joined(), ExitStack() as stack:
        console = console or Console(stderr=True, quiet=not ranks.is_first())
        tell = console.print
        if resume and (finished := ranks.from_first(lambda: finished_summary(recipe))) is not None:
            tell(f"{recipe.output_dir} is finished already")
            return finished
        ranks.from_first(lambda: check_output_folder(recipe.output_dir))
        inputs = ranks.together(lambda: check_request(recipe))
        run = ranks.from_first(lambda: stack.enter_context(unfinished_run(recipe, resume=resume, tell=tell)))
        return _train_in(run, recipe, inputs, Measures(evaluator, sampler), console)


def check_request(recipe: Recipe) -> Inputs:
    """Read the data, the tokenizer and the model's config, and check module names and ranks. No weight is read.

    Raises:
        RequestError: the first thing that is wrong.
    """
    from halfbyte.models import check_model_folder, load_config

    check_optimizer(recipe)
    check_offloading(recipe)
    check_tracker(recipe)
    if recipe.adapter_dtype != "float32" and ranks.count() > 1:
        raise RequestError(
            f"adapter_dtype is {recipe.adapter_dtype!r}, and each of {ranks.count()} processes would round by its own "
            "chance; choose 'float32', or train in one process."
        )
    task = TASKS[recipe.task](recipe)
    if not is_hub_name(recipe.model_name_or_path):
        check_model_folder(recipe.model_name_or_path)
    config = load_config(recipe.model_name_or_path)
    tokenizer, pieces = tokenizer_of(recipe)
    max_length = _max_length(recipe, config, tokenizer)
    if recipe.init_lora_weights == "loftq" and getattr(config, "quantization_config", None):
        raise RequestError(
            f"init_lora_weights is 'loftq', which starts from the weights before quantization, but those of "
            f"{recipe.model_name_or_path} are quantized already; name the model that it was made from."
        )
    model = outline(config, task.model_task)
    targets = None if recipe.method == "full" else check_targets(recipe, model)
    return Inputs(task, tokenizer, max_length, pieces, targets, config, model)


def check_data(recipe: Recipe) -> DataInputs:
    """Read the data, the tokenizer and the model's config. The model folder needs no weights.

    Raises:
        RequestError: the first thing that is wrong.
    """
    from halfbyte.models import load_config

    task = TASKS[recipe.task](recipe)
    config = load_config(recipe.model_name_or_path)
    tokenizer, pieces = tokenizer_of(recipe)
    return DataInputs(task, tokenizer, _max_length(recipe, config, tokenizer), pieces)


def _max_length(recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The recipe's, checked, or what fits."""
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if TASKS[recipe.task].classifies:  # RoBERTa has 514 positions for 512 tokens; its tokenizer knows
        limit = min(limit, tokenizer.model_max_length)
    if recipe.max_length is None:
        return min(limit, USUAL_LENGTH)
    if recipe.max_length > limit:
        raise RequestError(
            f"max_length {recipe.max_length} is above what the model was made for; choose at most {limit}."
        )
    return recipe.max_length


def _train_in(run: Unfinished, recipe: Recipe, inputs: Inputs, measures: Measures, console: Console) -> dict[str, Any]:
    from transformers import set_seed

    memory = PeakMemory()
    set_seed(recipe.seed)  # adapters and heads start from random numbers
    task, tokenizer = inputs.task, inputs.tokenizer
    rows, eval_rows = ranks.together(inputs.rows)
    console.print(f"data: {rows.report}")
    warnings = _warn(recipe, inputs, rows.report.longest, console)
    head = inputs.outline.head
    base = load_base(recipe, head=head, num_labels=len(task.labels) or None)
    model = _adapted(base, recipe, inputs, console)
    metrics = Metrics(run.folder / "metrics.jsonl" if ranks.is_first() else Path(os.devnull), console)
    tracker = Tracker(recipe, run.folder)
    trainer = task.trainer()(
        model,
        recipe,
        rows=rows.dataset,
        eval_rows=eval_rows.dataset if eval_rows else None,
        tokenizer=tokenizer,
        folder=run.folder,
        callbacks=[metrics, *(tracker.callbacks if ranks.is_first() else ())],
    )
    asked = Samples(task.eval_examples or task.examples, recipe.samples, tokenizer, inputs.max_length)
    data = rows.report.as_dict()
    facts: dict[str, Any] = {"files": task.data_digests, "data": data}
    if run.checkpoint is None:
        facts |= {"before": measures.of(trainer, inputs), "answers": measures.answers(trainer, inputs, asked)}
    trainer.keep(metrics, facts)
    trainer.train_from(run.checkpoint)
    after, answered = measures.of(trainer, inputs), measures.answers(trainer, inputs, asked)
    summary = {
        "recipe": recipe.digest,
        **task.facts(tokenizer),
        "data": data,
        **_cost_of(base),
        **trainable_report(model),
        **(inputs.targets.summary() if inputs.targets else {}),
        "trained_whole": [*recipe.modules_to_save, *head],
        "warnings": warnings,
        "processes": ranks.count(),
        "steps": trainer.state.global_step,
        **metrics.summary(),
        "peak_memory_bytes": memory.host(),
        "peak_gpu_memory_bytes": memory.device(),
        "before": trainer.facts["before"],
        "after": after,
        "versions": _versions(),
    }

    def finish() -> None:
        with run.finish(Path(recipe.output_dir).absolute()) as folder:
            _write(folder, recipe, model, tokenizer, summary)
            shutil.copyfile(metrics.path, folder / metrics.path.name)
            asked.write(folder / SAMPLES, trainer.facts["answers"], answered)
            plot_losses(metrics.path, folder / PLOT)
            tracker.finish(folder)

    ranks.from_first(finish)
    return summary


def _warn(recipe: Recipe, inputs: Inputs, longest: int, console: Console) -> list[str]:
    """Print the pitfalls of a run."""
    length = inputs.max_length if recipe.packing else min(longest, inputs.max_length)
    if recipe.task == "preference":  # both answers go through the model at once
        length *= 2
    setting = Setting(recipe, inputs.config, inputs.outline, inputs.targets, length, this_machine())
    found = find_pitfalls(setting)
    for warning in found:
        console.print(f"warning: {warning}")
    return found


def load_base(recipe: Recipe, *, head: Sequence[str] = (), num_labels: int | None = None) -> PreTrainedModel:
    """The model that a recipe starts from.

    qlora: quantized, the rest in the compute dtype. lora: the compute dtype. full: float32 masters, whatever the
    compute dtype (see `halfbyte.train.guards`).

    Args:
        recipe: names the model and how it is stored.
        head: modules of a classifier that are trained whole.
        num_labels: classes of a classifier.
    """
    from halfbyte.models import HalfbyteConfig, load_model

    path, compute = recipe.model_name_or_path, getattr(torch, recipe.compute_dtype)
    task = TASKS[recipe.task].model_task
    if recipe.method != "qlora":
        dtype = torch.float32 if recipe.method == "full" else compute
        return load_model(path, dtype=dtype, task=task, num_labels=num_labels)
    quantization = HalfbyteConfig(
        format=recipe.format,
        block_size=recipe.block_size,
        scale_bits=recipe.scale_bits,
        compute_dtype=compute,
        skip_modules=[*recipe.modules_to_save, *head] or None,  # what is trained whole cannot be packed
    )
    return load_model(path, quantization=quantization, dtype=compute, task=task, num_labels=num_labels)


def add_adapter(
    base: PreTrainedModel,
    recipe: Recipe,
    targets: str | list[str],
    head: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
    *,
    parameters: Sequence[str] = (),
) -> Any:
    """The base with the recipe's adapter, or the base itself for `method: full`. What is trained is float32.

    Args:
        base: as `load_base` gives it.
        recipe: says which adapter.
        targets: modules that get one.
        head: modules of a classifier that are trained whole.
        new_tokens: tokens whose rows of the embeddings are trained.
        parameters: that get one and are no module's weight: experts.

    Raises:
        RequestError: the model folder holds something in 4 bits that is to be trained whole.
    """
    whole = [*recipe.modules_to_save, *head]
    for name, parameter in base.named_parameters():
        chosen = recipe.method == "full" or any(f".{module}." in f".{name}." for module in whole)
        if chosen and isinstance(parameter, QuantizedTensor):
            raise RequestError(
                f"{recipe.model_name_or_path} holds {name} in {parameter.spec.format}, which cannot be trained whole; "
                "start from the unquantized model."
            )
    if recipe.method == "full":
        return base
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    config = LoraConfig(
        task_type=TASKS[recipe.task].peft_type,
        base_model_name_or_path=recipe.model_name_or_path,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # peft's annotation says int; it only divides
        lora_dropout=recipe.lora_dropout,
        bias=recipe.lora_bias,
        target_modules=targets,
        target_parameters=list(parameters) or None,
        # peft's "all-linear" leaves a head out where the task is SEQ_CLS, and not where it is TOKEN_CLS
        exclude_modules=list(head) if recipe.task == "token-classification" else None,
        modules_to_save=[name for name in whole if name not in SEQ_CLS_HEAD_NAMES] or None,  # peft adds those
        trainable_token_indices=trained_rows(base, new_tokens) if new_tokens else None,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init_lora_weights=True if recipe.init_lora_weights == "loftq" else recipe.init_lora_weights,
    )
    model = get_peft_model(base, config)
    show_bias(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft leaves modules_to_save in the base's dtype
            parameter.data = parameter.data.float()
    return model


def _adapted(base: PreTrainedModel, recipe: Recipe, inputs: Inputs, console: Console) -> Any:
    """The base with what only the data knows, with rows for new tokens, and with the recipe's adapter."""
    inputs.task.settle(base, inputs.tokenizer)
    if inputs.pieces:
        add_rows(base, inputs.pieces)
    report: Any = base.halfbyte_report
    console.print(f"base: {report}")
    targets = inputs.targets
    if targets is None:
        return add_adapter(base, recipe, [])
    model = add_adapter(
        base, recipe, targets.modules, inputs.outline.head, list(inputs.pieces), parameters=targets.parameters
    )
    console.print(f"adapter: {trainable_report(model)['trained_parameters']:,} parameters are trained, {targets}")
    if recipe.init_lora_weights == "loftq":
        from halfbyte.models import init_loftq

        share = init_loftq(model, recipe.model_name_or_path)
        console.print(f"adapter: starts with {share:.1%} of the squared quantization error, by LoftQ")
    return model


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _cost_of(base: PreTrainedModel) -> dict[str, Any]:
    """What the base takes, counted by its report from the bytes of its tensors."""
    report: Any = base.halfbyte_report
    return {
        "total_parameters": report.total,
        "quantized_share": report.share,
        "bits_per_quantized_parameter": report.bits_per_weight,
        "bits_per_parameter": 8 * report.nbytes / report.total,
        "base_bytes": report.nbytes,
    }


def _write(
    folder: Path, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, summary: dict[str, Any]
) -> None:
    from halfbyte.models import resolve, write_base

    # peft's "auto" asks the hub whether the vocabulary has changed, and offline the run is lost at its end (peft#1452)
    options: dict[str, Any] = {} if recipe.method == "full" else {"save_embedding_layers": False}
    model.save_pretrained(folder, **options)
    if recipe.method != "full":
        write_base(folder, recipe.model_name_or_path, resolve(recipe.model_name_or_path))
    if recipe.method != "full" and TASKS[recipe.task].classifies:
        _write_config(folder, model)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card: a form with nothing filled in
    tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, model: Any) -> None:
    """The config of an adapter's base, as it was trained but unquantized: `num_labels` and the names of the classes."""
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)
