"""Several processes that train one model: `torchrun --nproc-per-node 2 --no-python halfbyte train recipe.yaml`.

Each process holds the whole model and takes every n-th micro-batch; torch's DistributedDataParallel adds up the
gradients, and every process takes the same step. What is more than that is agreed on here:

* **The first process writes.** The run directory, its lock, the log, the checkpoints and the terminal are its own.
* **An error stops all.** What one process finds (a bad row, a full disk, a loss that is not finite) is raised by all of
  them at the same place: one that went on alone would wait forever for the others' gradients.
* **A number is one number.** Losses and metrics are sums over what all processes saw, divided once.

In one process every function here is a plain call. Objects travel by torch's own collectives, between processes that
one launcher has started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

from halfbyte import env
from halfbyte.errors import HalfbyteError, ProcessError, RequestError

Value = TypeVar("Value")

# While one process tokenizes or writes, the others wait for it. One that has died is noticed at once, by its closed
# connection, and not by this.
PATIENCE = timedelta(days=1)


@contextmanager
def joined() -> Iterator[None]:
    """The processes of a launcher as one group while the block lasts; nothing is done where there is one process.

    Raises:
        RequestError: `WORLD_SIZE` asks for several, and what else a launcher sets is missing.
    """
    if env.world_size() == 1 or (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    if missing := env.missing_from_launcher():
        raise RequestError(
            f"WORLD_SIZE is {env.world_size()}, but {' and '.join(missing)} not set; start with torchrun, or unset it."
        )
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)  # chooses the backend as the Trainer will
    try:
        yield
    except ProcessError:
        if not is_first():  # a launcher ends all when one ends: wait until the first, which says why, has left
            with suppress(RuntimeError):
                distributed.barrier()
        raise
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


def gathered(value: Value) -> list[Value]:
    """Every process's value, in order."""
    if count() == 1:
        return [value]
    values: list[Value | None] = [None] * count()
    distributed.all_gather_object(values, value)
    return cast("list[Value]", values)


def check(error: HalfbyteError | None) -> None:
    """Raise in every process where one has an error.

    Raises:
        HalfbyteError: in the first process: its own.
        ProcessError: another process's; the message is the first process's to tell.
    """
    found = gathered(None if error is None else (str(error), error.exit_code))
    number, told = next(((at, each) for at, each in enumerate(found) if each is not None), (0, None))
    if told is None:
        return
    if is_first() and number == 0 and error is not None:
        raise error
    message = f"process {number}: {told[0]}" if is_first() else f"process {number} has failed, and process 0 says how."
    raise ProcessError(message, told[1])


def together(make: Callable[[], Value]) -> Value:
    """What `make` gives in each process.

    Raises:
        HalfbyteError: see `check`.
    """
    made: list[Value] = []
    error = None
    try:
        made.append(make())
    except HalfbyteError as caught:
        error = caught
    check(error)
    return made[0]


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in the first process, which alone calls it.

    Raises:
        HalfbyteError: see `check`.
    """
    value = together(make if is_first() else lambda: cast("Value", None))
    return gathered(value)[0]
