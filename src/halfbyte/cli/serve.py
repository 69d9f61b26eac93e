"""`halfbyte serve`: a model and its adapters over HTTP, in the way of OpenAI's API."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.answering import Device, MaxMemory, named_adapters, open_engine
from halfbyte.errors import RequestError

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


# budget: each option of the command is a parameter, that is how typer reads them
def serve(
    model: Annotated[str, typer.Argument(help="Archive, model folder, adapter folder or run directory.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of an adapter that clients may ask for as a model; may repeat."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine need --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HALFBYTE_API_KEY", help="What clients send as a bearer token.", show_envvar=True),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its folder's name by default.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=128, help="Requests that are answered at the same time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 256,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer together.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 4096,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one request may take.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of one request.")] = 1 << 20,
    cache_dtype: Annotated[str | None, typer.Option(help="Keys and values in float32, bfloat16 or int8.")] = None,
    max_memory: MaxMemory = None,
    device: Device = None,
    quantize_head: Annotated[
        bool, typer.Option(help="Quantize the output layer too: faster, not the same numbers.")
    ] = False,
    drafts: Annotated[int, typer.Option(min=0, max=32, help="Tokens that prompt lookup proposes at a time.")] = 0,
) -> None:
    """Serve a model over HTTP."""
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise RequestError(f"serving needs {', '.join(missing)}; install them with: pip install 'halfbyte[serve]'")
    if host not in _LOOPBACK and api_key is None:
        raise RequestError(f"anybody who reaches {host} could use the model; give --api-key, or leave --host out.")
    import uvicorn

    from halfbyte.infer.server import Limits, make_app

    engine = open_engine(
        model,
        named_adapters(adapter or ()),
        max_memory,
        device,
        slots=slots,
        queue_limit=queue,
        max_length=max_length,
        cache_dtype=cache_dtype,
        quantize_head=quantize_head,
        drafts=drafts,
    )
    title = name or Path(model).name
    limits = Limits(body=max_body, tokens=max_tokens, seconds=timeout)
    app = make_app(engine, title, api_key=api_key, limits=limits)
    typer.echo(f"{title}: {engine.decoder}; models: {', '.join([title, *engine.adapters])}", err=True)
    # A stream may be in the middle of an answer: it gets some seconds to end before it is cut off.
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10)
