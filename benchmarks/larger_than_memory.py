"""A model whose file is larger than the memory that its process may use: tokens a second against the disk's rate.

    python benchmarks/larger_than_memory.py [--layers 24] [--share 0.3] [--tokens 8] [--model ARCHIVE]

The engine runs in processes of their own in a memory cgroup, which counts the pages of files that a process reads: one
without a limit, which shows what a process holds besides such pages, and then two whose limit is that and room for a
share of the file, from before the engine opens. The first of these keeps some layers in memory and reads the others
while the layers before them compute, as the engine does unasked; the second leaves everything to the system. All have
to write the same tokens. The disk's rate is read past the page cache, from the same file, before and after.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
SLACK = 24 * MIB  # buffers, page tables, and what a process allocates now and then
PROMPT = 8
BLOCK = 4 * MIB


class Group:
    """A memory cgroup, of version 1 or 2.

    Raises:
        OSError: none can be made here.
    """

    def __init__(self) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        self.first = any("memory" in controllers.split(",") for _, controllers, _ in lines)
        own = next(path for _, controllers, path in lines if ("memory" in controllers.split(",")) == self.first)
        mount = Path("/sys/fs/cgroup/memory" if self.first else "/sys/fs/cgroup")
        self.path = mount / own.lstrip("/") / f"halfbyte-{os.getpid()}"
        self.path.mkdir()
        self._limit = self.path / ("memory.limit_in_bytes" if self.first else "memory.max")
        if not self._limit.exists():
            self.path.rmdir()
            raise OSError(f"{self.path.parent} gives its children no memory controller")

    def own(self) -> int:
        """Bytes that belong to no file."""
        lines = (line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(dict(lines)["rss" if self.first else "anon"])

    def allow(self, nbytes: int) -> None:
        """Set the limit; what is over it is given back at once."""
        self._limit.write_text(str(nbytes))

    def held(self) -> int:
        """Bytes that count for the group, pages of files included."""
        return int((self.path / ("memory.usage_in_bytes" if self.first else "memory.current")).read_text())


@contextmanager
def group() -> Iterator[Group]:
    """A group that is gone afterwards; where none can be made, the benchmark ends with the reason."""
    try:
        made = Group()
    except (OSError, StopIteration) as error:
        sys.exit(f"benchmark skipped: no memory cgroup can be made here ({error})")
    try:
        yield made
    finally:
        for _ in range(50):  # a process that has just ended may still be listed
            try:
                made.path.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def disk_rate(file: Path) -> float:
    """Bytes a second of reading the whole file in order, past the page cache."""
    buffer = mmap.mmap(-1, BLOCK)  # aligned, as reading past the cache needs it
    handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        began, total = time.perf_counter(), 0
        while count := os.preadv(handle, [buffer], total):
            total += count
            if count % mmap.PAGESIZE:
                break
        return total / (time.perf_counter() - began)
    finally:
        os.close(handle)


def evict(file: Path) -> None:
    """Drop the file's pages from the cache: they count for the group of whoever reads them first."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def answer(engine: Any, tokens: int) -> dict[str, Any]:
    """Write one answer: what a step took, and what it read from the disk. The prompt is a step, too."""
    from halfbyte.infer import SamplingParams

    read, faults, before = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt, engine.snapshot()
    offload, waited = engine.offload, engine.offload.waited
    found = engine.submit(list(range(3, 3 + PROMPT)), SamplingParams(tokens, ignore_end=True)).result()
    after = engine.snapshot()
    return {
        "tokens": [choice.token for choice in found.choices],
        "seconds": (after.seconds["step"] - before.seconds["step"]) / (tokens - 1),
        "read": (bytes_read() - read) / tokens,
        "weights": offload.nbytes,
        "offloaded": offload.offloaded,
        "waited": (offload.waited - waited) / tokens,
        "major_faults": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / tokens,
    }


def bytes_read() -> int:
    """What this process had the disk read."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(dict(lines)["read_bytes"])


def work(file: Path, tokens: int, max_memory: int | None, procs: Path) -> None:
    """The process in the group: maps the model, waits for its limit, answers to find its place, and answers again."""
    procs.write_text(str(os.getpid()))
    import halfbyte as hb

    model = hb.load_model(file, verify=False)
    print(flush=True)
    sys.stdin.readline()
    with hb.Engine(
        model,
        quantize_head=True,
        dtype="bfloat16",
        slots=1,
        max_length=128,
        max_memory=max_memory,
        tokenizer=tokenizer(file),
    ) as engine:
        answer(engine, tokens)
        print(json.dumps(answer(engine, tokens)), flush=True)
        sys.stdin.readline()


def tokenizer(file: Path) -> Any:
    """The model's own, or one of single letters: what is written is not looked at."""
    from halfbyte.errors import HalfbyteError
    from halfbyte.models import load_tokenizer

    try:
        return load_tokenizer(file)
    except (HalfbyteError, OSError, ValueError):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({chr(97 + index): index for index in range(26)}, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="z")


