"""What a run says while it runs: a progress bar on a terminal, a line for each log elsewhere, JSON lines on disk."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.train.memory import memory_now


class Metrics(TrainerCallback):
    """Writes one JSON object for each log and shows the progress.

    Args:
        path: the file of JSON lines.
        console: where to show.

    Attributes:
        seconds: of training, evaluations included, once it has ended.
        tokens: that were trained on or given, padding not counted.
        losses: every logged training loss.
        path: of the file.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self._console = path, console
        path.write_text("", encoding="utf-8")
        self._bar: Progress | None = None
        self._start = 0.0
        self._before = 0.0  # seconds of training in earlier processes,
        self._first = 0  # and their steps
        self.seconds = 0.0
        self.tokens = 0
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        """What a run that goes on in another process has to know."""
        return {"seconds": self.seconds, "tokens": self.tokens, "losses": list(self.losses)}

    def summary(self) -> dict[str, float | None]:
        """What is worth knowing of it afterwards."""
        return {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "final_loss": self.losses[-1] if self.losses else None,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._before = self.seconds = state["seconds"]
        self.tokens, self.losses = state["tokens"], list(state["losses"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and the bar on a terminal."""
        self._start = time.perf_counter() - self._before
        self._first = state.global_step
        if self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.seconds = time.perf_counter() - self._start
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the log down and show it."""
        logs: dict[str, Any] = kwargs["logs"]
        # The same number by two names: trl's, and transformers' own.
        self.tokens = int(logs.get("num_tokens", logs.get("num_input_tokens_seen", self.tokens)))
        entry = {"step": state.global_step, **logs}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            elapsed = time.perf_counter() - self._start
            entry |= {
                "seconds": round(elapsed, 3),
                "tokens_per_second": round(self.tokens / elapsed, 1),
                "memory_bytes": memory_now(),
            }
            shown = (
                f"loss {logs['loss']:.4f}  {entry['tokens_per_second']:,.0f} tokens/s  "
                f"{entry['memory_bytes'] / 1e9:.2f} GB"
            )
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], description=shown)
            else:
                done = state.global_step - self._first
                seconds = (elapsed - self._before) / max(done, 1) * (state.max_steps - state.global_step)
                left = timedelta(seconds=round(seconds))
                self._console.print(f"step {state.global_step}/{state.max_steps}  {shown}  {left} left")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Give the terminal back, whether training ended or failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
