"""What each number format costs in quality: perplexity of real models on TinyStories.

    python benchmarks/formats_fidelity.py

The order that the QLoRA paper reports (arXiv 2305.14314, table 2) has to appear on real weights: NF4 best of the
4-bit formats, and double quantization free. All linear layers but the head are quantized at block 64, everything is
computed in float32, and the text is cut into windows of 256 tokens.
"""

from __future__ import annotations

import torch
from _assets import assets, finish, table

from halfbyte.evaluate import perplexity
from halfbyte.models import HalfbyteConfig, load_model, load_tokenizer

MODELS = ("stories260K", "babyllama-105")
WINDOW = 256
FORMATS: dict[str, HalfbyteConfig | None] = {
    "unquantized": None,
    "INT4": HalfbyteConfig("int4", scale_bits=None),
    "FP4": HalfbyteConfig("fp4", scale_bits=None),
    "E2M1": HalfbyteConfig("e2m1", scale_bits=None),
    "NF4": HalfbyteConfig("nf4", scale_bits=None),
    "NF4 + double quantization": HalfbyteConfig("nf4", scale_bits=8),
    "NF4, 6-bit scales": HalfbyteConfig("nf4", scale_bits=6),
    "NF4, 4-bit scales": HalfbyteConfig("nf4", scale_bits=4),
    "INT8": HalfbyteConfig("int8", scale_bits=None),
}


def main() -> None:
    """Measure every format on every model and print the table."""
    text = (assets() / "text" / "tinystories.txt").read_text(encoding="utf-8")
    figures: dict[str, dict[str, float]] = {}
    rows = []
    for label, config in FORMATS.items():
        row = [label]
        for name in MODELS:
            folder = assets() / "models" / name
            model = load_model(folder, quantization=config, dtype=torch.float32)
            result = perplexity(model, load_tokenizer(folder), text, max_length=WINDOW, batch_size=16)
            figures.setdefault(name, {})[label] = result.perplexity
            bits = model.halfbyte_report.bits_per_weight
            row += [f"{result.perplexity:.4f}", f"{bits:.3f}" if bits else "32"]
        rows.append(row)
    header = ["weights"] + [text for name in MODELS for text in (f"{name}: perplexity", "bits a weight")]
    print(table(header, rows))
    for name, perplexities in figures.items():
        four_bit = {label: perplexities[label] for label in ("INT4", "FP4", "NF4")}
        assert min(four_bit, key=four_bit.__getitem__) == "NF4", f"{name}: NF4 is not the best 4-bit format: {four_bit}"
    finish("formats_fidelity", {"window": WINDOW, "perplexity": figures})


if __name__ == "__main__":
    main()
