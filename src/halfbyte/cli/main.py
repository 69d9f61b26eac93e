"""`halfbyte`: the commands, and the one place where an error becomes a sentence and an exit code.

Every command's module is imported for its signature, so none of them imports torch at the top: `halfbyte --help` must
answer at once, and the work is imported inside the function that needs it.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable

import typer

from halfbyte import env
from halfbyte.cli.adapter import combine, pack, scale, unpack
from halfbyte.cli.chat import chat
from halfbyte.cli.data import data
from halfbyte.cli.export import export
from halfbyte.cli.generate import generate
from halfbyte.cli.info import info
from halfbyte.cli.merge import merge
from halfbyte.cli.quantize import quantize
from halfbyte.cli.serve import serve
from halfbyte.cli.train import train
from halfbyte.errors import HalfbyteError, WorkError

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects
# What to change, by command, where a card has no room for what it is given.
_SMALLER = {
    "train": "set gradient_checkpointing: true and activation_offloading: true, or a smaller "
    "per_device_train_batch_size or max_length",
    "serve": "give fewer --slots, a smaller --max-length, --cache-dtype int8, or --device cpu",
    "generate": "give --device cpu",
    "chat": "give --device cpu",
}


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with halfbyte's errors turned into one sentence on stderr and their exit code.

    It wraps each command and not the whole program, because typer answers Ctrl-C itself (with 1) outside of it.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except HalfbyteError as error:
            typer.echo(f"halfbyte: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for a comparison
                raise
            wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
            advice = _SMALLER.get(command.__name__, "set CUDA_VISIBLE_DEVICES= to leave it to the CPU")
            size = f" for {wanted[1]} more" if wanted else ""
            typer.echo(f"halfbyte: the card has no memory{size}; {advice}.", err=True)
            raise typer.Exit(WorkError.exit_code) from None

    return run


app = typer.Typer(
    help="Fine-tune and run language models whose frozen weights are stored in half a byte each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug keeps Python's own traceback
    rich_markup_mode=None,
)
for command in (quantize, data, train, generate, chat, serve, merge, export, info):
    app.command()(_told(command))
adapters = typer.Typer(help="Combine and scale adapters, and store one in 4 bits.", no_args_is_help=True)
for tool in (combine, scale, pack, unpack):
    adapters.command()(_told(tool))
app.add_typer(adapters, name="adapter", rich_help_panel=None)


def main() -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    env.quiet_libraries()
    env.patient_threads()
    warnings.filterwarnings("ignore", category=FutureWarning)  # other libraries' notes to their developers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()
