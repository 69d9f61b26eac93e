"""An archive of which half fits: its answers are the same, and the rest comes from the disk for each token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.models import HalfbyteConfig, quantize_to_archive

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "larger_than_memory.py"
MIB = 2**20


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """50 MiB, nearly all of it layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        vocab_size=128,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    quantize_to_archive(folder / "dense", folder / "model.nf4dq", HalfbyteConfig(compute_dtype="bfloat16"))
    return folder / "model.nf4dq"


def test_a_model_that_does_not_fit_answers_as_one_that_does(archive):
    """The benchmark itself compares the tokens; it says why where no memory cgroup can be made."""
    command = [sys.executable, str(SCRIPT), "--model", str(archive), "--share", "0", "--tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if "benchmark skipped" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert set(results) == {"offload", "system"}
    for kind, seen in results.items():
        room = seen["limit_bytes"] - seen["own_bytes"]
        assert room < seen["file_bytes"] / 1.5
        assert seen["held_bytes"] <= seen["limit_bytes"]
        assert (seen["offloaded_bytes"] > 0) == (kind == "offload")
        # What does not fit has to be read again for each token; the embeddings are 1 MiB that nobody needs in whole.
        assert seen["read_a_token"] > seen["file_bytes"] - room - 2 * MIB
        assert seen["tokens_per_second"] > 0
