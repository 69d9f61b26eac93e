"""PTX that no machine without a card runs, instruction by instruction, and the table that it reads.

`run` is one thread of a machine that knows the few instructions in use: integers wrap at 32 or 64 bits, numbers are
float32, registers hold bits, memory is a dictionary by address, of words.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.formats import get_codebook
from halfbyte.kernels import reference, tuning
from halfbyte.kernels.triton import pairs, weights

Memory = dict[int, int]
BASE, TABLE = 1024, 1 << 40  # where shared memory begins on some cards; an address that needs more than 32 bits
FOUR_BITS = ("nf4", "fp4", "int4")


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def _number(bits: int) -> np.float32:
    return np.uint32(bits & 0xFFFFFFFF).view(np.float32)


def _prmt(a: int, b: int, selector: int) -> int:
    """Four bytes of eight, by the nibbles of a selector; a nibble of 8 or more would repeat a sign."""
    source = (a & 0xFFFFFFFF | (b & 0xFFFFFFFF) << 32).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    assert max(nibbles) < 8, f"{selector:x} repeats signs"
    return int.from_bytes(bytes(source[nibble] for nibble in nibbles), "little")


def _fma(a: int, b: int, c: int) -> int:
    return _bits(float(_number(a)) * float(_number(b)) + float(_number(c)))


INTEGERS = {
    "mov.u32": lambda a: a,
    "mov.f32": lambda a: a,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
    "fma.rn.f32": _fma,
}


def run(
    program: str,
    operands: dict[int, int],
    shared: Memory,
    memory: Memory | None = None,
    special: dict[str, int] | None = None,
) -> dict[int, int]:
    """What the outputs of a program hold; `operands` by their number, special registers by their name."""
    registers: dict[str, Any] = {f"${number}": value for number, value in operands.items()} | (special or {})
    text = re.sub(r"//[^\n]*", "", program).strip()
    assert text.count("{") == text.count("}"), "braces"
    for line in filter(None, (part.strip().lstrip("{").strip() for part in re.split(r";", text))):
        if line == "}" or line.startswith((".reg", ".shared", "bar.sync")):
            continue
        guard, line = re.fullmatch(r"(?:@(\w+)\s+)?(.*)", line, re.S).groups()
        if guard and not registers[guard]:
            continue
        name, rest = line.split(None, 1)
        places = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        _step(name, places, registers, shared, memory or {})
    return {int(name[1:]): value for name, value in registers.items() if name.startswith("$")}


def _step(name: str, places: list[str], registers: dict[str, Any], shared: Memory, memory: Memory) -> None:
    def value(place: str) -> int:
        return registers[place] if place in registers else int(place, 0)

    def address(place: str) -> int:
        base, _, offset = place.strip("[]").partition("+")
        return value(base) + int(offset or 0)

    def each(place: str) -> list[str]:
        return [one.strip() for one in place.strip("{}").split(",")]

    if name.startswith("ld."):
        space = shared if name.startswith("ld.shared") else memory
        words = each(places[0])
        assert len(words) == (4 if ".v4" in name else 1) and address(places[1]) % (4 * len(words)) == 0, name
        for index, register in enumerate(words):
            registers[register] = space[address(places[1]) + 4 * index]
    elif name.startswith("st.shared"):
        words = each(places[1])
        assert len(words) == (4 if ".v4" in name else 1) and address(places[0]) % (4 * len(words)) == 0, name
        for index, register in enumerate(words):
            shared[address(places[0]) + 4 * index] = value(register)
    elif name in ("setp.ne.b32", "setp.eq.u32"):
        registers[places[0]] = (value(places[1]) == value(places[2])) == (".eq" in name)
    elif name == "cp.async.bulk.prefetch.L2.global":
        shared[address(places[0])] = value(places[1])  # what was asked for
    elif name == "mad.wide.u32":
        registers[places[0]] = (value(places[1]) * value(places[2]) + value(places[3])) & (1 << 64) - 1
    else:
        registers[places[0]] = INTEGERS[name](*map(value, places[1:])) & 0xFFFFFFFF


def entries(format: str = "nf4") -> list[int]:
    return (pairs.pair_table(format, "cpu").long() & 0xFFFFFFFF).tolist()


def filled(format: str = "nf4") -> dict[int, int]:
    """Shared memory after every thread of a program has written its part of the table."""
    shared: dict[int, int] = {}
    memory = {TABLE + 4 * index: entry for index, entry in enumerate(entries(format))}
    for thread in range(32 * pairs.WARPS):
        special = {"%tid.x": thread, "pairs": BASE}
        found = run(pairs.ALLOCATE.value, {1: TABLE}, shared, memory, special)
        assert found[0] == BASE
    return shared


def test_every_bank_has_the_whole_table():
    shared = filled()
    assert len(shared) == 256 * 32 and max(shared) < BASE + pairs.TABLE_BYTES.value
    for byte, entry in enumerate(entries()):
        assert all(shared[BASE + 128 * byte + 4 * lane] == entry for lane in range(32)), byte


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.lists(st.integers(-64, 64), min_size=8, max_size=8))
def test_products_of_a_word(word, lane, factors):
    """Eight codes by eight numbers, all of them in one bank; the codes in the order of `formats.packing`."""
    shared = {BASE + 128 * byte + 4 * lane: entry for byte, entry in enumerate(entries())}
    (copies,) = (run(pairs.LANE.value, {1: BASE}, {}, special={"%laneid": lane})[0],)
    operands = {1: _bits(3.0), 2: word, 3: copies}
    operands |= {4 + index: _bits(factor) for index, factor in enumerate(factors)}
    found = _number(run(pairs.DOT.value, operands, shared)[0])
    values = pairs.pair_values("nf4")[list(word.to_bytes(4, "little"))].flatten().double()
    terms = values * torch.tensor(factors, dtype=torch.float64)
    # Eight additions, each rounded once, of partial sums that the magnitudes bound.
    assert abs(found - (3 + terms.sum())) <= 8 * 2.0**-24 * (3 + terms.abs().sum())


@given(st.integers(1, pairs.CHUNK.value // 32))
@settings(max_examples=20, deadline=None)
def test_x_is_read_where_it_was_put(thirty_twos):
    """Numbers go through the shared memory to the thread that has their columns; behind the last are zeros."""
    k = 32 * thirty_twos
    x = np.arange(1, k + 1, dtype=np.uint16)
    memory = {TABLE + 4 * index: int(word) for index, word in enumerate(x.view(np.uint32))}
    shared: dict[int, int] = {}
    for chunk in range(pairs.CHUNK.value // 8):
        step, unit = divmod(chunk, pairs.STEP.value // 8)
        column = 8 * chunk
        to = BASE + int(pairs.place_of.fn(step, unit))
        run(pairs.STAGE.value, {1: to, 2: TABLE + 2 * column, 3: int(column < k)}, shared, memory)
    for step in range(pairs.CHUNK.value // pairs.STEP.value):
        for lane in range(32):
            for unit in range(8):
                at = BASE + pairs.TABLE_BYTES.value + step * 2 * pairs.STEP.value + lane * 16 + unit * 512
                found = run(pairs.FETCH.value, {4: at}, shared)
                column = step * pairs.STEP.value + lane * 64 + unit * 8
                words = np.array([found[index] for index in range(4)], dtype=np.uint32).view(np.uint16)
                expected = np.arange(column + 1, column + 9) * (np.arange(column, column + 8) < k)
                assert (words == expected).all(), (step, lane, unit)


def test_one_thread_of_a_warp_asks_for_a_row():
    for lane in range(32):
        asked: Memory = {}
        run(pairs.PREFETCH.value, {1: TABLE + 48, 2: lane, 3: 2064}, asked)
        assert asked == ({} if lane else {TABLE + 48: 2064})


def test_the_program_waits_before_it_reads():
    assert pairs.SYNCHRONIZE.value.startswith("bar.sync 0;")
    assert run(pairs.SYNCHRONIZE.value, {1: 77}, {})[0] == 77


@pytest.mark.parametrize("format", FOUR_BITS)
def test_values_of_a_pair(format):
    """The earlier one is bfloat16's nearest; the later one as near as 16 bits in front of the other's allow."""
    table = get_codebook(format).table()
    values = pairs.pair_values(format).view(16, 16, 2)
    assert torch.equal(values[..., 0], table.bfloat16().float()[:, None].expand(16, 16))
    error = (values[..., 1] - table).abs()
    assert (error <= 2.0**-8 * table.abs() + 2.0**-126).all()
    low = pairs.pair_table(format, "cpu").view(16, 16) & 0xFFFF
    for offset in (-0x10000, 0x10000):  # neither neighbour is nearer
        bits = values[..., 1].contiguous().view(torch.int32)
        other = torch.where((bits & 0x7FFF0000) + offset < 0, bits, bits + offset).view(torch.float32)
        assert (error <= (other - table).abs()).all()
    assert torch.equal(values[..., 1].contiguous().view(torch.int32) & 0xFFFF, low)


@given(st.integers(0, 2**32 - 1), st.integers(0, 31))
@settings(max_examples=30, deadline=None)
def test_a_shuffled_lookup(word, shift):
    """The lanes hold the table twice over: what a code's neighbour leaves in the fifth bit selects the same value."""
    table = get_codebook("nf4").table()
    lanes = []
    for lane in range(32):
        memory = {TABLE + 4 * index: _bits(value) for index, value in enumerate(table.tolist())}
        lanes.append(run(weights.LANE_VALUE.value, {1: TABLE}, {}, memory, {"%laneid": lane})[0])
    chosen = word >> shift & 31  # shfl.sync.idx with a mask of 0x1f takes the lane of the lower five bits
    assert "0x1f, 0xffffffff" in weights.SHUFFLED.value
    assert _number(lanes[chosen]) == table[word >> shift & 15]


