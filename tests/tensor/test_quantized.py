"""QuantizedTensor: bytes are never cast, a slice knows its parent, nothing is written in place."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import FormatError, ShapeError

SCALE_BITS = [None, 8, 6, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_rows(part, dense: torch.Tensor) -> None:
    """`part` is still packed and decodes to exactly these rows of its decoded parent."""
    assert type(part) is hb.QuantizedTensor and part.shape == dense.shape
    assert torch.equal(part.dequantize(), dense)


# ---------------------------------------------------------------------------------------------------------- slices
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(700, 33), (10, 37), (5, 7, 33)])
def test_a_slice_of_rows_keeps_offset_and_phase(format, scale_bits, shape):
    """Traps 7 and 8: rows straddle blocks, 700 x 33 has 722 scales in three second-level blocks; every cut is exact."""
    q = hb.quantize(torch.randn(shape) + 0.3, format, 32, scale_bits)
    dense = q.dequantize()
    for begin, end in [(0, 1), (1, 2), (2, 5), (shape[0] - 1, shape[0]), (shape[0] // 2, shape[0]), (3, 3)]:
        part = q[begin:end]
        assert_rows(part, dense[begin:end])
        if scale_bits is not None:
            assert part.scale_offset.data_ptr() == q.scale_offset.data_ptr()
        assert_rows(part[1:], dense[begin:end][1:])  # a slice of a slice


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_every_row_of_a_matrix_whose_rows_straddle_blocks(scale_bits):
    q = hb.quantize(torch.randn(300, 31), "nf4", 32, scale_bits)
    dense = q.dequantize()
    for row in range(0, 300, 7):
        assert_rows(q[row], dense[row])
        assert_rows(q[row - 300], dense[row])


def test_a_slice_shares_its_parents_bytes():
    q = hb.quantize(torch.randn(64, 64))
    part = q[16:32]
    assert part.codes.untyped_storage().data_ptr() == q.codes.untyped_storage().data_ptr()
    assert part.nbytes < q.nbytes / 3


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_experts_are_slices(scale_bits):
    """[experts, out, in] with 5 x 21 = 105 elements an expert: no expert begins with a block."""
    q = hb.quantize(torch.randn(6, 5, 21), "nf4", 32, scale_bits)
    dense, x = q.dequantize(), torch.randn(2, 21)
    for expert in range(6):
        assert_rows(q[expert], dense[expert])
        assert_rows(q[expert][2:4], dense[expert][2:4])
        assert torch.equal(nn.functional.linear(x, q[expert]), nn.functional.linear(x, dense[expert]))


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.split(4),
        lambda t: t.split([3, 3, 4]),
        lambda t: t.chunk(3),
        lambda t: t.tensor_split(3),
        lambda t: [t.narrow(0, 2, 5), t.select(0, 9), t[-3:], t[2:100]],
        lambda t: [t.view(-1), t.flatten(), t.reshape(37, 10), t.view(2, 5, 37), t.view(5, 2, 37)[3]],
    ],
)
def test_cuts_and_views_stay_packed(cut):
    q = hb.quantize(torch.randn(10, 37), "nf4", 32)
    for part, dense in zip(cut(q), cut(q.dequantize()), strict=True):
        assert_rows(part, dense)


@pytest.mark.parametrize(
    "look", [lambda t: t[:, 3:5], lambda t: t[::2], lambda t: t.T, lambda t: t.select(1, 3), lambda t: t.split(5, 1)[1]]
)
def test_what_packing_cannot_express_is_decoded(look):
    q = hb.quantize(torch.randn(10, 37), "nf4", 32)
    found = look(q)
    assert type(found) is torch.Tensor and torch.equal(found, look(q.dequantize()))


@pytest.mark.parametrize("wrong", [lambda t: t[10], lambda t: t.view(3, 3), lambda t: t.split([3, 3])])
def test_a_wrong_cut_is_torchs_own_error(wrong):
    q = hb.quantize(torch.randn(10, 37), "nf4", 32)
    with pytest.raises((IndexError, RuntimeError)):
        wrong(q)


# ----------------------------------------------------------------------------------------------- casts and copies
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cast", [lambda t, d: t.to(d), lambda t, d: t.to("cpu", d), lambda t, d: t.type(d), lambda t, d: t.to(dtype=d)]
)
def test_a_cast_changes_the_logical_dtype_and_no_byte(cast, dtype):
    """Trap 12."""
    q = hb.quantize(torch.randn(7, 33), "nf4", 32)
    moved = cast(q, dtype)
    assert type(moved) is hb.QuantizedTensor and moved.dtype == dtype
    assert {n: t.dtype for n, t in moved.inner_tensors.items()} == {n: t.dtype for n, t in q.inner_tensors.items()}
    assert moved.to(torch.float32).same_bytes(q)
    assert torch.equal(moved.dequantize(), q.dequantize(dtype))


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.float()]
)
def test_casting_a_module_changes_no_byte(cast):
    """Trap 12, the way it happens: model.half()."""
    layer = nn.Sequential(hb.Linear4bit.from_weight(torch.randn(5, 33), torch.randn(5)))
    before = {name: inner.clone() for name, inner in layer[0].weight.inner_tensors.items()}
    cast(layer)
    assert type(layer[0].weight) is hb.QuantizedTensor and layer[0].weight.dtype == layer[0].bias.dtype
    for name, inner in layer[0].weight.inner_tensors.items():
        assert torch.equal(inner, before[name]) and inner.dtype == before[name].dtype
    x = torch.randn(2, 33, dtype=layer[0].bias.dtype)
    assert layer(x).dtype == x.dtype


def test_copies_are_whole_and_apart():
    q = hb.quantize(torch.randn(7, 33), "nf4", 32, 6)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for copied in (q.clone(), copy.deepcopy(q), copy.deepcopy(nn.Parameter(q, requires_grad=False)), loaded):
        assert copied.same_bytes(q)
        assert copied.codes.data_ptr() != q.codes.data_ptr()
        copied.codes.zero_()
    assert q.codes.any()


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_goes_in_and_out(assign):
    source, target = (hb.Linear4bit.from_weight(torch.randn(5, 33)) for _ in range(2))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.weight.same_bytes(source.weight)


@pytest.mark.parametrize("spec", [("fp4", 32, 8), ("nf4", 64, 8), ("nf4", 32, None)])
def test_a_state_of_another_encoding_is_refused(spec):
    target = nn.Linear(33, 5, bias=False)
    target.weight = nn.Parameter(hb.quantize(torch.randn(5, 33), "nf4", 32, 8), requires_grad=False)
    before = target.weight.clone()
    for wrong in (hb.quantize(torch.randn(5, 33), *spec), torch.randn(5, 33)):
        with pytest.raises(RuntimeError, match="would write into a quantized tensor"):
            target.load_state_dict({"weight": wrong})
    assert target.weight.same_bytes(before)


# ------------------------------------------------------------------------------------------------- frozen storage
def test_every_way_to_write_raises_and_changes_nothing():
    q = hb.quantize(torch.randn(7, 33), "nf4", 32)
    before, dense = q.clone(), torch.randn(7, 33)
    writes = {
        "add_": lambda: q.add_(1),
        "mul_ of a slice": lambda: q[1:3].mul_(2),
        "zero_": lambda: q.zero_(),
        "copy_": lambda: q.copy_(dense),
        "init": lambda: nn.init.normal_(q),
        "item": lambda: q.__setitem__(0, 1.0),
        "out": lambda: torch.add(dense, dense, out=q),
        "-=": lambda: q.__isub__(dense),
        "data": lambda: setattr(q, "data", dense),
        "data of a parameter": lambda: setattr(nn.Parameter(q, requires_grad=False), "data", dense),
    }
    for name, write in writes.items():
        with pytest.raises(ShapeError, match="frozen"):
            write()
            pytest.fail(name)
    assert q.same_bytes(before)


def test_reading_copies_out():
    q, dense = hb.quantize(torch.randn(7, 33)), torch.empty(7, 33)
    assert torch.equal(dense.copy_(q), q.dequantize())


def test_other_operations_see_the_decoded_values():
    q = hb.quantize(torch.randn(7, 33), "nf4", 32)
    dense, x = q.dequantize(), torch.randn(33)
    for operation in (lambda t: t @ x, lambda t: t + 1, lambda t: t.norm(dim=1), lambda t: torch.cat([t, t])):
        assert torch.equal(operation(q), operation(dense))
    for like in (torch.empty_like, torch.zeros_like):
        assert type(like(q)) is torch.Tensor and like(q).shape == q.shape and like(q).dtype == q.dtype
    assert torch.equal(q, q.clone()) and torch.equal(q, dense) and not torch.equal(q, dense + 1)


def test_same_bytes_looks_at_everything():
    w = torch.randn(6, 33)
    q = hb.quantize(w)
    assert q.same_bytes(hb.quantize(w))
    others = [hb.quantize(w, "fp4"), hb.quantize(w, block_size=32), hb.quantize(w, scale_bits=6), q.bfloat16(), q[1:]]
    assert not any(q.same_bytes(other) for other in [*others, q.view(33, 6)])
    for name in q.inner_tensors:
        changed = q.clone()
        getattr(changed, name).view(-1).view(torch.uint8)[0] ^= 1
        assert not q.same_bytes(changed), name


# ------------------------------------------------------------------------------------------------------ embedding
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_lookup_is_the_dense_rows(scale_bits, dtype):
    table = nn.Embedding(37, 33, padding_idx=3)
    q = hb.quantize(table.weight.to(dtype), "nf4", 64, scale_bits)
    table.weight = nn.Parameter(q, requires_grad=False)
    for index in (torch.tensor([[0, 36], [3, 3]]), torch.tensor(5), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(table(index), q.dequantize()[index])
    part = nn.functional.embedding(torch.tensor([0, 4]), q[20:30])  # a shard of the table
    assert torch.equal(part, q.dequantize()[[20, 24]])


def test_an_embedding_that_rewrites_its_rows_is_refused():
    table = nn.Embedding(7, 32, max_norm=1.0)
    table.weight = nn.Parameter(hb.quantize(table.weight), requires_grad=False)
    with pytest.raises(ShapeError, match="max_norm"):
        table(torch.tensor([1]))


# ------------------------------------------------------------------------------------------------ sizes and errors
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_bytes_are_counted_from_the_inner_tensors(format, scale_bits):
    q = hb.quantize(torch.randn(1024, 1024), format, 64, scale_bits)
    # 16,384 scales fill their blocks: only the offset, 4 bytes, comes on top of the nominal size.
    offset = 0 if scale_bits is None else 32 / q.numel()
    assert q.bits_per_weight == pytest.approx(q.spec.nominal_bits() + offset, rel=1e-12)
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in q.inner_tensors.values())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
def test_empty_and_scalar_tensors(shape):
    w = torch.full(shape, -2.5)
    q = hb.quantize(w)
    assert torch.equal(q.dequantize(), w) and q.dequantize().shape == shape
    assert "bits a weight" in repr(q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 70, 129])
def test_nan_and_inf_are_refused_with_their_place(bad, at):
    w = torch.randn(130)  # the last block is partial
    w[at] = bad
    with pytest.raises(FormatError, match=f"NaN or Inf .*elements {at // 64 * 64} "):
        hb.quantize(w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(FormatError, match=f"{dtype}; choose one of: float32, bfloat16, float16"):
        hb.quantize(torch.ones(4).to(dtype))


def test_shapes_that_do_not_fit_are_told():
    with pytest.raises(ShapeError, match=r"\(2, 32\) by a weight of \(7, 33\)"):
        nn.functional.linear(torch.ones(2, 32), hb.quantize(torch.randn(7, 33)))


def test_quantizing_changes_neither_the_argument_nor_its_gradient_flag():
    w = nn.Parameter(torch.randn(7, 33))
    before = w.detach().clone()
    q = hb.quantize(w)
    assert torch.equal(w, before) and w.requires_grad and not q.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_product(dtype):
    layer = hb.Linear4bit.from_weight(torch.randn(5, 33), torch.randn(5))
    x = torch.randn(2, 33)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, nn.functional.linear(x.to(dtype), layer.weight.dequantize(dtype), layer.bias.to(dtype)))


def test_share_memory_moves_the_inner_tensors():
    """The wrapper has no storage of its own; torch's own method would touch a null one."""
    q = hb.quantize(torch.randn(5, 33))
    dense = q.dequantize()
    assert q.share_memory_() is q and q.is_shared() and torch.equal(q.dequantize(), dense)


def test_data_may_be_set_to_the_same_bytes_under_another_dtype():
    """peft's prepare_model_for_kbit_training does this with every 16-bit parameter."""
    q = nn.Parameter(hb.quantize(torch.randn(5, 33, dtype=torch.bfloat16)), requires_grad=False)
    codes = q.codes
    q.data = q.data.to(torch.float32)
    assert q.dtype == torch.float32 and q.codes is codes and q.dequantize().dtype == torch.float32
    with pytest.raises(ShapeError, match="frozen"):
        q.data = hb.quantize(torch.randn(5, 33))
