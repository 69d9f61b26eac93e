"""A trainer whose run can be stopped at any step and gone on with, to the same bits on the CPU.

transformers' Trainer knows *when* to save and *where in the data* to go on; what it saves, it pickles. Here the same
hooks write and read `halfbyte.train.checkpoints`, and save what the library leaves out: the loss that was summed since
the last log, and what trl counts. Everything that a step depends on is in a checkpoint:

    weights that are trained, the optimizer's state, the learning rate's place, float16's loss scale,
    the generators (dropout), the place in the data (the order follows from seed and epoch), the log so far.

On a GPU the same holds as far as its kernels add in a fixed order, which not all do.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from halfbyte.errors import CheckpointError, NonFiniteError, RequestError, StoppedError
from halfbyte.train import ranks
from halfbyte.train.adapter import AdapterTraining
from halfbyte.train.checkpoints import new_checkpoint, read_checkpoint, remove_old
from halfbyte.train.state import Tensors, decode, encode, generators, set_generators

if TYPE_CHECKING:
    from halfbyte.train.checkpoints import Checkpoint
    from halfbyte.train.progress import Metrics
    from halfbyte.train.recipe import Recipe

TRAINER_STATE = "trainer_state.json"


class Resumable(AdapterTraining):
    """Checkpoints instead of transformers' own.

    Attributes:
        facts: goes into every checkpoint and comes back with it: `files` and `data`, which must be the same, and
            whatever else the run wants to know when it goes on.
    """

    facts: dict[str, Any]
    _metrics_log: Metrics
    _found: dict[str, Any] | None = None

    def keep(self, metrics: Metrics, facts: dict[str, Any]) -> None:
        """Say what checkpoints hold beside the training, and from now on write them."""
        self._metrics_log, self.facts = metrics, facts
        if self.recipe.save_steps is not None:
            self.args.save_strategy, self.args.save_steps = SaveStrategy.STEPS, self.recipe.save_steps
        self.add_callback(_RestoreCounts(self))

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end from a checkpoint, or from the beginning.

        Raises:
            StoppedError: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        stop, patience = StopOnSignal(), self.recipe.early_stopping_patience
        if ranks.index():  # other dropout than the first process has on its rows
            set_seed(self.recipe.seed + ranks.index())
        self.add_callback(FollowBest(self.recipe))
        self.add_callback(stop)
        try:
            with stop:
                if checkpoint is None:
                    self.train()
                elif not is_over(state := _trainer_state(checkpoint.folder), patience):
                    self.train(str(checkpoint.folder))
                else:  # stopped between its last step and its end; the library would take one step more
                    self._load_from_checkpoint(str(checkpoint.folder))
                    self.state = state
        finally:
            self._metrics_log.close()
        stop.check(self.state.global_step, self.state.max_steps)
        if self.recipe.load_best_model_at_end and (losses := eval_losses(self.state)):
            best = Path(str(self.args.output_dir)) / f"checkpoint-{min(losses, key=losses.__getitem__)}"
            self._load_weights(read_checkpoint(best).folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.store_flos()
        processes = ranks.gathered({"generators": generators(), "counts": self._counts()})
        ranks.from_first(lambda: self._write_checkpoint(processes))

    def _write_checkpoint(self, processes: list[dict[str, Any]]) -> None:
        step, run = self.state.global_step, Path(str(self.args.output_dir))
        whole, optimizer, scheduler, scaler = self._parts()
        trained = trained_tensors(whole)
        for name, tensor in trained.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"after step {step} the weight {name} is not finite; no checkpoint of it was made."
                )
        everything = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "processes": processes,
            "adapter_errors": self.storage.errors if self.storage is not None else {},
            "metrics": self._metrics_log.state(),
            "facts": self.facts,
        }
        plain, tensors = encode(everything)
        with new_checkpoint(run, step, self.recipe, eval_losses(self.state).get(step)) as folder:
            save_file({n: t.detach().contiguous() for n, t in trained.items()}, folder / _weights(whole))
            if hasattr(whole, "peft_config"):
                config = copy.deepcopy(whole.peft_config["default"])
                config.inference_mode = True
                config.save_pretrained(folder)
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")
            self.state.save_to_json(str(folder / TRAINER_STATE))
            shutil.copyfile(self._metrics_log.path, folder / "metrics.jsonl")
        remove_old(run, self.recipe.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The weights, and all else into `_found`, from where the later hooks take it."""
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        found = decode(plain, tensors)
        if (then := len(found["processes"])) != (now := ranks.count()):
            raise RequestError(
                f"the run in {folder.parent} was begun in {then} processes, and now there are {now}; start as many, "
                "or remove that folder to begin again."
            )
        self._found = found = {**found, **found["processes"][ranks.index()]}
        check_same_data(found["facts"], self.facts, folder.parent)
        self.facts = found["facts"]
        shutil.copyfile(folder / "metrics.jsonl", self._metrics_log.path)
        self._metrics_log.set_state(found["metrics"])

    def _load_weights(self, folder: Path) -> None:
        trained, saved = trained_tensors(self.model), load_file(folder / _weights(self.model))
        for name in trained.keys() | saved.keys():
            if name not in trained or name not in saved or trained[name].shape != saved[name].shape:
                raise CheckpointError(
                    f"{folder} does not fit the model: {name} is in one of them, or of another shape."
                )
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._found is not None:
            _, optimizer, scheduler, _ = self._parts()
            optimizer.load_state_dict(self._found["optimizer"])
            scheduler.load_state_dict(self._found["scheduler"])
            if self.storage is not None:
                self.storage.errors = {n: e.to(self.args.device) for n, e in self._found["adapter_errors"].items()}

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._found is not None and self._found["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self._found["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._found is not None:
            set_generators(self._found["generators"])

    def _parts(self) -> tuple[Any, ...]:
        """The model, the optimizer, the scheduler and the loss scaler, which transformers types as optional."""
        return self.model, self.optimizer, self.lr_scheduler, self.accelerator.scaler

    def _counts(self) -> dict[str, Any]:
        """Of the loop, by attribute: what it has added up since the last log, and what trl's trainers count."""
        names = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
        counts = {name: getattr(self, name) for name in names if hasattr(self, name)}
        averages = getattr(self, "_metrics", {})  # trl's, {"train": {name: values}, "eval": ...}
        return {"attributes": counts, "averages": {mode: dict(values) for mode, values in averages.items()}}

    def restore_counts(self) -> None:
        """Into the loop, which has just set them to zero."""
        if self._found is None:
            return
        counts, averages = self._found["counts"], getattr(self, "_metrics", {})
        for name, value in counts["attributes"].items():
            setattr(self, name, value.to(self.args.device) if isinstance(value, torch.Tensor) else value)
        for mode, values in counts["averages"].items():
            averages[mode].update(values)
        self._found = {"generators": self._found["generators"]}  # asked for at the first batch; the rest is done


class _RestoreCounts(TrainerCallback):
    """The one moment between the loop's zeros and its first step."""

    def __init__(self, trainer: Resumable) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_counts()


def trained_tensors(model: Any) -> Tensors:
    """What is trained, by the names under which it is saved; the tensors are the model's own, not copies.

    Of an adapter they are peft's names, so that peft can load a checkpoint.

    Raises:
        NotImplementedError: something is trained that peft would not save.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "peft_config"):
        return {name: parameter.data for name, parameter in parameters.items()}
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    places = {tensor.data_ptr() for tensor in saved.values()}
    for name, parameter in parameters.items():
        if parameter.data_ptr() not in places:
            raise NotImplementedError(f"{name} is trained, and peft does not save it")
    return saved


def check_same_data(then: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """Refuse to go on with other data than a run was begun with.

    Args:
        then: the facts of a checkpoint: `files`, hashes of the data files' contents by name, and `data`, the report on
            the rows that were made of them.
        now: those of this process.
        run: the folder that the checkpoint lies in.

    Raises:
        RequestError: a file has other content, is new or is missing; or equal files have become other rows.
    """
    way_on = f"when the run in {run} was begun; put it back, or remove that folder to begin again."
    for name in {**then["files"], **now["files"]}:
        if then["files"].get(name) != now["files"].get(name):
            raise RequestError(f"{name} is not what it was {way_on}")
    if then["data"] != now["data"]:
        raise RequestError(f"the tokenizer, or how it is used, is not what it was {way_on}")


def _trainer_state(folder: Path) -> TrainerState:
    return TrainerState.load_from_json(str(folder / TRAINER_STATE))


def _weights(model: Any) -> str:
    return "adapter_model.safetensors" if hasattr(model, "peft_config") else "model.safetensors"


def eval_losses(state: TrainerState) -> dict[int, float]:
    """The loss on the evaluation set, by the step it was measured at."""
    return {int(log["step"]): log["eval_loss"] for log in state.log_history if "eval_loss" in log}


def is_over(state: TrainerState, patience: int | None) -> bool:
    """Whether a run has taken its last step: all of them, or the best loss is `patience` measurements old."""
    losses = list(eval_losses(state).values())
    waited = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return state.global_step >= state.max_steps or (patience is not None and waited >= patience)


class FollowBest(TrainerCallback):
    """Saves where the evaluation loss is the lowest so far, and stops when it has not been for long enough.

    It remembers nothing: the losses stand in the trainer's log, which a checkpoint holds.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the loss was logged."""
        losses = eval_losses(state)
        if self._recipe.load_best_model_at_end and state.global_step == min(losses, key=losses.__getitem__):
            control.should_save = True
        if is_over(state, self._recipe.early_stopping_patience):
            control.should_training_stop = True
            control.should_save |= self._recipe.save_steps is not None


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, write a checkpoint, end. A second one ends the process at once.

    Signals are caught inside a `with` block, and on the main thread, where Python delivers them.

    One that comes after the last step is too late to stop anything: the run ends on its own.

    Attributes:
        received: the signal; None while there was none.
        stopped: whether the run was ended for it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number)
        self.__exit__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the loop to save and to end, in all processes after the same step."""
        if number := max(ranks.gathered(int(self.received or 0))):
            self.received = signal.Signals(number)
            self.stopped = control.should_save = control.should_training_stop = True

    def check(self, step: int, steps: int) -> None:
        """After training.

        Raises:
            StoppedError: a signal has ended it.
        """
        if self.stopped and self.received is not None:
            raise StoppedError(
                f"stopped by {self.received.name} after step {step} of {steps}; the same command with --resume goes on",
                128 + self.received,
            )
