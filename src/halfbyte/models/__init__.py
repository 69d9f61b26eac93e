"""Model folders in and out: streamed loading, saving, and the integration with transformers and peft.

Importing this package registers halfbyte with transformers.
"""

from halfbyte.models.adapters import combine_adapters, describe_adapter, pack_adapter, scale_adapter, unpack_adapter
from halfbyte.models.archive import quantize_to_archive, save_model
from halfbyte.models.archive_reader import Archive, describe, is_archive
from halfbyte.models.archive_writer import check_output_archive
from halfbyte.models.base_hash import base_hash, other_base, read_base, write_base
from halfbyte.models.checkpoint import Checkpoint, read_config
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.folder import quantize_to_folder
from halfbyte.models.loading import TASKS, load_config, load_model, load_tokenizer, resize_vocabulary, resolve
from halfbyte.models.loftq import init_loftq
from halfbyte.models.merge import MIN_SURVIVING_SHARE, Output, Source, merge_adapter
from halfbyte.models.quantizer import HalfbyteQuantizer
from halfbyte.models.saving import check_output_folder, new_folder
from halfbyte.models.sources import check_model_folder, open_checkpoint
from halfbyte.nn import QuantizationReport

__all__ = [
    "MIN_SURVIVING_SHARE",
    "TASKS",
    "Archive",
    "Checkpoint",
    "HalfbyteConfig",
    "HalfbyteQuantizer",
    "Output",
    "QuantizationReport",
    "Source",
    "base_hash",
    "check_model_folder",
    "check_output_archive",
    "check_output_folder",
    "combine_adapters",
    "describe",
    "describe_adapter",
    "init_loftq",
    "is_archive",
    "load_config",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "new_folder",
    "open_checkpoint",
    "other_base",
    "pack_adapter",
    "quantize_to_archive",
    "quantize_to_folder",
    "read_base",
    "read_config",
    "resize_vocabulary",
    "resolve",
    "save_model",
    "scale_adapter",
    "unpack_adapter",
    "write_base",
]
