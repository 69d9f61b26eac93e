"""`halfbyte generate`: ask a model, a run directory, or a model with adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.answering import Device, MaxMemory, named_adapters, open_engine

if TYPE_CHECKING:
    from halfbyte.infer import Engine, SamplingParams


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
    max_memory: MaxMemory = None,
    device: Device = None,
    report: Annotated[bool, typer.Option("--report", help="Say what the run cost, on standard error.")] = False,
    report_against: Annotated[
        str | None,
        typer.Option(help="The model before quantization: report its run too, and how far the logits are from its."),
    ] = None,
) -> None:
    """Answer prompts with a model."""
    from halfbyte.infer import SamplingParams
    from halfbyte.infer.report import resident

    params = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed, stop=tuple(stop or ()))
    before = resident()
    with open_engine(model, named_adapters(adapter or ()), max_memory, device, quantize_head=quantize_head) as engine:
        conversations = [[{"role": "user", "content": text}] for text in prompt]
        mix = dict.fromkeys(engine.adapters, 1.0)
        if report or report_against is not None:
            _report(engine, conversations, params, mix, before, report_against)
            return
        for answer in engine.generate(conversations, params, adapter=mix):
            typer.echo(answer.text)


def _report(
    engine: Engine,
    conversations: list[Any],
    params: SamplingParams,
    mix: dict[str, float],
    before: int | None,
    against: str | None,
) -> None:
    """Answer, and say what it cost; the original, without the adapters, answers the same prompts."""
    import torch

    from halfbyte.infer import Engine
    from halfbyte.infer.report import distance, measure, render, resident
    from halfbyte.models import load_model

    answers, run = measure(engine, conversations, params, mix, before=before)
    for answer in answers:
        typer.echo(answer.text)
    runs, apart = {"this model": run}, None
    if against is not None:
        texts = [
            [*engine.token_ids(prompt), *(choice.token for choice in answer.choices[:-1])]
            for prompt, answer in zip(conversations, answers, strict=True)
        ]
        ours = [engine.logits(text) for text in texts]
        start = resident()
        dense = load_model(against, dtype=torch.bfloat16)
        with Engine(dense, tokenizer=engine.tokenizer, device=str(engine.device), dtype="bfloat16") as original:
            _, runs["16 bits"] = measure(original, conversations, params, before=start)
            apart = distance(ours, [original.logits(text) for text in texts])
    typer.echo(render(runs, apart), err=True)
