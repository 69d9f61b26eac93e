"""Checkpoints of an unfinished run on disk: whole or not there, checksummed, and never unreadable for good.

    checkpoint-20/
      adapter_model.safetensors    what is trained; with adapter_config.json beside it, a folder that peft loads.
      adapter_config.json                   (`method: full`: model.safetensors)
      state.safetensors            tensors of the optimizer, the generators, the loss scaler
      state.json                   the rest of them; see `halfbyte.train.state`
      trainer_state.json           where the run stands, as transformers writes it
      metrics.jsonl                what had been logged by then
      recipe.yaml                  what is run
      checkpoint.json              step, recipe, and size and SHA-256 of each other file

A checkpoint is written under a name that is not looked for, every file and the folder are synced, and then it is
renamed: a kill at any moment leaves it whole or leaves it out. Older ones are removed after that. Disks also lose bytes
on their own: a checkpoint whose checksums do not agree is skipped with a sentence, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe

MANIFEST = "checkpoint.json"
VERSION = 3  # of the layout above, and of what state.json holds
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and found whole.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        recipe: digest of the recipe that it belongs to.
        eval_loss: measured at this step; None where nothing was.
    """

    folder: Path
    step: int
    recipe: str
    eval_loss: float | None


@contextmanager
def new_checkpoint(run: Path, step: int, recipe: Recipe, eval_loss: float | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `run`/checkpoint-`step` when the block ends well.

    Raises:
        OutputError: it cannot be written, or the disk is full; nothing is left of it.
    """
    from halfbyte.models import new_folder

    with new_folder(run / f"checkpoint-{step}") as aside:
        yield aside
        (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        files = {path.name: _facts(path) for path in sorted(aside.iterdir())}
        facts = {"version": VERSION, "step": step, "recipe": recipe.digest, "eval_loss": eval_loss, "files": files}
        (aside / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        sync_folder(aside)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint, byte for byte.

    Raises:
        CheckpointError: it is damaged, half there, or of another version.
    """
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if facts["version"] != VERSION:
            raise CheckpointError(f"{folder} has version {facts['version']}, this halfbyte reads {VERSION}")
        for name, expected in facts["files"].items():
            if _facts(folder / name) != expected:
                raise CheckpointError(f"{folder} is damaged: {name} is not what was written")
        return Checkpoint(folder, facts["step"], facts["recipe"], facts["eval_loss"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged: {error}") from None


def newest_good(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole; `tell` is given a sentence for each that was skipped."""
    for folder in reversed(list_checkpoints(run)):
        try:
            return read_checkpoint(folder)
        except CheckpointError as error:
            tell(f"{error}; skipped")
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints, oldest first, whole or not."""
    found = ((match, path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name)))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def remove(folder: Path) -> None:
    """Take a checkpoint away; one that is half removed no longer has the name of a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.removed")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_old(run: Path, keep: int) -> None:
    """Keep the last `keep` checkpoints and the one with the lowest loss on the evaluation set."""
    found = list_checkpoints(run)
    losses = {path: loss for path in found if (loss := _eval_loss(path)) is not None}
    best = min(losses, key=losses.__getitem__) if losses else None
    for folder in found[:-keep]:
        if folder != best:
            remove(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk; where the system has no such thing (Windows), nothing happens."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _eval_loss(folder: Path) -> float | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["eval_loss"]
    except (OSError, ValueError, KeyError):
        return None
