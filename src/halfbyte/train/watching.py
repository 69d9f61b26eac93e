"""What a person looks at while a model learns and afterwards: trackers by key, a plot of the loss, answers compared."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data import Example, Message, Preference, Renderer
from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.train.recipe import Recipe

PLOT, SAMPLES, TENSORBOARD = "loss.png", "samples.jsonl", "tensorboard"
LOOKED_AT = 100  # examples, for prompts to ask
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # of `report_to`: the package that each needs
# Answers prompts, the same ones each time it is asked with the same model. It comes from the caller, since generation
# stands beside training in the layer order.
Sampler = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", Sequence[Sequence[Message]]], list[str]]


def check_tracker(recipe: Recipe) -> None:
    """What `report_to` needs is installed.

    Raises:
        RequestError: it is not.
    """
    package = TRACKERS.get(recipe.report_to)
    if package is not None and importlib.util.find_spec(package) is None:
        raise RequestError(f"report_to is {recipe.report_to!r}, which needs {package}; run `pip install {package}`.")


class Tracker:
    """The recipe's tracker, by transformers' own integration.

    Args:
        recipe: names it; what a run is called there is the name of its folder.
        folder: of the unfinished run, where TensorBoard's events lie until it is done.

    Attributes:
        callbacks: for the trainer.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from transformers.integrations import TensorBoardCallback, WandbCallback

        self._events = folder / TENSORBOARD
        self.callbacks: list[Any] = []
        if recipe.report_to == "tensorboard":
            self.callbacks = [TensorBoardCallback()]
            self.callbacks[0].logging_dir = str(self._events)  # its own would bear this machine's name
        elif recipe.report_to == "wandb":
            self.callbacks = [WandbCallback()]

    def finish(self, folder: Path) -> None:
        """Put what belongs to the run into its directory."""
        if self._events.is_dir():
            for callback in self.callbacks:
                if callback.tb_writer is not None:
                    callback.tb_writer.close()
            shutil.copytree(self._events, folder / TENSORBOARD)


class Samples:
    """A few prompts, and what the model says to them before and after.

    Args:
        examples: the first ones that are conversations are asked.
        count: how many.
        tokenizer: to leave out prompts without room for an answer.
        max_length: tokens that there are.
    """

    def __init__(
        self, examples: Collection[Any], count: int, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self._asked: list[tuple[Message, ...]] = []
        for example in islice(examples, LOOKED_AT if count else 0):
            turns = _conversation(example)
            if turns is not None and len(Renderer(tokenizer).ids(turns[:-1], prompt=True)) < max_length:
                self._asked.append(turns)
            if len(self._asked) == count:
                break

    @property
    def prompts(self) -> list[Sequence[Message]]:
        """Conversations that end with the turn to answer."""
        return [turns[:-1] for turns in self._asked]

    def write(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        """One JSON object for each prompt; nothing where one of the two was not asked."""
        if not before or not after:
            return
        rows = [
            {"prompt": list(turns[:-1]), "expected": turns[-1]["content"], "before": first, "after": last}
            for turns, first, last in zip(self._asked, before, after, strict=True)
        ]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _conversation(example: Any) -> tuple[Message, ...] | None:
    """A prompt and the answer that is wanted; None where an example has neither."""
    if isinstance(example, Preference):
        return (*example.prompt, *example.chosen[:1])
    if isinstance(example, Example) and len(example.messages) > 1 and example.messages[-1]["role"] == "assistant":
        return example.messages
    return None


def plot_losses(metrics: Path, path: Path) -> bool:
    """Draw the losses of a metrics.jsonl.

    Returns:
        Whether it was done: matplotlib is an extra, and there has to be a loss.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    logs = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    curves = {
        name: [(log["step"], log[key]) for log in logs if key in log]
        for name, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    if not any(curves.values()):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")  # no pyplot: it keeps figures, and looks for a display
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else "", label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True
