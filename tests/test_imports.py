"""What `import halfbyte` costs: nothing heavy, and every public name is where it is said to be."""

from __future__ import annotations

import subprocess
import sys

import pytest

import halfbyte

HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "scipy")


def loaded_after(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_halfbyte_is_nearly_free():
    loaded = loaded_after("import halfbyte")
    assert not loaded & {*HEAVY, "torch", "numpy", "pydantic"}


@pytest.mark.parametrize(
    "statement",
    [
        "from halfbyte import quantize, QuantizedTensor, Linear4bit, quantize_model, distortion",
        "import halfbyte.errors, halfbyte.env, halfbyte.formats, halfbyte.kernels, halfbyte.tensor, halfbyte.nn",
    ],
)
def test_quantizing_a_tensor_needs_torch_and_little_else(statement):
    loaded = loaded_after(statement)
    assert "torch" in loaded and not loaded & set(HEAVY)


def test_every_public_name_exists_and_an_unknown_one_is_an_attribute_error():
    assert all(getattr(halfbyte, name) is not None for name in halfbyte.__all__)
    assert set(halfbyte.__all__) <= set(dir(halfbyte))
    with pytest.raises(AttributeError, match="quantise"):
        halfbyte.quantise  # noqa: B018
