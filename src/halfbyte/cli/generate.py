"""`halfbyte generate`: ask a model, a run directory, or a model with adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.answering import named_adapters, open_engine


# budget: each option of the command is a parameter, that is how typer reads them
def generate(
    model: Annotated[str, typer.Argument(help="Archive, model folder, hub name, adapter folder or run directory.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to ask; may repeat.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter folder to put on the model; several add up. FOLDER or NAME=FOLDER."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may repeat.")] = None,
    quantize_head: Annotated[
        bool, typer.Option(help="Quantize the output layer too: faster, not the same numbers.")
    ] = False,
) -> None:
    """Answer prompts with a model."""
    from halfbyte.infer import SamplingParams

    params = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed, stop=tuple(stop or ()))
    with open_engine(model, named_adapters(adapter or ()), quantize_head=quantize_head) as engine:
        conversations = [[{"role": "user", "content": text}] for text in prompt]
        mix = dict.fromkeys(engine.adapters, 1.0)
        for answer in engine.generate(conversations, params, adapter=mix):
            typer.echo(answer.text)
