"""Optimizers whose state is small: one AdamW step for float32, 8-bit and 4-bit states, in memory or paged."""

from halfbyte.optim.adamw import AdamW

__all__ = ["AdamW"]
