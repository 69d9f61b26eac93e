"""Optimizers whose state is small: one AdamW step for float32, 8-bit and 4-bit states, in memory or paged.

`GaLoreAdamW` is the same on projected gradients.
"""

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.galore import GaLoreAdamW

__all__ = ["AdamW", "GaLoreAdamW"]
