"""`<output_dir>.unfinished`: where a run lives until it is done.

The run directory that was asked for appears when everything in it is complete, in one rename. Until then the log and
the checkpoints lie beside it, where a person finds them:

    runs/a.unfinished/
      metrics.jsonl     the log so far
      checkpoint-20/    see `halfbyte.train.checkpoints`

A run that fails or is stopped leaves this folder where there is a checkpoint in it, and nothing where there is none.
`--resume` goes on from its newest whole checkpoint, and only with the recipe that it was begun with: half a run of one
recipe and half of another would be a result that no recipe repeats.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halfbyte.errors import OutputError, RequestError, WorkError
from halfbyte.train.checkpoints import Checkpoint, list_checkpoints, newest_good, remove, sync_folder
from halfbyte.train.recipe import Recipe, load_recipe
from halfbyte.train.watching import TENSORBOARD

RESULT = "result"  # the finished run, before it gets its name


class Unfinished:
    """A run that is not done.

    Attributes:
        folder: of its log and checkpoints.
        checkpoint: to go on from; None: from the beginning.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    @contextmanager
    def finish(self, output: Path) -> Iterator[Path]:
        """A folder to write the result into, which becomes `output` when the block ends well."""
        from halfbyte.models import new_folder

        with new_folder(self.folder / RESULT) as aside:
            yield aside
            sync_folder(aside)
        if output.exists():  # and is empty: that was checked
            output.rmdir()
        (self.folder / RESULT).rename(output)
        sync_folder(output.parent)


def place_of(recipe: Recipe) -> Path:
    """The folder of a recipe's unfinished run."""
    output = Path(recipe.output_dir).absolute()
    return output.with_name(output.name + ".unfinished")


def finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a run of this very recipe that is done, what a kill left beside it taken away; else None."""
    with suppress(OSError, ValueError, AttributeError):
        summary = json.loads((Path(recipe.output_dir) / "summary.json").read_text(encoding="utf-8"))
        if summary.get("recipe") == recipe.digest:
            _clear(place_of(recipe))
            return dict(summary)
    return None


def _clear(folder: Path) -> None:
    """Remove a run's folder; a kill meanwhile leaves no checkpoint in it that cannot be read."""
    with suppress(OSError):
        for checkpoint in list_checkpoints(folder):
            remove(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unfinished_run(recipe: Recipe, *, resume: bool, tell: Callable[[str], None]) -> Iterator[Unfinished]:
    """The folder for a run, its own while the block lasts.

    Args:
        recipe: what is run.
        resume: go on from the newest checkpoint, if there is one.
        tell: is given sentences about what was found.

    Raises:
        RequestError: there is a run of another recipe, or one that nobody asked to resume or to throw away.
        OutputError: another process is at it, or the folder cannot be written.
    """
    folder = place_of(recipe)
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another process is at the run in {folder}; wait for it or stop it") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from None
    done = False
    try:
        checkpoint = _begin(folder, recipe, resume, tell)
        yield Unfinished(folder, checkpoint)
        done = True
    except BaseException as error:
        raise _with_way_on(error, folder) from None
    finally:
        lock.release()
        if done or not list_checkpoints(folder):
            _clear(folder)
            for path in () if done else made:
                with suppress(OSError):  # something else is in it by now
                    path.rmdir()


def _begin(folder: Path, recipe: Recipe, resume: bool, tell: Callable[[str], None]) -> Checkpoint | None:
    """Check what is there against what is asked, clear what a kill left, and find the checkpoint."""
    for leftover in (*folder.glob(".*"), folder / RESULT):
        shutil.rmtree(leftover, ignore_errors=True)
    found = list_checkpoints(folder)
    checkpoint = newest_good(folder, tell)
    if checkpoint is None:
        if found:
            raise RequestError(f"no checkpoint in {folder} is whole; remove that folder to begin again.")
        if resume:
            tell("there is no checkpoint to go on from; beginning at step 0")
        for leftover in folder.glob("*.*"):  # of a run that was killed before its first one
            leftover.unlink()
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        return None
    _check_same(checkpoint, recipe)
    if not resume:
        raise RequestError(
            f"{folder} holds an unfinished run of this recipe, {checkpoint.step} steps of it; "
            "go on with --resume, or remove that folder to begin again."
        )
    for damaged in found[found.index(checkpoint.folder) + 1 :]:
        remove(damaged)
    return checkpoint


def _check_same(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a recipe that the run was not begun with, by the keys that differ."""
    if checkpoint.recipe == recipe.digest:
        return
    try:
        old = load_recipe(checkpoint.folder / "recipe.yaml").model_dump(mode="json")
    except RequestError:  # a halfbyte with other keys wrote it
        old = {}
    new = recipe.model_dump(mode="json")
    told = ", ".join(
        f"{key} was {old[key]!r} and is {new[key]!r}" for key in new if key in old and old[key] != new[key]
    )
    raise RequestError(
        f"{checkpoint.folder.parent} holds an unfinished run of another recipe{told and f' ({told})'}; go on with that "
        "one, name another output_dir, or remove the folder."
    )


def _with_way_on(error: BaseException, folder: Path) -> BaseException:
    """The same error, with the checkpoint that was kept; a full disk as a sentence."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = OutputError(f"the disk that holds {folder} is full")
    kept = list_checkpoints(folder)
    if kept and isinstance(error, WorkError | OutputError):
        error.args = (f"{str(error).rstrip('.')}; the last good checkpoint is {kept[-1]}.",)
    return error
