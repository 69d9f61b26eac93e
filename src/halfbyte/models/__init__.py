"""Model folders in and out: streamed loading, saving, and the integration with transformers and peft.

Importing this package registers halfbyte with transformers.
"""

from halfbyte.models.checkpoint import Checkpoint, check_model_folder, open_checkpoint, read_config
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.loading import TASKS, load_model, load_tokenizer
from halfbyte.models.loftq import init_loftq
from halfbyte.models.quantizer import HalfbyteQuantizer
from halfbyte.models.saving import check_output_folder, new_folder, save_model
from halfbyte.nn import QuantizationReport

__all__ = [
    "TASKS",
    "Checkpoint",
    "HalfbyteConfig",
    "HalfbyteQuantizer",
    "QuantizationReport",
    "check_model_folder",
    "check_output_folder",
    "init_loftq",
    "load_model",
    "load_tokenizer",
    "new_folder",
    "open_checkpoint",
    "read_config",
    "save_model",
]
