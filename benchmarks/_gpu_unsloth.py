"""A training step in Unsloth: python _gpu_unsloth.py FOLDER ACTIVATIONS SECONDS DEVICE LENGTH; last line JSON.

Run by `_gpu_training.py`. Unsloth has to be imported before transformers, which it changes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

# kept, checkpointed, or checkpointed with what layers begin from in the machine's memory.
CHECKPOINTING: dict[str, Any] = {"kept": False, "checkpointed": True, "offloaded": "unsloth"}


def main(folder: str, activations: str, seconds: float, device: str, length: int) -> dict[str, Any]:
    """Load, add adapters of rank 16 to all projections, and take steps."""
    end = time.monotonic() + seconds
    from unsloth import FastLanguageModel  # isort: skip  first, as it asks for

    import torch
    from _gpu_models import PROJECTIONS
    from _gpu_training import timed_steps

    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        fix_tokenizer=False,
        use_gradient_checkpointing=CHECKPOINTING[activations],
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=PROJECTIONS,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=CHECKPOINTING[activations],
        random_state=0,
    )
    return timed_steps(model.train(), device, end, length)


if __name__ == "__main__":
    try:
        given_folder, given_activations, given_seconds, given_device, given_length = sys.argv[1:]
        line = main(given_folder, given_activations, float(given_seconds), given_device, int(given_length))
    except Exception as error:
        said = str(error).strip().splitlines()
        line = {"why not": f"{type(error).__name__}: {said[0][:200] if said else ''}"}
    print("\n" + json.dumps(line))
