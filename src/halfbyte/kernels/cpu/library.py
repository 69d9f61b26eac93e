"""The native library: found, checked, and given torch's threads.

`csrc/` is built when halfbyte is installed and lies beside this file. It has a C interface and links neither torch nor
Python; ctypes calls it and releases the GIL meanwhile. Whether it can run is decided here once, with a reason.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import env, threads
from halfbyte.errors import RequestError

FILE = Path(__file__).with_name("libhalfbyte_cpu.so")
# Written by hatch_build.py when there is no library: why, and what would help.
NOTE = Path(__file__).with_name("not_built.txt")
_ABI = 5  # HB_ABI in csrc/halfbyte.h

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16")  # numbered as in csrc/halfbyte.h
_REINSTALL = "run `pip install --force-reinstall --no-deps halfbyte`, or `pip install -e .` in a checkout"


class Weight(ctypes.Structure):
    """`hb_weight` of csrc/halfbyte.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scale_absmax", ctypes.c_void_p),
        ("scale_offset", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("scale_bits", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("scale_start", ctypes.c_int64),
    )


class Lora(ctypes.Structure):
    """`hb_lora` of csrc/halfbyte.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("scaling", ctypes.c_float),
    )


FEW_ROWS = 32  # HB_FEW_ROWS

_P, _I, _L, _W = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(Weight)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hb_abi": (_I, ()),
    "hb_has_isa": (_I, (_I,)),
    "hb_best_isa": (_I, ()),
    "hb_set_isa": (_I, (_I,)),
    "hb_set_openmp": (None, (_P,)),
    "hb_quantize": (None, (_I, _P, _I, _L, _L, _L, _P, _P)),
    "hb_quantize_scales": (None, (_I, _P, _L, _L, _P, _P)),
    "hb_dequantize": (None, (_I, _W, _L, _L, _L, _L, _L, _I, _P)),
    "hb_dequantize_rows": (None, (_I, _W, _L, _P, _L, _I, _P)),
    "hb_linear": (_I, (_I, _W, _L, _L, _P, _L, _I, _P, _P)),
    "hb_linear_lora": (_I, (_I, _W, _L, _L, _P, _L, _I, _P, ctypes.POINTER(Lora), _L, _P)),
    "hb_linear_grad_input": (_I, (_I, _W, _L, _L, _P, _L, _I, _P)),
    "hb_grouped_linear": (_I, (_I, _W, _L, _L, _L, _P, _P, _L, _I, _P)),
    "hb_grouped_linear_grad_input": (_I, (_I, _W, _L, _L, _L, _P, _P, _L, _I, _P)),
    "hb_cross_entropy": (None, (_I, _P, _I, _L, _L, _P, _I, _P)),
    "hb_rms_norm": (None, (_I, _P, _P, _I, _L, _L, ctypes.c_float, _P, _P)),
    "hb_rms_norm_grad": (None, (_I, _P, _P, _P, _P, _I, _L, _L, _P)),
    "hb_swiglu": (None, (_I, _P, _P, _I, _L, _P)),
    "hb_swiglu_grad": (None, (_I, _P, _P, _P, _I, _L, _P, _P)),
    "hb_rotary": (None, (_I, _P, _P, _P, _I, _L, _L, _L, _L, _I, _P)),
    "hb_decode": (_I, (_I, _P, _P)),
    "hb_adamw": (_I, (_I, _P, _L, _P)),
    "hb_adamw_norms": (_I, (_I, _P, _L, _P)),
    "hb_has_crc32": (_I, ()),
    "hb_crc32": (ctypes.c_uint32, (ctypes.c_uint32, _P, _L)),
    "hb_watch_mappings": (_I, (_P,)),
    "hb_watch_mapping": (_I, (_P, _L)),
    "hb_lost_of_mapping": (_L, (_I,)),
    "hb_forget_mapping": (None, (_I,)),
}


@dataclass
class Native:
    """The loaded library: its functions by name, the instruction set in use, and where its threads come from."""

    functions: dict[str, Callable[..., Any]]
    isa: str
    threads: str

    def use(self, isa: str) -> None:
        """Switch to another instruction set.

        Raises:
            RequestError: this build or this CPU does not have it.
        """
        if self.functions["hb_set_isa"](ISAS.index(isa)):
            raise RequestError(f"HALFBYTE_CPU_ISA={isa!r} is not possible here; {self._offered()}.")
        self.isa = isa

    def isas(self) -> tuple[str, ...]:
        """The instruction sets that this build and this CPU have."""
        return tuple(name for number, name in enumerate(ISAS) if self.functions["hb_has_isa"](number))

    def _offered(self) -> str:
        return "this build on this CPU has: " + ", ".join(self.isas())


@dataclass(frozen=True)
class Missing:
    """Why there is no native library, and what to do about it."""

    reason: str
    remedy: str


def load() -> Native | Missing:
    """Load the library and set it up.

    Raises:
        RequestError: HALFBYTE_CPU_ISA asks for something that this build or CPU does not have.
    """
    if not FILE.is_file():
        why = NOTE.read_text(encoding="utf-8").strip() if NOTE.is_file() else ""
        reason, _, remedy = why.partition("\n")
        return Missing(reason or "the native library was not built when halfbyte was installed", remedy or _REINSTALL)
    try:
        handle = ctypes.CDLL(str(FILE))
        functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
            functions[name] = function
    except (OSError, AttributeError) as error:
        return Missing(f"the native library cannot be loaded ({error})", _REINSTALL)
    if functions["hb_abi"]() != _ABI:
        return Missing("the native library is from another version of halfbyte", _REINSTALL)
    runtime = threads.openmp()
    region = None if runtime is None else ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    functions["hb_set_openmp"](region)
    found = "torch's OpenMP threads" if region else "one thread, because torch's OpenMP runtime was not found"
    native = Native(functions, "generic", found)
    wanted = env.cpu_isa()
    native.use(ISAS[functions["hb_best_isa"]()] if wanted == "auto" else wanted)
    return native
