"""A QLoRA training step of a whole model, beside peft LoRA in bfloat16 and bitsandbytes + peft, in one run.

    python benchmarks/train_step.py [--steps 5] [--length 512] [--layers 6]

The model is a Llama of 399 M parameters with random weights (hidden 2048, ffn 5632, 6 layers, 32 heads, 4 kv heads,
vocabulary 32,000), bfloat16; the adapter has rank 16 on all seven projections. A step is forward, backward and AdamW on
one sequence. Each contender runs in a process of its own, so that its peak resident size is its own: counted over the
process after its imports, loading included. Contenders take turns (round after round), so that a slow minute of the
machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _assets import finish, table
from _llama import write_llama

CONTENDERS = ("halfbyte", "bitsandbytes", "lora")
LABELS = {"halfbyte": "halfbyte QLoRA", "bitsandbytes": "bitsandbytes + peft QLoRA", "lora": "peft LoRA bf16"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(contender: str, folder: Path) -> Any:
    """The contender's base model."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if contender == "halfbyte":
        import halfbyte as hb

        return hb.load_model(folder, quantization=hb.HalfbyteConfig(compute_dtype="bfloat16"), dtype=torch.bfloat16)
    quantization = None
    if contender == "bitsandbytes":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)


def contend(contender: str, folder: Path, options: argparse.Namespace) -> None:
    """A contender's process: load, then one step for each line on standard input; prints JSON lines."""
    import peft
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import halfbyte.models

    assert halfbyte.models
    idle = resident("VmRSS")
    start = time.perf_counter()
    model = load(contender, folder)
    loaded = time.perf_counter() - start
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, 32_000, (1, options.length), generator=torch.Generator().manual_seed(0))
    print(json.dumps({"loaded": loaded}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss.item(), "peak": resident("VmHWM") - idle}), flush=True)


def resident(field: str) -> int:
    """Bytes that /proc says this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(checkpointing: bool, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All contenders in turns; seconds a step (median), peak bytes, seconds to load, first loss."""
    processes, results = {}, {}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--contender", contender, "--folder", str(folder)]
        command += ["--length", str(options.length), *(["--checkpointing"] if checkpointing else [])]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        pipe = subprocess.PIPE
        processes[contender] = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        results[contender] = [json.loads(processes[contender].stdout.readline())]
    for _ in range(options.steps + 1):  # the first is a warm-up
        for contender, process in processes.items():
            print("step", file=process.stdin, flush=True)
            results[contender].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return {
        contender: {
            "seconds": statistics.median(one["seconds"] for one in steps[2:]),
            "peak": max(one["peak"] for one in steps[1:]),
            "loaded": steps[0]["loaded"],
            "loss": steps[1]["loss"],
        }
        for contender, steps in results.items()
    }


def main() -> None:
    """Run both modes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        return contend(options.contender, options.folder, options)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), options.layers, max_position_embeddings=2048)
        for name, checkpointing in (("train step", False), ("with gradient checkpointing", True)):
            results[name] = run(checkpointing, Path(folder), options)
            losses = [one["loss"] for one in results[name].values()]
            # Quantization moves a random model's loss by far less than this; a wrong kernel moves it by more.
            assert max(losses) - min(losses) < 0.5, f"the contenders disagree about the loss: {losses}"
    report(results, options.length)


def report(results: dict[str, dict[str, dict[str, float]]], length: int) -> None:
    """Print both modes, with halfbyte's ratio to each peer."""
    rows = []
    for name, contenders in results.items():
        ours = contenders["halfbyte"]
        for contender, one in contenders.items():
            rows.append(
                [
                    name,
                    LABELS[contender],
                    f"{one['seconds']:.2f} s",
                    f"{length / one['seconds']:.0f}",
                    f"{one['seconds'] / ours['seconds']:.2f}x",
                    f"{one['peak'] / 1e9:.2f} GB",
                    f"{one['loaded']:.1f} s",
                ]
            )
    print(table(["", "contender", "a step", "tokens/s", "halfbyte is", "peak over idle", "load"], rows))
    finish("train_step", {"length": length, "results": results})


if __name__ == "__main__":
    main()
