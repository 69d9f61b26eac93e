"""`halfbyte chat`: a conversation in the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.answering import Device, MaxMemory, named_adapters, open_engine
from halfbyte.errors import RequestError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.infer import Engine, SamplingParams

COMMANDS = {
    "/help": "these lines",
    "/adapter [NAME]": "answer with this adapter; without a name: with none",
    "/system [TEXT]": "begin again, with this as the system message; without a text: with none",
    "/reset": "begin again",
    "/quit": "end (so does Ctrl-D)",
}


# budget: each option of the command is a parameter, that is how typer reads them
def chat(
    model: Annotated[str, typer.Argument(help="Archive, model folder, hub name, adapter folder or run directory.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of an adapter; the first one answers, /adapter changes. May repeat."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    markdown: Annotated[bool, typer.Option(help="Show answers as Markdown, where this is a terminal.")] = True,
    drafts: Annotated[int, typer.Option(min=0, max=32, help="Tokens that prompt lookup proposes at a time.")] = 0,
    max_memory: MaxMemory = None,
    device: Device = None,
    quantize_head: Annotated[
        bool, typer.Option(help="Quantize the output layer too: faster, not the same numbers.")
    ] = False,
) -> None:
    """Talk with a model; /help shows what else can be typed."""
    from rich.console import Console

    from halfbyte.infer import SamplingParams

    params = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed)
    console = Console(highlight=False)
    options: dict[str, Any] = {"slots": 1, "drafts": drafts, "quantize_head": quantize_head}
    with open_engine(model, named_adapters(adapter or ()), max_memory, device, **options) as engine:
        talk = Conversation(engine, params, console, markdown and console.is_terminal, system)
        talk.adapter = next(iter(engine.adapters), None)
        console.print(f"{model}: {engine.decoder}. /help shows what else can be typed.", style="dim", markup=False)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line:
                talk.hear(line)


@dataclass
class Conversation:
    """What was said, and how it goes on."""

    engine: Engine
    params: SamplingParams
    console: Console
    markdown: bool
    system: str | None
    adapter: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """A line that was typed: a command, or a turn to answer. A mistake is said and changes nothing."""
        before = list(self.turns)
        try:
            if line.startswith("/"):
                self._obey(*line.partition(" ")[::2])
            else:
                self._answer(line)
        except RequestError as error:
            self.turns = before
            self.console.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:  # Ctrl-C ends an answer, not the conversation
            self.console.print()

    def _obey(self, command: str, rest: str) -> None:
        rest = rest.strip()
        if command == "/help":
            for name, meaning in COMMANDS.items():
                self.console.print(f"{name:18}{meaning}", markup=False)
        elif command == "/reset":
            self.turns = []
        elif command == "/system":
            self.system, self.turns = rest or None, []
        elif command == "/adapter":
            if rest and rest not in self.engine.adapters:
                hint = nearest(rest, self.engine.adapters) if self.engine.adapters else "none was loaded"
                raise RequestError(f"there is no adapter {rest!r}; {hint}")
            self.adapter = rest or None
        else:
            raise RequestError(
                f"there is no command {command!r}; {nearest(command, (name.split()[0] for name in COMMANDS))}"
            )

    def _answer(self, line: str) -> None:
        self.turns.append({"role": "user", "content": line})
        first = [{"role": "system", "content": self.system}] if self.system else []
        text = ""
        stream = self.engine.stream([*first, *self.turns], self.params, adapter=self.adapter)
        try:
            if self.markdown:
                from rich.live import Live
                from rich.markdown import Markdown

                with Live(console=self.console, refresh_per_second=8, vertical_overflow="visible") as live:
                    for piece in stream:
                        text += piece
                        live.update(Markdown(text))
            else:
                for piece in stream:
                    text += piece
                    self.console.print(piece, end="", markup=False, soft_wrap=True)
                self.console.print()
        finally:
            stream.close()  # which cancels what is not written yet
            self.turns.append({"role": "assistant", "content": text})
