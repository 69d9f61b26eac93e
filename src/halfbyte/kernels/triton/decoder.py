"""The decoder step on a GPU: some rows of any sequences through all layers, replayed as one CUDA graph.

A step of a single token is several hundred small launches, which take the host longer than the device. They are the
same for every step of as many rows: what changes (tokens, slots, positions, how much of which adapter) stands in
tensors that the kernels read. So a step is captured once for each number of rows, rounded up to a power of two, and
replayed. Rows that fill up have the position -1 and leave no trace.

Adapters are not merged. All of them together are one wide adapter, of which a row takes the columns of its own.

Importing this module imports triton.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional

from halfbyte.kernels.decoder import MATRICES, Branches, Cache, Layer, Matrix, Mix, Network, Step
from halfbyte.kernels.reference.decoder import dense, narrow
from halfbyte.kernels.schema import PackedWeight
from halfbyte.kernels.triton.attention import Angles, Form, Heads, LayerCache, Rows, attend
from halfbyte.kernels.triton.linear import multiply
from halfbyte.kernels.triton.products import Branch
from halfbyte.kernels.triton.rowwise import gated, mix, rms_norm

_GROUPS = (MATRICES[:3], MATRICES[3:4], MATRICES[4:6], MATRICES[6:])  # each multiplies one input


class _Wide(NamedTuple):
    """The adapters of a group of matrices, side by side.

    Attributes:
        a: [total, k], the rows of a matrix together, in the order of the group.
        b: [n, columns] of each matrix; of no columns where no adapter is on it.
        first: the first of the total's columns that is each matrix's.
        columns: what `mix` takes.
    """

    a: torch.Tensor
    b: Sequence[torch.Tensor]
    first: Sequence[int]
    columns: torch.Tensor


class _Rows:
    """A step of `rows` rows: what it reads, and its graph once it has been captured.

    Attributes:
        numbers: int64 [3, rows]: tokens, slots, positions.
        shares: float32 [rows, adapters].
        graph: None: not captured yet.
        logits: float32 [rows, vocabulary], that the graph writes.
    """

    def __init__(self, rows: int, adapters: int, device: torch.device) -> None:
        self.rows = rows
        pinned = device.type == "cuda"
        self._numbers = torch.empty((3, rows), dtype=torch.int64, pin_memory=pinned)
        self._shares = torch.empty((rows, adapters), pin_memory=pinned)
        self.numbers, self.shares = self._numbers.to(device, copy=True), self._shares.to(device, copy=True)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None

    def fill(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], mixes: Sequence[Mix] | None
    ) -> None:
        """Say what the next run is to compute. The last one has ended: its logits were copied to the host."""
        idle = self.rows - len(tokens)
        rows = ([*tokens, *[0] * idle], [*slots, *[0] * idle], [*positions, *[-1] * idle])
        self._numbers.copy_(torch.tensor(rows))
        self.numbers.copy_(self._numbers, non_blocking=True)
        if self._shares.shape[1]:
            self._shares.zero_()
            for row, one in enumerate(mixes or ()):
                for adapter, share in one:
                    self._shares[row, adapter] += share
            self.shares.copy_(self._shares, non_blocking=True)


class TritonDecoder:
    """Runs a network with Triton's kernels, for the steps of few rows that answers are made of.

    It rounds where `TorchDecoder` does, but keeps sums in float32 within a kernel: a product and its adapters are
    rounded together.

    Args:
        network: what to run; its tensors on one GPU, or on the CPU for Triton's interpreter, which captures no graph.
        cache: where keys and values are kept, on the same device.
        dtype: of all activations; logits are float32.
    """

    def __init__(self, network: Network, cache: Cache, dtype: torch.dtype) -> None:
        self.network, self.cache, self.dtype = network, cache, dtype
        self.seconds = {"step": 0.0}
        self._angles = Angles(network.cosine.to(dtype).contiguous(), network.sine.to(dtype).contiguous())
        self._layers = [replace(layer, matrices=self._ready(layer)) for layer in network.layers]
        norms = [norm for layer in network.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        self._norms = [narrow(norm, dtype) for norm in (*norms, network.final_norm)]
        self._forms = [self._form(layer) for layer in network.layers]
        self._head = self._ready_matrix(network.head)
        self._adapters = 0
        self._wide: list[list[_Wide | None]] = [[None] * len(_GROUPS) for _ in network.layers]
        self._steps: dict[int, _Rows] = {}
        self._graphs = network.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    def _ready(self, layer: Layer) -> dict[str, Matrix]:
        return {name: self._ready_matrix(matrix) for name, matrix in layer.matrices.items()}

    def _ready_matrix(self, matrix: Matrix) -> Matrix:
        return matrix if matrix.bias is None else replace(matrix, bias=matrix.bias.to(self.dtype))

    def _form(self, layer: Layer) -> Form:
        network = self.network
        norms = [None if norm is None else narrow(norm, self.dtype) for norm in (layer.query_norm, layer.key_norm)]
        return Form(
            network.heads, network.kv_heads, network.attention_scale, network.eps, layer.window, norms[0], norms[1]
        )

    def set_adapters(self, adapters: Sequence[Branches]) -> None:
        """See `Decoder.set_adapters`. Graphs are captured anew."""
        self._adapters = len(adapters)
        self._steps.clear()
        self._wide = [
            [self._widened(adapters, number, group) for group in _GROUPS] for number in range(len(self._layers))
        ]

    def _widened(self, adapters: Sequence[Branches], layer: int, group: Sequence[str]) -> _Wide | None:
        device = self.network.device
        a, b, owners, widths = [], [], [], []
        for name in group:
            matrix = self._layers[layer].matrices[name]
            here = [
                (number, one[layer, name])
                for number, one in enumerate(adapters)
                if (layer, name) in one and len(one[layer, name].a)
            ]
            a += [branch.a.to(device, self.dtype) for _, branch in here]
            ranks = [len(branch.a) for _, branch in here]
            owners += [number for (number, _), rank in zip(here, ranks, strict=True) for _ in range(rank)]
            widths.append(sum(ranks))
            columns = [branch.b.to(device, self.dtype) for _, branch in here]
            b.append(torch.cat(columns, dim=1) if columns else torch.empty((matrix.n, 0), device=device))
        if not a:
            return None
        first = [0, *accumulate(widths)][:-1]
        of_column = [member for member, width in enumerate(widths) for _ in range(width)]
        told = [owners, [first[member] for member in of_column], [widths[member] for member in of_column]]
        return _Wide(torch.cat(a), b, first, torch.tensor(told, device=device, dtype=torch.int32))

    @torch.inference_mode()
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
        began = time.perf_counter()
        rows = 1 << (len(tokens) - 1).bit_length()
        if rows not in self._steps:
            self._steps[rows] = _Rows(rows, self._adapters, self.network.device)
        step = self._steps[rows]
        step.fill(tokens, slots, positions, mixes)
        with torch.cuda.device_of(self._norms[0]):  # Triton launches on the current device
            logits = self._run(step)
        result = (logits[: len(tokens)] if wanted is None else logits[list(wanted)]).cpu()
        self.seconds["step"] += time.perf_counter() - began
        return result

    def _run(self, step: _Rows) -> torch.Tensor:
        """A first run compiles kernels, which no capture can; and a number of rows that comes once needs no graph."""
        if not self._graphs or step.logits is None:
            step.logits = self._forward(step)
            return step.logits
        if step.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Another thread may use the device meanwhile: only what this one does belongs to the graph.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step.logits = self._forward(step)
            step.graph = graph
        step.graph.replay()
        return step.logits

    def _forward(self, step: _Rows) -> torch.Tensor:
        network = self.network
        tokens, slots, positions = step.numbers
        rows = Rows(slots, positions)
        hidden = functional.embedding(tokens, network.table).float().mul(network.embedding_scale).to(self.dtype)
        x = rms_norm(hidden, self._norms[0], network.eps)
        for number, form in enumerate(self._forms):
            heads = Heads(*self._products(x, number, 0, step.shares))
            mixed = attend(heads, rows, self._angles, LayerCache(*self.cache.layer(number)), form)
            (added,) = self._products(mixed, number, 1, step.shares)
            x = rms_norm(hidden, self._norms[2 * number + 1], network.eps, added)
            gate, up = self._products(x, number, 2, step.shares)
            (added,) = self._products(gated(gate, up, network.activation), number, 3, step.shares)
            x = rms_norm(hidden, self._norms[2 * number + 2], network.eps, added)
        return self._product(x, self._head, None).float()

    def _products(self, x: torch.Tensor, number: int, group: int, shares: torch.Tensor) -> list[torch.Tensor]:
        """x [rows, k] times each matrix of a group, adapters added."""
        matrices = [self._layers[number].matrices[name] for name in _GROUPS[group]]
        wide = self._wide[number][group]
        if wide is None:
            return [self._product(x, matrix, None) for matrix in matrices]
        rows, inputs = len(x), mix(x @ wide.a.t(), shares, wide.columns)
        found = []
        for matrix, b, first in zip(matrices, wide.b, wide.first, strict=True):
            rank = b.shape[1]
            part = inputs[rows * first : rows * (first + rank)].view(rows, rank)
            found.append(self._product(x, matrix, Branch(part, b, 1.0) if rank else None))
        return found

    def _product(self, x: torch.Tensor, matrix: Matrix, branch: Branch | None) -> torch.Tensor:
        weight = matrix.weight
        if isinstance(weight, PackedWeight):
            return multiply(weight, matrix.n, x, matrix.bias, branch)
        y = dense(x, weight, matrix.bias)
        return y if branch is None else y.addmm_(branch.inputs, branch.b.t(), alpha=branch.scaling)
