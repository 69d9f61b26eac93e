"""What every test starts from: no network, one seed, one thread a worker, and the real models where there are any."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

# Before torch and the Hugging Face libraries are imported, which read these once. A test that starts a `halfbyte`
# process hands them on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HALFBYTE_CACHE"] = tempfile.mkdtemp(prefix="halfbyte-tests-")  # not the user's
atexit.register(shutil.rmtree, os.environ["HALFBYTE_CACHE"], ignore_errors=True)
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
# Where Triton's kernels are called, ours and others': on a card, or by its interpreter in a process started for that.
TRITON = ("tests/kernels/triton", "tests/nn/liger", "tests/infer/test_engine_on_triton")

if PARALLEL:
    torch.set_num_threads(1)  # the workers share the cores already


@pytest.hookimpl(tryfirst=True)  # before -m decides what to leave out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the assets, and skip what needs a GPU where there is none."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if not interpreted and any(folder in item.path.as_posix() for folder in TRITON):
            item.add_marker("gpu")
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker("assets")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # for libraries that draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 3.6 it takes an array of one number for a loop's end, which NumPy 2.4 no longer turns into a number."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real models and data (models/, text/, instruct/, eval/, tokenizers/)."""
    named = os.environ.get("HALFBYTE_ASSETS")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "assets"
    if not (folder / "models").is_dir():
        source = "HALFBYTE_ASSETS" if named else "HALFBYTE_ASSETS is not set and ../shared/assets"
        pytest.skip(f"no real models: {source} {'names' if named else 'is'} no folder with models/ in it")
    return folder


# A Llama small enough to train in a test, with a tokenizer that makes the traps visible: pad is the end token.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Characters, role tokens, pad = eos, and a template without generation markers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", *string.printable]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a random Llama (hidden 32, 2 layers) and the tiny tokenizer. Not to be written to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # a tied head of the usual 0.02 could not be sure of anything
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON lines and returns the path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
