"""The ops: `torch.ops.halfbyte.*`.

`schema` is their contract, `reference` the implementation that runs anywhere, `autograd` their gradients, `registry`
the choice between implementations. Importing this package registers all of it with torch, once.
"""

from halfbyte.kernels import autograd as autograd
from halfbyte.kernels.registry import Choice, install
from halfbyte.kernels.schema import PackedWeight

_CHOICES = install()


def chosen() -> tuple[Choice, ...]:
    """Which implementation serves each op in this process, with its reason."""
    return _CHOICES


__all__ = ["Choice", "PackedWeight", "chosen"]
