"""The readers under a coverage-guided fuzzer: any bytes are read, or refused in one line.

    python tests/fuzz/fuzz_readers.py TARGET [SECONDS] [CORPUS_OUT]     (see `make fuzz`; needs atheris)

A find is written to build/fuzz/ and ends the run; the input's path is printed last. What was interesting is kept in
CORPUS_OUT, which is build/fuzz/TARGET unless it is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
# What a file says about itself, for the fuzzer to put where it likes.
WORDS = """offset nbytes crc32 zstd chunk frames dtype shape data format block_size packing high-first scale_bits
scale_block scale_offset scale_absmax codes scales same_as tied generator codebooks scale_tables files tensors float32
bfloat16 float16 float64 int64 bool nf4 fp4 e2m1 int4 int8 data_offsets __metadata__ weight_map metadata BF16 F32 U8 I64
quant_type blocksize nested_blocksize nested_dtype nested_offset absmax quant_map nested_absmax nested_quant_map"""

sys.path.insert(0, str(HERE))
import torch  # noqa: E402
import transformers  # noqa: E402, F401  (first, so that it is not instrumented)

torch.set_num_threads(1)
with atheris.instrument_imports(
    include=["halfbyte.models", "halfbyte.tensor.layout", "readers"], enable_loader_override=False
):
    import readers

atheris.instrument_func(readers.numpy_reader.Archive._check)
for name in ("__init__", "__getitem__", "scales", "_decode", "_sections"):
    setattr(readers.numpy_reader.Archive, name, atheris.instrument_func(getattr(readers.numpy_reader.Archive, name)))


def main() -> None:
    """Fuzz one target for some seconds."""
    target, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60
    build = HERE.parents[1] / "build" / "fuzz"
    out = Path(sys.argv[3]) if len(sys.argv) > 3 else build / target
    start = build / "seeds" / target
    for folder in (out, start):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(readers.seeds(start)[target]):
        (start / f"seed-{number}").write_bytes(data)
    dictionary = build / "words"
    dictionary.write_text("".join(f'"\\"{word}\\""\n' for word in WORDS.split()))
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={build}/",
        f"-dict={dictionary}",
        "-max_len=20000",
        "-timeout=20",
        "-rss_limit_mb=4000",
        "-malloc_limit_mb=1000",
        "-print_final_stats=1",
    ]
    kept = [str(folder) for folder in (HERE / "corpus" / target, start) if folder.is_dir()]
    atheris.Setup([sys.argv[0], *options, str(out), *kept], readers.run(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
