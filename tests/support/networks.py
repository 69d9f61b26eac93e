"""Random networks of the Llama family, in shapes that do not divide evenly."""

from __future__ import annotations

import torch

import halfbyte as hb
from halfbyte.kernels.decoder import Branch, Layer, Matrix, Network

VOCABULARY = 97
SHAPES = {  # hidden, ffn, heads, kv_heads, head_dim
    "one head of keys for all": (64, 128, 4, 1, 16),
    "as many": (128, 64, 3, 3, 32),
    "groups of two": (64, 192, 4, 2, 20),
    "groups of seven": (128, 320, 7, 1, 24),
    "ffn below hidden": (192, 64, 6, 2, 64),
    "groups of eight": (64, 128, 16, 2, 8),
}


def matrix(n, k, packed=True, bias=False, block_size=64):
    weight = torch.randn(n, k) / k**0.5
    quantized = hb.quantize(weight, block_size=block_size).packed() if packed else weight
    return Matrix(quantized, n, k, torch.randn(n) if bias else None)


def network(shape, *, layers=2, positions=160, window=0, norms=False, bias=False, packed=True, activation="silu"):
    hidden, ffn, heads, kv_heads, dim = SHAPES[shape]
    angles = torch.randn(positions, dim // 2).repeat(1, 2)

    def layer(number):
        shapes = {
            "query": (heads * dim, hidden),
            "key": (kv_heads * dim, hidden),
            "value": (kv_heads * dim, hidden),
            "output": (hidden, heads * dim),
            "gate": (ffn, hidden),
            "up": (ffn, hidden),
            "down": (hidden, ffn),
        }
        return Layer(
            # What the few-row products do not take is dense, and members of a group may differ in how they are packed.
            {
                name: matrix(n, k, packed and k % 64 == 0, bias, 32 if name in ("value", "up") and number else 64)
                for name, (n, k) in shapes.items()
            },
            1 + 0.1 * torch.randn(hidden),
            1 + 0.1 * torch.randn(hidden),
            1 + 0.1 * torch.randn(dim) if norms else None,
            1 + 0.1 * torch.randn(dim) if norms else None,
            window,
        )

    return Network(
        table=torch.randn(VOCABULARY, hidden),
        embedding_scale=1.5,
        layers=[layer(number) for number in range(layers)],
        final_norm=1 + 0.1 * torch.randn(hidden),
        head=matrix(VOCABULARY, hidden, packed=packed),
        cosine=angles.cos().contiguous(),
        sine=angles.sin().contiguous(),
        heads=heads,
        kv_heads=kv_heads,
        eps=1e-5,
        attention_scale=dim**-0.5,
        activation=activation,
    )


def branches(net, rank, dtype=torch.float32, skip=()):
    return {
        (number, name): Branch(
            (torch.randn(rank, m.k) / m.k**0.5).to(dtype), (torch.randn(m.n, rank) / max(rank, 1) ** 0.5).to(dtype)
        )
        for number, layer in enumerate(net.layers)
        for name, m in layer.matrices.items()
        if name not in skip
    }


def moved(value, device):
    """A network with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if hasattr(value, "_replace"):
        return type(value)(*(moved(item, device) for item in value))
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: moved(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value
