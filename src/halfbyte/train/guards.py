"""What every trainer here has over the library's: no silent wrongness, whatever is learnt.

The training loop and the optimizer step are transformers'. Four things are added, once for all tasks.

* **Data arrives tokenized.** Labels say what counts (`halfbyte.data`), batches are padded by length.
* **A number that is not finite stops the run** and is traced: the batch is run again with a look at every module's
  output, and the first that is not finite is named. Averaging on over a NaN is how runs are lost unnoticed.
* **Evaluation sums over what is predicted.** The loss of a data set is the mean over its trained tokens (or its rows),
  not over its batches, so it does not depend on the batch size, and logits are never gathered.
* **float16 works on the CPU too.** accelerate scales the loss on GPUs only; see `create_accelerator_and_postprocess`.

**Precision.** Adapters, modules that are trained whole and, for full fine-tuning, the weights are float32 masters
whatever the compute dtype: an update of 1e-5 of a weight is below bfloat16's resolution of 2^-8 and would be rounded
away. The products run in the compute dtype under autocast, on the CPU as on CUDA; casting the masters for good would
lose updates, casting the activations up to float32 (peft's way without autocast) would double their memory.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from halfbyte.errors import NonFiniteError
from halfbyte.nn.parts import set_attention
from halfbyte.train import ranks
from halfbyte.train.offload import Offload
from halfbyte.train.optimizers import make_optimizer
from halfbyte.train.resume import Resumable
from halfbyte.train.sampling import ByLength
from halfbyte.train.state import generators, set_generators

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.train.recipe import Recipe


class Guards(Resumable):
    """Stands in front of a library's trainer in the list of base classes."""

    recipe: Recipe  # set by the trainer
    _not_finite: NonFiniteError | None = None  # found in this step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["args"].n_gpu > 1:  # the library would copy the model to all of them before each step
            kwargs["args"]._n_gpu = 1
        super().__init__(*args, **kwargs)
        if ranks.count() > 1:
            _share_trained_only(self.model)
        for library_callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(library_callback)
        whole: Any = self.model
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        set_attention(base, self.args.device, packed=self.recipe.packing)
        if self.recipe.activation_offloading:
            self.add_callback(_OffloadCheckpoints())

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """The forward pass that `compute_loss` does on a batch, to look at it once more."""
        raise NotImplementedError

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """What `evaluate` adds up over batches: `loss` and the like, and the `count` that they are divided by."""
        raise NotImplementedError

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """The metrics of a data set from its sums."""
        return {name: total / totals["count"] for name, total in totals.items() if name != "count"}

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' accelerator; with float16 on a CPU, given what accelerate gives it on a GPU only.

        float16 has 5 bits of exponent, and small gradients would be zero: the loss is multiplied by a large number
        before the backward pass, and the gradients are divided by it after. A step whose gradients overflow is left
        out, and the number halved.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.accelerator.device.type == "cpu":
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's."""
        chosen: Any = self.model if model is None else model
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.recipe, chosen, self.get_decay_parameter_names(chosen))
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.recipe.group_by_length:
            return super()._get_train_sampler(rows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.count()
        return ByLength(batch, [len(ids) for ids in rows["input_ids"]], self.recipe.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The library's loss, looked at: `_clip_grad_norm`, which is there for the whole step, refuses it."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self._not_finite is None and not torch.isfinite(loss).all():
            found = f"the loss at step {self.state.global_step + 1} is {loss.item()}; {self._first_not_finite(inputs)}."
            self._not_finite = NonFiniteError(found)
        return result

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        ranks.check(self._not_finite)
        norm = super()._clip_grad_norm(model)
        # With float16 the loss scaler answers an overflow by skipping the step; it is no defect until the loss is no
        # longer scaled up at all.
        scaler = self.accelerator.scaler
        if (scaler is None or scaler.get_scale() < 1) and not math.isfinite(float(norm)):
            whole: Any = self.model  # not `model`, which may be wrapped for several processes
            for name, parameter in whole.named_parameters():
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                    raise NonFiniteError(f"step {self.state.global_step + 1}: the gradient of {name} is not finite.")
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the evaluation rows, by the task: `eval_loss` in nats, and what goes with it.

        Measuring does not change the training: a data loader draws a seed, and dropout would go on from another one.
        """
        model: Any = self.model
        was_training, states = model.training, generators()
        model.eval()
        totals: Counter[str] = Counter()
        with torch.no_grad(), self.accelerator.autocast():
            for batch in self._share_of_batches(self.eval_dataset if eval_dataset is None else eval_dataset):
                totals.update(self.sums(model, self._prepare_inputs(batch)))
        model.train(was_training)
        set_generators(states)
        totals = functools.reduce(_added, ranks.gathered(totals))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.means(totals).items()}
        self.log(dict(metrics))  # the library adds to what it logs
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _share_of_batches(self, rows: Any) -> DataLoader[Any]:
        """Of the rows to measure on, this process's: each row once, where accelerate's would fill up the last batch."""
        share = rows.shard(ranks.count(), ranks.index(), contiguous=True)
        return DataLoader(share, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def _first_not_finite(self, inputs: dict[str, Any]) -> str:
        """Where it began: a weight, else the first module output of this batch, in order of computation."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.requires_grad and not torch.isfinite(parameter).all():
                return f"the first tensor that is not finite is the weight {name}"
        with torch.no_grad(), _watch_outputs(model) as found:
            self.forward_again(model, inputs)
        return f"the first tensor that is not finite is the output of {found[0]}" if found else "every output is finite"


class _OffloadCheckpoints(TrainerCallback):
    """Moves checkpoints to the host, from when the library has turned gradient checkpointing on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        Offload().attach(model)


def _added(totals: Counter[str], more: Counter[str]) -> Counter[str]:
    """The sum; Counter's own leaves out what is not above zero."""
    totals.update(more)
    return totals


def _share_trained_only(model: Any) -> None:
    """Leave what is frozen out of what DistributedDataParallel sends around: it was read from the same files."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]


@contextmanager
def routers_as_configured(model: Any) -> Iterator[None]:
    """Have trl make a trainer that adds a loss of routers only where the model's config asks for it.

    That is `output_router_logits`, as in transformers. trl would add it for every mixture of experts, frozen routers
    included, and would write it into the config, which full fine-tuning saves.
    """
    config = model.config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef")
    kept = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if not kept.get("output_router_logits", True) and "router_aux_loss_coef" in kept:
        config.router_aux_loss_coef = 0.0
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


@contextmanager
def float32_masters(model: torch.nn.Module) -> Iterator[None]:
    """Undo what trl's trainers do when they are made: they round the masters of a model that calls itself 4-bit."""
    masters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in masters and parameter.dtype != masters[name].dtype:
            parameter.data = masters[name].to(parameter.device)


@contextmanager
def _watch_outputs(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order in which they finish."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are padded with; it is masked and carries no label, so the end token will do."""
    return int(tokenizer.eos_token_id or 0) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def options(recipe: Recipe, folder: Path, rows: int) -> dict[str, Any]:
    """The recipe in the words of transformers' TrainingArguments."""
    batches = math.ceil(rows / (recipe.per_device_train_batch_size * ranks.count()))
    steps = recipe.max_steps or math.ceil(
        math.ceil(batches / recipe.gradient_accumulation_steps) * recipe.num_train_epochs
    )
    return {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": math.ceil(steps * recipe.warmup_ratio),
        "num_train_epochs": recipe.num_train_epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.per_device_train_batch_size,
        "per_device_eval_batch_size": recipe.per_device_eval_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch",  # replaced by `Guards.create_optimizer`
        "bf16": recipe.compute_dtype == "bfloat16",
        "fp16": recipe.compute_dtype == "float16",
        "ddp_broadcast_buffers": False,  # nothing writes to them
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": recipe.logging_steps,
        "logging_nan_inf_filter": False,  # it would replace a NaN by the last good loss in the log
        "eval_strategy": "steps" if recipe.eval_steps else "no",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "no",  # until `Resumable.keep` has said of what
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "run_name": Path(recipe.output_dir).name,
        "report_to": [],  # `halfbyte.train.watching` brings the tracker
        "disable_tqdm": True,
    }