def run(file: Path, tokens: int, limit: int | None, max_memory: int | None) -> tuple[dict[str, Any], int, int]:
    """One process: what it answered, the bytes that are its own, and those that count for its group in all."""
    evict(file)
    with group() as limited:
        arguments = [sys.executable, __file__, "--procs", str(limited.path / "cgroup.procs"), "--model", str(file)]
        arguments += ["--tokens", str(tokens), *(["--max-memory", str(max_memory)] if max_memory is not None else [])]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()
            if limit is not None:
                limited.allow(limit)
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the process did not survive a limit of {(limit or 0) / MIB:.0f} MiB")
            own, held = limited.own(), limited.held()
            process.stdin.close()
            process.wait()
    return json.loads(line), own, held


def measure(file: Path, share: float, tokens: int) -> dict[str, dict[str, Any]]:
    """All three processes."""
    size = file.stat().st_size
    free, own, _ = run(file, tokens, None, None)
    assert not free["offloaded"], "the model does not fit into this machine's memory; there is nothing to compare with"
    limit = own + SLACK + int(share * size)
    results: dict[str, dict[str, Any]] = {}
    for kind, max_memory in (("offload", None), ("system", size)):
        before = disk_rate(file)
        seen, _, held = run(file, tokens, limit, max_memory)
        assert seen["tokens"] == free["tokens"], "the limit changed what was written"
        results[kind] = {
            "own_bytes": own,
            "limit_bytes": limit,
            "held_bytes": held,
            "file_bytes": size,
            "weights_bytes": seen["weights"],
            "offloaded_bytes": seen["offloaded"],
            "free_tokens_per_second": 1 / free["seconds"],
            "tokens_per_second": 1 / seen["seconds"],
            "read_a_token": seen["read"],
            "major_faults_a_token": seen["major_faults"],
            "reading_rate": seen["read"] / seen["seconds"],
            "disk_rate": max(before, disk_rate(file)),
        }
    return results


def main() -> None:
    """Make the file, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--share", type=float, default=0.3, help="of the file, that fits beside the process itself")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--model", type=Path, help="an archive; default: a random Llama of that many layers")
    parser.add_argument("--max-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--procs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.procs:
        return work(options.model, options.tokens, options.max_memory, options.procs)
    with group():
        pass  # before minutes go into a file that nobody could use
    with tempfile.TemporaryDirectory() as name:
        file = options.model or write(Path(name), options.layers)
        results = measure(file, options.share, options.tokens)
    report(results)


def write(folder: Path, layers: int) -> Path:
    """A random Llama with 44 M weights a layer, in NF4 with double quantization."""
    from _llama import write_llama

    from halfbyte.models import HalfbyteConfig, quantize_to_archive

    write_llama(folder / "dense", layers, max_position_embeddings=128)
    quantize_to_archive(folder / "dense", folder / "model.nf4dq", HalfbyteConfig(compute_dtype="bfloat16"))
    for shard in (folder / "dense").iterdir():
        shard.unlink()
    return folder / "model.nf4dq"


def report(results: dict[str, dict[str, Any]]) -> None:
    """A table, and the figures as JSON."""
    from _assets import finish, table

    rows = [
        (
            kind,
            f"{seen['file_bytes'] / MIB:.0f}",
            f"{seen['limit_bytes'] / MIB:.0f} ({seen['own_bytes'] / MIB:.0f})",
            f"{(seen['weights_bytes'] - seen['offloaded_bytes']) / MIB:.0f}",
            f"{seen['free_tokens_per_second']:.1f}",
            f"{seen['tokens_per_second']:.2f}",
            f"{seen['read_a_token'] / MIB:.0f}",
            f"{seen['reading_rate'] / 1e6:.0f}",
            f"{seen['disk_rate'] / 1e6:.0f}",
            f"{seen['reading_rate'] / seen['disk_rate']:.2f}",
        )
        for kind, seen in results.items()
    ]
    header = (
        "",
        "file MiB",
        "limit (own) MiB",
        "kept MiB",
        "tokens/s free",
        "tokens/s",
        "read a token MiB",
        "MB/s",
        "disk MB/s",
        "share",
    )
    print(table(header, rows))
    finish("larger_than_memory", {"results": results})


if __name__ == "__main__":
    main()