WAYS = {
    "pairs": {"pairs": True},
    "vector": {},
    "tiles": {"vector_rows": 0, "few": tuning.Tile(16, 32, 64, 4, 2), "programs": 0},
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70), k=st.integers(1, 140).map(lambda some: 32 * some), block_size=st.sampled_from([32, 64, 4096])
)
@example(n=1, k=32, block_size=64)
@example(n=33, k=4128, block_size=32)
@example(n=3, k=6176, block_size=4096)
@example(n=65, k=2112, block_size=64)
def test_rows_and_columns_that_end_inside_a_program(ops, device, cast, way, n, k, block_size):
    """And x of more than one chunk, rows that begin inside a block, and a weight that is its storage's last rows."""
    q = hb.quantize(torch.randn(n + 1, k) / k**0.5, "nf4", block_size).to(device).rows(1, n + 1)
    x = torch.randn(1, k, device=device).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        for capability, line in list(tuning.GPU_TUNING.items()):
            patch.setitem(tuning.GPU_TUNING, capability, dataclasses.replace(line, **WAYS[way]))
        y = ops["linear"](*q.packed(), n, x, None)
    weight = multiplied(q, way, cast)
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    # A sum in float32 of k terms, and the result is rounded, or by the interpreter cut off, to bfloat16.
    assert ((y - exact).abs() <= (k + 8) * 2.0**-23 * magnitude + 2.0**-7 * exact.abs()).all()


def multiplied(q, way, cast):
    """What that way multiplies by, float64: the weight in float32, rounded to bfloat16, or with rounded values."""
    n, k = q.shape
    packed = q.packed()
    weight = reference.OPS["dequantize"](*packed, [n, k], torch.float32)
    if way == "vector":
        return weight.double()
    if way == "tiles":
        return cast(weight, torch.bfloat16).double()
    ones = packed._replace(codes=torch.full_like(packed.codes, 0xFF))  # NF4's last value is 1
    scales = reference.OPS["dequantize"](*ones, [n, k], torch.float32)
    values = pairs.pair_values("nf4").to(weight.device)[packed.codes.long()].flatten()
    return values[packed.start :][: n * k].view(n, k).double() * scales.double()
