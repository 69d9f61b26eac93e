"""The decoder step on the native library: one call a step.

Every tensor's dtype, shape, contiguity and device is checked when the decoder is made; a step checks what changes. The
C structs hold addresses of tensors that this object keeps alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import ShapeError
from halfbyte.kernels.cpu.library import Lora, Native, Weight
from halfbyte.kernels.cpu.ops import packed_weight, takes_few_rows
from halfbyte.kernels.decoder import (
    ACTIVATIONS,
    KEY_BLOCK,
    MATRICES,
    PARTS,
    Branch,
    Branches,
    Cache,
    Enter,
    Layer,
    Matrix,
    Mix,
    Network,
    Step,
)
from halfbyte.kernels.schema import PackedWeight
from halfbyte.kernels.tuning import FLOAT_ROWS

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # enum hb_dtype, and HB_INT8


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.POINTER(Weight)),
        ("dense", _P),
        ("bias", _P),
        ("loras", ctypes.POINTER(Lora)),
        ("n", _L),
        ("k", _L),
        ("dense_dtype", _I),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in MATRICES),
        ("attention_norm", _P),
        ("mlp_norm", _P),
        ("query_norm", _P),
        ("key_norm", _P),
        ("window", _L),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("final_norm", _P),
        ("cosine", _P),
        ("sine", _P),
        ("head", _Matrix),
        *((name, _L) for name in ("layer_count", "hidden", "ffn", "heads", "kv_heads", "head_dim")),
        *((name, _P) for name in ("keys", "values", "key_scales", "value_scales")),
        ("slots", _L),
        ("positions", _L),
        ("eps", _F),
        ("attention_scale", _F),
        *((name, _I) for name in ("cache_dtype", "activation")),
    )


class _CStep(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("hidden", "logits", "slot", "position", "mix", "adapter", "weight", "wanted")),
        ("nanoseconds", _P),
        ("rows", _L),
        ("wanted_count", _L),
        ("first_layer", _L),
        ("last_layer", _L),
        ("dtype", _I),
    )


class NativeDecoder:
    """Runs a network with csrc/decoder.cpp.

    Args:
        native: the library.
        network: what to run; its packed weights are what `takes_few_rows` takes.
        cache: where keys and values are kept.
        dtype: float32 or bfloat16, of the activations that enter packed products where there are more than
            `FLOAT_ROWS`; everything between them is float32.
        enter: see `Enter`; None: all weights are there.

    Raises:
        ShapeError: a tensor does not fit the others, or is of a dtype or on a device that the library does not take.
    """

    def __init__(
        self, native: Native, network: Network, cache: Cache, dtype: torch.dtype, enter: Enter | None = None
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ShapeError(f"a native decoder computes in float32 or bfloat16, not in {dtype}")
        self._decode, self.network, self.cache = native.functions["hb_decode"], network, cache
        self._dtype, self._enter = dtype, enter
        if network.table.dim() != 2 or network.table.shape[1] != network.final_norm.numel():
            raise ShapeError(
                f"embeddings {tuple(network.table.shape)} do not fit {network.final_norm.numel()} hidden numbers"
            )
        self._kept: list[Any] = []
        self._keep_adapters: list[Any] = []
        self._hidden = network.final_norm.numel()
        positions, dim = network.cosine.shape
        if network.heads % network.kv_heads or dim % 2 or positions % KEY_BLOCK:
            raise ShapeError(
                f"{network.heads} heads of {dim} over {network.kv_heads} at {positions} positions do not fit"
            )
        ffn = network.layers[0].matrices["gate"].n
        self._layers = (_Layer * len(network.layers))(*(self._layer(layer, ffn) for layer in network.layers))
        self._decoder = _Decoder(
            layers=self._layers,
            final_norm=self._vector(network.final_norm, self._hidden),
            cosine=self._matrix_of(network.cosine, torch.float32, (positions, dim)),
            sine=self._matrix_of(network.sine, torch.float32, (positions, dim)),
            head=self._matrix(network.head, (network.head.n, self._hidden)),
            layer_count=len(network.layers),
            hidden=self._hidden,
            ffn=ffn,
            heads=network.heads,
            kv_heads=network.kv_heads,
            head_dim=dim,
            eps=network.eps,
            attention_scale=network.attention_scale,
            activation=ACTIVATIONS.index(network.activation),
        )
        self._set_cache(cache)
        self._adapters = 0
        self._nanoseconds = (_L * len(PARTS))()

    @property
    def seconds(self) -> Mapping[str, float]:
        """See `Decoder.seconds`."""
        return {part: count / 1e9 for part, count in zip(PARTS, self._nanoseconds, strict=True)}

    def _layer(self, layer: Layer, ffn: int) -> _Layer:
        network, dim = self.network, self.network.head_dim
        queries, keys = network.heads * dim, network.kv_heads * dim
        shapes = {
            "query": (queries, self._hidden),
            "key": (keys, self._hidden),
            "value": (keys, self._hidden),
            "output": (self._hidden, queries),
            "gate": (ffn, self._hidden),
            "up": (ffn, self._hidden),
            "down": (self._hidden, ffn),
        }
        return _Layer(
            *(self._matrix(layer.matrices[name], shapes[name]) for name in MATRICES),
            self._vector(layer.attention_norm, self._hidden),
            self._vector(layer.mlp_norm, self._hidden),
            self._vector(layer.query_norm, dim),
            self._vector(layer.key_norm, dim),
            layer.window,
        )

    def _matrix(self, matrix: Matrix, shape: tuple[int, int]) -> _Matrix:
        if (matrix.n, matrix.k) != shape:
            raise ShapeError(f"a matrix of {matrix.n} x {matrix.k} stands where one of {shape[0]} x {shape[1]} belongs")
        bias = self._vector(matrix.bias, matrix.n)
        if isinstance(matrix.weight, PackedWeight):
            if not takes_few_rows(matrix.weight, matrix.k):
                raise ShapeError(
                    f"a packed matrix of {matrix.n} x {matrix.k} is not whole blocks and groups of columns"
                )
            weight, keep = packed_weight(tuple(matrix.weight), matrix.n * matrix.k)
            self._kept += [weight, keep]
            return _Matrix(packed=ctypes.pointer(weight), bias=bias, n=matrix.n, k=matrix.k)
        dtype = matrix.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ShapeError(f"a dense matrix of a native decoder is float32 or bfloat16, not {dtype}")
        dense = self._matrix_of(matrix.weight, dtype, shape)
        return _Matrix(dense=dense, bias=bias, n=matrix.n, k=matrix.k, dense_dtype=_DTYPES[dtype])

    def _vector(self, tensor: torch.Tensor | None, count: int) -> int | None:
        return None if tensor is None else self._matrix_of(tensor, torch.float32, (count,))

    def _matrix_of(self, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """The address of `tensor`, which is kept and proven to be what the library expects."""
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_cpu or not tensor.is_contiguous():
            raise ShapeError(
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} stands where contiguous {dtype} {shape} "
                "on the CPU belongs"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _set_cache(self, cache: Cache) -> None:
        network, decoder = self.network, self._decoder
        positions, dim = network.cosine.shape
        slots, dtype = cache.values.shape[1], cache.values.dtype
        if dtype not in _DTYPES or (dtype == torch.int8) != (cache.key_scales is not None):
            raise ShapeError(f"a cache holds float32, bfloat16 or int8 with scales, not {dtype}")
        shape = (len(network.layers), slots, network.kv_heads, positions)
        keys = (*shape[:-1], positions // KEY_BLOCK, dim, KEY_BLOCK)
        decoder.keys = self._matrix_of(cache.keys, dtype, keys)
        decoder.values = self._matrix_of(cache.values, dtype, (*shape, dim))
        if cache.key_scales is not None and cache.value_scales is not None:
            decoder.key_scales = self._matrix_of(cache.key_scales, torch.float32, shape)
            decoder.value_scales = self._matrix_of(cache.value_scales, torch.float32, shape)
        decoder.slots, decoder.positions, decoder.cache_dtype = slots, positions, _DTYPES[dtype]

    def set_adapters(self, adapters: Sequence[Branches]) -> None:
        """See `Decoder.set_adapters`."""
        keep: list[Any] = []
        for number, layer in enumerate(self._layers):
            for name in MATRICES:
                matrix = getattr(layer, name)
                array = (Lora * max(len(adapters), 1))()
                for index, branches in enumerate(adapters):
                    branch = branches.get((number, name))
                    if branch is not None:
                        array[index] = _lora(branch, matrix.n, matrix.k)
                        keep += branch
                matrix.loras = array if any(lora.rank for lora in array) else None
                keep.append(array)
        self._keep_adapters, self._adapters = keep, len(adapters)

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """See `Decoder.step`; at most `STEP_ROWS` rows. Raises what `Step.check` does."""
        Step(tokens, slots, positions, mixes, wanted).check(self.network, self.cache, self._adapters)
        rows, chosen = len(tokens), range(len(tokens)) if wanted is None else wanted
        entries = [entry for mix in mixes or () for entry in mix]
        hidden = self.network.embed(tokens)
        out = torch.empty((len(chosen), self.network.head.n))
        begins = [0]
        for mix in mixes or ((),) * rows:
            begins.append(begins[-1] + len(mix))
        # Held here until the call is over: the struct below has only their addresses.
        slot, position, mix_at = (_L * rows)(*slots), (_L * rows)(*positions), (_L * (rows + 1))(*begins)
        adapter = (_L * len(entries))(*(number for number, _ in entries))
        weight = (_F * len(entries))(*(share for _, share in entries))
        wanted_rows = (_L * len(chosen))(*chosen)
        step = _CStep(
            hidden=hidden.data_ptr(),
            logits=out.data_ptr(),
            slot=ctypes.addressof(slot),
            position=ctypes.addressof(position),
            mix=ctypes.addressof(mix_at) if entries else None,
            adapter=ctypes.addressof(adapter),
            weight=ctypes.addressof(weight),
            wanted=ctypes.addressof(wanted_rows),
            nanoseconds=ctypes.addressof(self._nanoseconds),
            rows=rows,
            dtype=_DTYPES[torch.float32 if rows <= FLOAT_ROWS else self._dtype],
        )
        self._run(step, len(chosen))
        return out

    def _run(self, step: _CStep, wanted: int) -> None:
        """Take a step through all layers and, if logits are wanted, the head, in the parts that `enter` asks for."""
        layers, at = len(self.network.layers), 0
        end = layers + 1 if wanted else layers
        while at < end:
            following = end if self._enter is None else min(self._enter(at), end)
            step.first_layer, step.last_layer = at, min(following, layers)
            step.wanted_count = wanted if following > layers else 0
            if self._decode(torch.get_num_threads(), ctypes.byref(self._decoder), ctypes.byref(step)):
                raise MemoryError(f"no memory for a step of {step.rows} rows")
            at = following


def _lora(branch: Branch, n: int, k: int) -> Lora:
    rank, dtype = branch.a.shape[0], branch.a.dtype
    fits = branch.a.shape == (rank, k) and branch.b.shape == (n, rank) and branch.b.dtype == dtype
    ready = all(tensor.is_cpu and tensor.is_contiguous() for tensor in branch)
    if not fits or not ready or dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(
            f"adapter matrices {dtype} {tuple(branch.a.shape)}, {tuple(branch.b.shape)} do not fit {n} x {k}"
        )
    return Lora(branch.a.data_ptr(), branch.b.data_ptr(), rank, 0, 0, _DTYPES[dtype], 1.0)
