"""The embeddings' output is made a leaf that needs a gradient in eager mode only, so that checkpoints can be traced.

Reentrant checkpoints compute no gradients of a layer whose inputs need none, though its adapters do. So transformers,
peft and trl call `enable_input_require_grads` wherever gradient checkpointing meets adapters, which hooks
`output.requires_grad_(True)` to the embeddings. torch.compile cannot trace that (a leaf in the middle of a graph), and
has no use for it: what it makes of a checkpoint finds the adapters itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

Hook = Callable[..., None]


def skip_in_traces(model: Any) -> None:
    """Let what `model.enable_input_require_grads()` hooks to the embeddings do nothing while torch.compile traces."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads = MethodType(_enable_input_require_grads, model)


def _enable_input_require_grads(self: Any) -> None:
    type(self).enable_input_require_grads(self)
    for handle in self._require_grads_hooks:
        hooks = handle.hooks_dict_ref()
        hooks[handle.id] = _untraced(hooks[handle.id])


def _untraced(hook: Hook) -> Hook:
    def call(module: Any, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            hook(module, args, output)

    return call
