"""What tests of the native kernels share."""

from __future__ import annotations

import pytest

from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.library import Native

NATIVE = cpu.native_library()


@pytest.fixture(params=NATIVE.isas() if isinstance(NATIVE, Native) else ())
def isa(request):
    """Every instruction set of this CPU in turn; afterwards the one that was chosen."""
    before = NATIVE.isa
    NATIVE.use(request.param)
    yield request.param
    NATIVE.use(before)
