"""GGUF, the file that llama.cpp runs: models and LoRA adapters out, in this process, with the gguf package."""

from halfbyte.models.gguf.adapter import export_adapter
from halfbyte.models.gguf.architectures import ARCHITECTURES
from halfbyte.models.gguf.model import export_gguf
from halfbyte.models.gguf.writing import TYPES, Written

__all__ = ["ARCHITECTURES", "TYPES", "Written", "export_adapter", "export_gguf"]
