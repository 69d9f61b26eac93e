"""The server under many streaming clients at once: failures, mixed answers, refusals, tokens a second, memory.

python benchmarks/serve_load.py                              200 clients, two minutes, stories260K
python benchmarks/serve_load.py --seconds 20 --clients 50

The server is `halfbyte serve` in a process of its own, on a free port of the loopback. A client asks, greedily, for one
of a few prompts again and again, and compares what comes with that prompt's answer, which was asked for before the
load. Of ten clients one vanishes in the middle of its answers and one reads slowly, from a small socket buffer. A
refusal (429) is counted and tried again. Last, an engine that is at rest again and answers as before is looked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from _assets import assets, finish, table

PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "The dog ran to the park",
    "Tom and Sam were friends.",
    "A big red ball",
    "Mom said",
    "In the forest there was a bear",
    "It was raining",
)
SLOW_BUFFER = 2048  # bytes that a slow reader lets the kernel keep for it
MIB = 2**20


@dataclass
class Seen:
    """What all clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first text, without slow readers and refusals
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """Where to ask, and for how long."""

    port: int
    model: str
    tokens: int
    until: float
    wanted: dict[str, str]

    def request(self, prompt: str, stream: bool = True) -> bytes:
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": self.tokens, "stream": stream}
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        )
        return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


async def connect(port: int, slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket()
    connection.setblocking(False)
    if slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=connection, limit=SLOW_BUFFER if slow else 1 << 16)


async def get(port: int, path: str) -> str:
    reader, writer = await connect(port, slow=False)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return text.partition("\r\n\r\n")[2]


async def answer(load: Load, prompt: str, seen: Seen, kind: str, leave_after: int) -> None:
    """One request. Adds to `seen`; raises what the connection raises."""
    began = time.monotonic()
    reader, writer = await connect(load.port, kind == "slow")
    try:
        writer.write(load.request(prompt))
        status = int((await reader.readline()).split()[1])
        if status == 429:
            seen.counts["429"] += 1
            await asyncio.sleep(0.5 + random.random())
            return
        if status != 200:
            raise OSError(f"status {status}: {(await reader.read())[-200:]!r}")
        text, pieces, done = "", 0, False
        async for line in reader:
            if kind == "slow":
                await asyncio.sleep(0.05)
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                pieces += 1
                if pieces == 1 and kind == "plain":
                    seen.first.append(time.monotonic() - began)
                if not load.wanted[prompt].startswith(text):
                    seen.counts["mixed"] += 1
                    seen.problems.append(f"{prompt!r} got {text[-80:]!r}")
                    return
                if kind == "vanishing" and pieces > leave_after:
                    seen.counts["vanished"] += 1
                    return
        if not done or text != load.wanted[prompt]:
            raise OSError(f"the answer to {prompt!r} ended after {len(text)} characters, done: {done}")
        seen.counts["whole"] += 1
        seen.counts[f"whole, {kind}"] += 1
    finally:
        writer.transport.abort() if kind == "vanishing" else writer.close()


async def client(number: int, load: Load, seen: Seen) -> None:
    kind = {0: "vanishing", 1: "slow"}.get(number % 10, "plain")
    draw = random.Random(number)
    while time.monotonic() < load.until:
        seen.counts["requests"] += 1
        try:
            await answer(load, draw.choice(PROMPTS), seen, kind, draw.randint(0, 20))
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            seen.counts["failed"] += 1
            seen.problems.append(f"{kind}: {type(error).__name__}: {error}")


async def sample_memory(process: psutil.Process, until: float, seen: list[tuple[float, float]]) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        seen.append((time.monotonic() - began, process.memory_info().rss / MIB))
        await asyncio.sleep(1.0)


async def drive(options: argparse.Namespace, port: int, process: psutil.Process, model: str) -> dict[str, object]:
    wanted = {}
    for prompt in PROMPTS:
        reader, writer = await connect(port, slow=False)
        writer.write(Load(port, model, options.tokens, 0.0, {}).request(prompt, stream=False))
        reply = (await reader.read()).partition(b"\r\n\r\n")[2]
        wanted[prompt] = json.loads(reply)["choices"][0]["text"]
        writer.close()
    load = Load(port, model, options.tokens, time.monotonic() + options.seconds, wanted)
    seen, memory = Seen(), list[tuple[float, float]]()
    before, began = written(await get(port, "/metrics")), time.monotonic()
    clients = [client(number, load, seen) for number in range(options.clients)]
    await asyncio.gather(sample_memory(process, load.until, memory), *clients)
    seconds = time.monotonic() - began
    tokens = written(await get(port, "/metrics")) - before
    for _ in range(100):  # those who vanished last
        busy = json.loads(await get(port, "/health"))
        if not busy["running"] and not busy["waiting"]:
            break
        await asyncio.sleep(0.1)
    again = Seen()
    await answer(load, PROMPTS[0], again, "plain", 0)
    first = sorted(seen.first)
    return {
        "seconds": round(seconds, 1),
        **{
            name: seen.counts[name]
            for name in ("requests", "whole", "whole, slow", "vanished", "429", "failed", "mixed")
        },
        "tokens a second": round(tokens / seconds, 1),
        "median seconds to first text": round(first[len(first) // 2], 3) if first else None,
        "95th percentile": round(first[len(first) * 95 // 100], 3) if first else None,
        "memory MiB": {f"{memory[at][0]:.0f} s": round(memory[at][1], 1) for at in quarters(len(memory))},
        "running and waiting at the end": [busy["running"], busy["waiting"]],
        "answers as before at the end": bool(again.counts["whole"]),
        "problems": seen.problems[:5],
    }


def quarters(count: int) -> list[int]:
    return sorted({(count - 1) * part // 4 for part in range(5)})


def written(metrics: str) -> float:
    found = re.search(r"^halfbyte_written_tokens_total (\S+)", metrics, re.M)
    assert found is not None
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--queue", type=int, default=160, help="fewer than the clients need: some must be refused")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--model", type=Path, help="default: stories260K of the assets")
    options = parser.parse_args()
    model = options.model or assets() / "models" / "stories260K"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from halfbyte.cli.main import main; main()", "serve", str(model)]
    command += ["--port", str(port), "--name", "load", "--slots", str(options.slots), "--queue", str(options.queue)]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.2)
        result = asyncio.run(drive(options, port, psutil.Process(server.pid), "load"))
    finally:
        server.terminate()
        server.wait(30)
    result["exit code of the server"] = server.returncode
    print(table(("", "seen"), [(name, str(value)) for name, value in result.items()]))
    settings = {"clients": options.clients, "slots": options.slots, "queue": options.queue, "tokens": options.tokens}
    finish("serve_load", {**settings, **result})


if __name__ == "__main__":
    main()
