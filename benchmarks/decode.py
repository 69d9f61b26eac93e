"""Answering with a whole model, beside llama.cpp, bitsandbytes and dense bfloat16 through transformers, in one run.

    python benchmarks/decode.py [--rounds 3] [--layers 6] [--peers llama.cpp,bitsandbytes,dense] > decode.txt
    python benchmarks/decode.py --results decode.txt --figure docs/decode.png

The model is a Llama of 399 M parameters with random weights (hidden 2048, ffn 5632, 6 layers, 32 heads, 4 kv heads,
vocabulary 32,000). halfbyte runs it in NF4 with double quantization, the output layer included, as llama.cpp's Q4_0
file has it, which `halfbyte export` writes. Contenders are processes of their own and take turns. halfbyte's times
are those of the engine with its scheduler, sampling and text; llama.cpp's those of its evaluation alone. Beside
halfbyte's figures stands what the machine allows whoever reads all weights once a step, by the rates at which torch
reads memory and multiplies dense bfloat16. The second command draws a run, by its last line, as curves.

Before anything is timed, halfbyte's tokens are compared with those of the same weights in transformers, and those of
bitsandbytes' own kernel for answering (its layers repack their weights when they are first called in `eval`) with those
of its layers in training, which decode and multiply.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from _assets import assets, finish, table
from _curves import draw
from _llama import write_llama
from _peers import gemm_rate, memory_bandwidth

PROMPT = 16  # tokens before those that are timed
DECODED = 32
NF4_BITS = 4.127  # a weight, with double quantization
DECODED_TOGETHER = 8  # by contenders that take long for several sequences at once
LENGTH = 2112  # tokens of the longest sequence
CHUNK = 512  # tokens of a prompt that llama.cpp takes at once
PEERS = {"llama.cpp": "llama_cpp", "bitsandbytes": "bitsandbytes", "dense": "torch"}
BATCHES = (1, 2, 4, 8, 16, 32)
PREFILLS = (16, 128, 512, 2000)


def write_model(folder: Path, layers: int) -> None:
    """The random base in bfloat16, with the first 32,000 entries of GPT-2's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_llama(folder, layers, max_position_embeddings=4096, bos_token_id=31_999, eos_token_id=31_999)
    source = assets() / "tokenizers" / "gpt2"
    every = sorted(json.loads((source / "encoder.json").read_text()).items(), key=lambda item: item[1])
    vocabulary = dict(every[:31_999])
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    merges = [pair for pair in merges if "".join(pair) in vocabulary]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, base: Path) -> None:
    """A random adapter of rank 16 on all projections."""
    import torch
    from peft import LoraConfig, get_peft_model

    import halfbyte as hb

    model = get_peft_model(hb.load_model(base), LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(folder, save_embedding_layers=False)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that no cache has seen."""
    import random

    draw = random.Random((seed, length).__hash__())
    return [draw.randrange(1000, 31_000) for _ in range(length)]


Work = Callable[[str, int], float]


def halfbyte_work(folder: Path) -> Work:
    """Seconds of one kind of work in the engine: decode BATCH, adapter 1, prefill LENGTH."""
    import halfbyte as hb
    from halfbyte.infer import SamplingParams

    engine = hb.Engine(
        folder / "model.nf4dq",
        {"adapter": folder / "adapter"},
        slots=max(BATCHES),
        quantize_head=True,
        dtype="bfloat16",
        max_length=LENGTH,
    )
    seeds = iter(range(1 << 30))

    def run(kind: str, size: int) -> float:
        if kind == "prefill":
            handle = engine.submit(prompt(size, next(seeds)), SamplingParams(1, ignore_end=True))
            return handle.result().seconds
        params = SamplingParams(1 + DECODED, ignore_end=True)  # the first token comes with the prompt
        adapter = "adapter" if kind == "adapter" else None
        before = engine.snapshot().seconds
        handles = [engine.submit(prompt(PROMPT, next(seeds)), params, adapter=adapter) for _ in range(size)]
        for handle in handles:
            handle.result()
        after = engine.snapshot().seconds
        return sum(after[part] - before[part] for part in ("step", "sampling"))

    return run


def llama_cpp_work(folder: Path) -> Work:
    """The same in llama.cpp, Q4_0, through its C interface: that of Python has one sequence at a time."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_seq_max, options.n_ctx, options.n_batch = max(BATCHES), LENGTH * max(BATCHES), CHUNK
    options.n_threads = options.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
    seeds = iter(range(1 << 30))

    def step(rows: Sequence[tuple[int, int, int]], wanted: int) -> None:
        """Tokens, with their positions and sequences; logits of the last `wanted` of them."""
        batch.n_tokens = len(rows)
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = row >= len(rows) - wanted
        assert not llama_cpp.llama_decode(context, batch), "llama.cpp cannot decode"
        llama_cpp.llama_synchronize(context)

    def run(kind: str, size: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if kind == "prefill":
            rows = [(token, at, 0) for at, token in enumerate(prompt(size, next(seeds)))]
            began = time.perf_counter()
            for first in range(0, size, CHUNK):
                step(rows[first : first + CHUNK], int(first + CHUNK >= size))
            return time.perf_counter() - began
        for sequence in range(size):
            step([(token, at, sequence) for at, token in enumerate(prompt(PROMPT, next(seeds)))], 1)
        began = time.perf_counter()
        for at, token in enumerate(prompt(DECODED)):
            step([(token, PROMPT + at, sequence) for sequence in range(size)], size)
        return time.perf_counter() - began

    return run


def transformers_work(folder: Path, quantized: bool) -> Work:
    """The same through transformers' model, in bitsandbytes' 4 bits or in dense bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=config if quantized else None, dtype=torch.bfloat16
    ).eval()
    if quantized:
        # Its kernel for answering rounds scales to bfloat16, and random weights make near ties: tokens may differ.
        ids = torch.tensor([prompt(PROMPT)])
        with torch.inference_mode():
            wanted, found = (
                model.train(mode)(ids, logits_to_keep=1).logits.float().flatten() for mode in (True, False)
            )
        assert torch.cosine_similarity(wanted, found, 0) > 0.99, "bitsandbytes' kernel for answering gives other logits"
    seeds = iter(range(1 << 30))

    def run(kind: str, size: int) -> float:
        if kind == "prefill":
            with torch.inference_mode():
                ids = torch.tensor([prompt(size, next(seeds))])
                began = time.perf_counter()
                model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
                return time.perf_counter() - began
        return median(greedy(model, DECODED if size == 1 else DECODED_TOGETHER, size)) * DECODED

    return run


def greedy(model: Any, count: int, size: int) -> list[float]:
    """Have transformers' model write after `size` prompts, a forward a token over its cache: the seconds of each."""
    import torch
    from transformers import DynamicCache

    cache, times = DynamicCache(config=model.config), []
    with torch.inference_mode():
        ids = torch.tensor([prompt(PROMPT, seed) for seed in range(size)])
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        for _ in range(count):
            began = time.perf_counter()
            ids = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
            times.append(time.perf_counter() - began)
    return times


def contend(contender: str, folder: Path) -> None:
    """A contender's process: one line of work on standard input, its seconds on standard output."""
    if contender == "halfbyte":
        work = halfbyte_work(folder)
    elif contender == "llama.cpp":
        work = llama_cpp_work(folder)
    else:
        work = transformers_work(folder, contender == "bitsandbytes")
    print("ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        print(work(kind, int(size)), flush=True)


def check(folder: Path) -> tuple[int, int]:
    """Greedy tokens of the archive equal those of transformers in float32.

    Random weights make near-ties likely, so short answers are compared.

    Returns:
        Weights of all layers, and of the output layer.
    """
    import torch

    import halfbyte as hb
    from halfbyte.infer import SamplingParams

    model = hb.load_model(folder / "model.nf4dq", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    with hb.Engine(model, dtype="float32", max_length=64) as engine:
        ids = prompt(PROMPT)
        (answer,) = engine.generate([ids], SamplingParams(8, ignore_end=True))
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert [choice.token for choice in answer.choices] == wanted[0, PROMPT:].tolist(), "tokens differ"
    layers = sum(module.weight.numel() for module in model.modules() if hasattr(module, "compute_dtype"))
    return layers, model.lm_head.weight.numel()


def start(contender: str, folder: Path) -> subprocess.Popen[str]:
    """A contender's process, ready."""
    # The engine computes in a thread of its own. Threads that the loading thread left behind would spin beside it; the
    # command line sets the same. The others compute in the thread that loads, and spinning is best for them.
    policy = "PASSIVE" if contender == "halfbyte" else "ACTIVE"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": policy}
    arguments = [sys.executable, __file__, "--contend", contender, "--folder", str(folder)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None, f"{contender} failed"
    return process


def ask(process: subprocess.Popen[str], kind: str, size: int) -> float:
    """Seconds of one piece of work."""
    assert process.stdin is not None and process.stdout is not None
    print(kind, size, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def measure(folder: Path, contenders: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """The best seconds of each piece of work by contender; processes that wait are stopped, so that none spins."""
    import signal

    processes = {}
    for contender in contenders:
        processes[contender] = start(contender, folder)
        processes[contender].send_signal(signal.SIGSTOP)
    works = [("decode", batch) for batch in BATCHES] + [("adapter", 1)] + [("prefill", size) for size in PREFILLS]
    best: dict[str, dict[str, float]] = {contender: {} for contender in contenders}
    for _ in range(rounds):
        for kind, size in works:
            for contender, process in processes.items():
                if contender != "halfbyte" and kind == "adapter":
                    continue
                process.send_signal(signal.SIGCONT)
                took = ask(process, kind, size)
                process.send_signal(signal.SIGSTOP)
                name = f"{kind} {size}"
                best[contender][name] = min(best[contender].get(name, float("inf")), took)
    for process in processes.values():
        process.kill()
    return best


def limits(layers: int, head: int, reading: float, multiplying: float) -> Callable[[str, int], float]:
    """Tokens a second that a machine allows: weights read once a step, and all products, at its measured rates.

    Args:
        layers: weights of all layers.
        head: of the output layer, which a prompt needs for its last token only.
        reading: bytes a second.
        multiplying: operations a second.
    """
    nbytes = (layers + head) * NF4_BITS / 8

    def limit(kind: str, size: int) -> float:
        products = 2 * (size * layers + (1 if kind == "prefill" else size) * head) / multiplying
        return size / max(products, nbytes / reading)

    return limit


def compare(peers: Sequence[str], layers: int, rounds: int) -> dict[str, Any]:
    """Make the files, check, measure: what the last line says of it."""
    import torch

    import halfbyte as hb
    from halfbyte.models import quantize_to_archive
    from halfbyte.models.gguf import export_gguf

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "dense", layers)
        quantize_to_archive(folder / "dense", folder / "model.nf4dq", hb.HalfbyteConfig(compute_dtype="bfloat16"))
        write_adapter(folder / "adapter", folder / "model.nf4dq")
        weights = check(folder)
        if "llama.cpp" in peers:
            export_gguf(folder / "dense", folder / "model.gguf", "q4_0")
        reading, multiplying = memory_bandwidth(), gemm_rate(torch.bfloat16)
        best = measure(folder, ["halfbyte", *peers], rounds)
    limit, rates, most = limits(*weights, reading, multiplying), {}, {}
    for work in best["halfbyte"]:
        kind, size = work.split()[0], int(work.split()[1])
        tokens = size if kind == "prefill" else size * DECODED
        rates[work] = {contender: tokens / times[work] for contender, times in best.items() if work in times}
        most[work] = limit(kind, size)
    return {
        "tokens_per_second": rates,
        "limit": most,
        "read_bytes_per_second": reading,
        "multiply_flops": multiplying,
    }


def report(results: dict[str, Any], peers: Sequence[str]) -> None:
    """A table of all rates, with the machine's limit and the share of it that halfbyte reaches."""
    print(
        f"memory is read at {results['read_bytes_per_second'] / 1e9:.1f} GB/s, torch multiplies bf16 at "
        f"{results['multiply_flops'] / 1e9:.0f} GFLOP/s"
    )
    rows = []
    for work, rates in results["tokens_per_second"].items():
        ours, most = rates["halfbyte"], results["limit"][work]
        cells = [f"{rates[contender]:.1f}" if contender in rates else "" for contender in ("halfbyte", *peers)]
        ratios = [f"{ours / rates[peer]:.2f}" if peer in rates else "" for peer in peers]
        rows.append([work, *cells, *ratios, f"{most:.1f}", f"{ours / most:.0%}"])
    contenders = (f"{contender} tokens/s" for contender in ("halfbyte", *peers))
    print(table(["work", *contenders, *(f"x {peer}" for peer in peers), "limit", "share of it"], rows))


def main() -> None:
    """Measure and print, or draw what was printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--results", type=Path, help="what a run printed, to be drawn")
    parser.add_argument("--figure", type=Path, help="where to draw it, as PNG")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        return contend(options.contend, options.folder)
    if (options.results is None) != (options.figure is None):
        parser.error("--results and --figure belong together")
    if options.results is not None:
        return draw(json.loads(options.results.read_text(encoding="utf-8").splitlines()[-1]), options.figure)
    peers = [peer for peer in options.peers.split(",") if peer]
    missing = [peer for peer in peers if find_spec(PEERS[peer]) is None]
    for peer in missing:
        print(f"{peer} is left out: {PEERS[peer]} is not installed")
    peers = [peer for peer in peers if peer not in missing]
    results = compare(peers, options.layers, options.rounds)
    report(results, peers)
    finish("decode", results)


if __name__ == "__main__":
    main()
