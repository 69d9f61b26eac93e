"""Rows a second and peak memory of checking, tokenizing and packing a large data file, and of finding it again.

python benchmarks/tokenizing.py                a tenth of a million rows, then a million: memory must stay flat
python benchmarks/tokenizing.py --rows 20000   2,000, then 20,000

The rows are synthetic: an instruction of 2 to 6 words and an answer of 1 to 12, drawn from 2,000 words. Memory is that
of the process and its workers together, sampled ten times a second, without the pages of mapped files, which the system
takes back when it needs them. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _assets import finish, table

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_LENGTH = 256
STAGES = ("check", "tokenize", "pack", "find again")


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(2000)]
    with path.open("w") as file:
        for _ in range(count):
            instruction = " ".join(draw.choices(words, k=draw.randint(2, 6)))
            output = " ".join(draw.choices(words, k=draw.randint(1, 12)))
            file.write(json.dumps({"instruction": instruction, "input": "", "output": output}) + "\n")


def work(path: Path, cache: Path) -> None:
    """What is measured; prints seconds of each stage as JSON."""
    from halfbyte.data import Renderer, pack, read_examples, tokenize
    from halfbyte.models import load_tokenizer

    renderer = Renderer(load_tokenizer(str(REPOSITORY / "examples" / "quickstart" / "base")))
    seconds = []

    def stage(call):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
        return result

    def tokens(examples):
        return tokenize(examples, renderer, max_length=MAX_LENGTH, train_on="completion", cache=cache, workers=2)

    examples = stage(lambda: read_examples(path))
    rows = stage(lambda: tokens(examples))
    packed = stage(lambda: pack(rows, MAX_LENGTH, cache=cache))
    again = stage(lambda: pack(tokens(read_examples(path)), MAX_LENGTH, cache=cache))
    assert again.report == packed.report
    assert sum(packed.facts.trained) == rows.report.trained
    assert packed.facts.length.sum() == rows.report.tokens
    print(json.dumps({"seconds": seconds, "tokens": rows.report.tokens, "packs": len(packed.dataset)}))


def anonymous(process: psutil.Process) -> int:
    """Bytes of a process and its children that are not pages of files."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            memory = one.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - getattr(memory, "shared", 0)
    return total


def measure(count: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, count)
        command = [sys.executable, __file__, "--work", str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process, peak = psutil.Process(child.pid), 0
        while child.poll() is None:
            try:
                peak = max(peak, anonymous(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        output, _ = child.communicate()
        if child.returncode:
            sys.exit(f"the measured process failed with {child.returncode}")
        result = json.loads(output.splitlines()[-1])
        return {"rows": count, "peak_bytes": peak, "file_bytes": path.stat().st_size, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.work.parent / "cache")
        return
    results = [measure(count) for count in (options.rows // 10, options.rows)]
    header = ["rows", "tokens", "file", *(f"{stage}, rows/s" for stage in STAGES), "peak memory"]
    lines = [
        [
            f"{r['rows']:,}",
            f"{r['tokens']:,}",
            f"{r['file_bytes'] / 1e6:,.0f} MB",
            *(f"{r['rows'] / s:,.0f}" for s in r["seconds"]),
            f"{r['peak_bytes'] / 1e6:,.0f} MB",
        ]
        for r in results
    ]
    print(table(header, lines))
    finish("tokenizing", {"stages": STAGES, "results": results})


if __name__ == "__main__":
    main()
