"""Merging an adapter into its base: streamed, and measured.

    R(W + D)      W  a weight of the base, decoded to float32
                  D  what the adapter adds to it, by peft's own arithmetic
                  R  the rounding of the output: to bfloat16, float16 or float32, or to a 4-bit format

The base's tensors come one at a time out of transformers' loader (`quantizer.into_sink`), get the adapter
(`adapter_overlay`), are rounded once and written at once: the memory is a few copies of the largest tensor. They come
quantized and decoded again where the adapter was fitted to quantized weights, because on other weights it is another
model (peft#2105).

Rounding can take the delta away: most entries of D are far smaller than the distance of two neighbours in 4 bits, and
a W that lies on a value already goes back to it (mlx-lm#1564). So for each matrix that the adapter changes,

    surviving share = <R(W + D) - R(W), D> / <D, D>
    noise           = ||R(W + D) - R(W) - D|| / ||D||

are measured: what is left of the delta, along itself, and what rounding put beside it. A merge whose share over all
matrices is under a minimum is refused before anything is in its place.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models.adapter_overlay import ADAPTER_WEIGHTS, Overlay, read_adapter_config
from halfbyte.models.archive import CARRIED
from halfbyte.models.archive_reader import Archive, is_archive
from halfbyte.models.archive_writer import ArchiveWriter, check_output_archive, new_archive, source_state
from halfbyte.models.checkpoint import INDEX
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.dense_writer import DenseWriter
from halfbyte.models.loading import load_config, load_model, resolve, skeleton, without_quantization
from halfbyte.models.quantizer import Arrival, check_finite, into_sink
from halfbyte.models.quantizing import trim
from halfbyte.models.saving import check_output_folder, new_folder
from halfbyte.models.sources import model_files, open_checkpoint
from halfbyte.nn import output_layers
from halfbyte.nn.replace import CONV1D, Plan, make_plan
from halfbyte.tensor import QuantizedTensor, quantize

REPORT = "merge.json"
MIN_SURVIVING_SHARE = 0.5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TASKS = {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification", "FEATURE_EXTRACTION": "encoder"}
# Files of an adapter's folder that replace the base's: the tokenizer and the template of the training.
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")
_TRIM_EVERY = 1 << 26


@dataclass(frozen=True)
class Source:
    """The weights that an adapter is merged onto.

    Attributes:
        path: a model folder, quantized or not, an archive, or a name on the hub.
        quantization: how its weights are quantized, and decoded again, before the adapter is added; None: as stored.
        dtype: of what is not quantized, when it is read; None: as stored.
    """

    path: str
    quantization: HalfbyteConfig | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        path: a new folder, or a file that ends in `.nf4dq`.
        dtype: of dense weights, and the logical dtype of quantized ones; None: the base's.
        quantization: of the merged weights; None: dense.
        min_surviving_share: a merge that keeps less of the delta is refused.
    """

    path: Path
    dtype: torch.dtype | None = None
    quantization: HalfbyteConfig | None = None
    min_surviving_share: float = MIN_SURVIVING_SHARE


@dataclass
class Survival:
    """What rounding left of the delta of one matrix, or of all; see the module's docstring for the formulas.

    Attributes:
        kept: <R(W + D) - R(W), D>.
        delta: <D, D>.
        error: ||R(W + D) - R(W) - D||^2.
        weight: <W, W>.
    """

    kept: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    weight: float = 0.0

    def __iadd__(self, other: Survival) -> Survival:
        self.kept += other.kept
        self.delta += other.delta
        self.error += other.error
        self.weight += other.weight
        return self

    @property
    def share(self) -> float:
        """What is left of the delta, along itself; 1 where there was none."""
        return self.kept / self.delta if self.delta else 1.0

    def as_dict(self) -> dict[str, float]:
        """For `merge.json`; norms are relative to the weight's."""
        return {
            "surviving_share": self.share,
            "noise": math.sqrt(self.error / self.delta) if self.delta else 0.0,
            "relative_norm": math.sqrt(self.delta / self.weight) if self.weight else 0.0,
        }


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        request: what was asked for, and a digest of it.
        layers: parameter name -> what was left of its delta.
        replaced: parameters that the adapter brought whole.
        untied: names that the base ties and the result does not, because the adapter made them differ.
    """

    request: dict[str, Any]
    layers: dict[str, Survival] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)

    @property
    def total(self) -> Survival:
        """Of all matrices together."""
        total = Survival()
        for survival in self.layers.values():
            total += survival
        return total

    def as_dict(self) -> dict[str, Any]:
        """What `merge.json` holds."""
        return {
            **self.request,
            "total": self.total.as_dict(),
            "layers": {name: survival.as_dict() for name, survival in self.layers.items()},
            "replaced": self.replaced,
            "untied": self.untied,
        }


def merge_adapter(source: Source, adapter: str | Path, output: Output) -> dict[str, Any]:
    """Merge an adapter into a model, one tensor at a time, and write the result.

    Nothing is at the output's place until all of it is on disk. A merge that was killed is done by the same call; one
    that is finished is not done again.

    Args:
        source: what to merge onto.
        adapter: a peft folder.
        output: what to write, and where.

    Returns:
        The report, as `merge.json` in the folder (and in the archive) holds it.

    Raises:
        CheckpointError: base or adapter is damaged, or they do not belong together; the message names a tensor.
        RequestError: the adapter cannot be merged, or too little of it would survive.
        OutputError: the output cannot be written; nothing was kept of it.
    """
    folder, base = Path(adapter), resolve(source.path)
    merger = _Merger(base, folder, source, output)
    done = finished(output.path, merger.report.request["digest"])
    if done is not None:
        return done
    if is_archive(output.path):
        check_output_archive(output.path)
        with new_archive(output.path, merger.report.request) as archive:
            merger.into_archive(archive)
    else:
        check_output_folder(output.path)
        with new_folder(output.path) as aside:
            merger.into_folder(aside)
    return merger.report.as_dict()


def finished(path: Path, digest: str) -> dict[str, Any] | None:
    """The report of a merge that is at `path` already, if it is the one with this digest."""
    try:
        if is_archive(path):
            text = Archive(path).read_file(REPORT).decode() if path.is_file() else ""
        else:
            text = (path / REPORT).read_text(encoding="utf-8") if (path / REPORT).is_file() else ""
        report = json.loads(text) if text else {}
    except (CheckpointError, ValueError):
        return None
    return dict(report) if isinstance(report, dict) and report.get("digest") == digest else None


class _Merger:
    """One merge: what is known before a weight is read, and what is done with each."""

    def __init__(self, base: Path, adapter: Path, source: Source, output: Output) -> None:
        config = read_adapter_config(adapter)
        self.base, self.adapter, self.source, self.output = base, adapter, source, output
        self.task = _TASKS.get(config.get("task_type") or "", "causal-lm")
        checkpoint = open_checkpoint(base, verify=False)
        # A classifier's adapter brings the config of its base, with the number and the names of the classes.
        described = adapter if (adapter / "config.json").is_file() else base
        self.config = without_quantization(load_config(described))
        self.model = skeleton(self.config, self.task, described)
        self.overlay = Overlay(skeleton(self.config, self.task, described), adapter)
        self.stored_quantized = checkpoint.quant_method is not None
        declared = checkpoint.config.get("quantization_config") or {}
        self.skip = list(declared.get("skip_modules") or declared.get("llm_int8_skip_modules") or [])
        self.dtype = output.dtype or getattr(self.config, "dtype", None) or torch.float32
        heads = output_layers(self.model)
        self.kinds = make_plan(self.model, heads=heads).chosen
        self.plan = self._output_plan(heads)
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        shapes = dict(self.model.named_parameters(remove_duplicate=False))
        untied = [a for a, b in self.tied.items() if a in shapes and not self.overlay.same(a, b, shapes[a].shape)]
        self.report = MergeReport(self._request(), untied=sorted(untied))
        self.names = [name for name in self.model.state_dict() if name not in self.tied or name in untied]
        self.state = self.model.state_dict()
        self.written: set[str] = set()
        self._since_trim = 0
        self._transposed = {name for name, kind in self.plan.chosen.items() if kind == CONV1D}
        self._write: Callable[[str, torch.Tensor], None] = lambda name, tensor: None

    def into_folder(self, aside: Path) -> None:
        """Write a folder; a quantized one by way of an archive, since its keys are known only when they are made."""
        if self.output.quantization is not None:
            scratch = aside / "merged.nf4dq"
            with new_archive(scratch, self.report.request) as archive:
                self.into_archive(archive)
            load_model(scratch, task=self.task).save_pretrained(aside)
            scratch.unlink()
        else:
            layout = {key: value for name in self.names for key, value in self._stored(name, self._meta(name)).items()}
            writer = DenseWriter(aside, layout)

            def write(name: str, tensor: torch.Tensor) -> None:
                for key, value in self._stored(name, tensor).items():
                    writer.put(key, value)

            self._stream(write)
            writer.finish()
            self._final_config().save_pretrained(aside)
        for name, data in self._files():
            (aside / name).write_bytes(data)

    def into_archive(self, archive: ArchiveWriter) -> None:
        """Write an archive."""
        self._stream(archive.add)
        for alias, name in self.tied.items():
            if alias not in self.names and alias in self.state:
                archive.tie(alias, name)
        config = self._final_config()
        if self.output.quantization is not None:
            config.quantization_config = self.output.quantization.own_dict() | {"skip_modules": self._skipped()}
        archive.add_file("config.json", config.to_json_string(use_diff=True).encode())
        for name, data in self._files():
            archive.add_file(name, data)

    def _stream(self, write: Callable[[str, torch.Tensor], None]) -> None:
        """Load the source, every parameter of which goes through `_take`; then whatever did not."""
        self._write = write
        source = self.source
        num_labels = None if self.task == "causal-lm" else getattr(self.config, "num_labels", None)
        with into_sink(self._take):
            model = load_model(
                self.base,
                quantization=self._reading(),
                dtype=source.dtype,
                task=self.task,
                num_labels=num_labels,
                fused=False,
            )
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_meta:
                check_finite(name, tensor)
                self._merge(name, tensor.detach())
        left = [name for name in self.names if name not in self.written]
        if left:
            raise CheckpointError(f"{self.base} lacks {len(left)} weights of the model, the first is {left[0]}")
        share, minimum = self.report.total.share, self.output.min_surviving_share
        if not share >= minimum:
            floor = math.floor(100 * share) / 100
            raise RequestError(
                f"only {share:.1%} of the adapter's change would survive {self._told()}: {self._worst()}; merge into "
                f"bfloat16, keep the adapter apart, or accept it with --min-surviving-share {floor}"
            )

    def _take(self, model: nn.Module, arrival: Arrival) -> nn.Parameter:
        made = arrival.make().detach()
        self._merge(arrival.name, made)
        self._since_trim += made.numel() * made.element_size()
        if self._since_trim > _TRIM_EVERY:
            trim()
            self._since_trim = 0
        return arrival.placeholder()

    @torch.no_grad()
    def _merge(self, name: str, stored: torch.Tensor) -> None:
        """Merge and write a tensor of the source, and whatever the model ties to it and the adapter does not."""
        partners = {name, *(a for a, b in self.tied.items() if b == name), *self._target(name)}
        todo = [partner for partner in partners if partner in self.names and partner not in self.written]
        if not todo:
            return
        if not stored.is_floating_point():
            for partner in todo:
                self.written.add(partner)
                self._write(partner, stored)
            return
        weight = stored.dequantize(torch.float32) if isinstance(stored, QuantizedTensor) else stored.float()
        if isinstance(stored, QuantizedTensor) and self.kinds.get(name) == CONV1D:
            weight = weight.T.contiguous()  # packed as [out, in], and the model has it as [in, out]
        for partner in sorted(todo):
            if weight.shape != self.state[partner].shape:
                raise CheckpointError(
                    f"{self.base} has {partner} as {tuple(weight.shape)}, and the model's is "
                    f"{tuple(self.state[partner].shape)}"
                )
            self.written.add(partner)
            self._write(partner, self._rounded_and_measured(partner, weight))

    def _rounded_and_measured(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        merged = self.overlay.merged(name, weight)
        made = self._round(name, merged)
        if name in self.overlay.whole:
            self.report.replaced.append(name)
        elif merged is not weight:
            delta = merged - weight
            turned = name in self._transposed
            change = _decoded(made, turned) - _decoded(self._round(name, weight), turned)
            self.report.layers[name] = Survival(
                _dot(change, delta), _dot(delta, delta), _dot(change - delta, change - delta), _dot(weight, weight)
            )
        return made

    def _round(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A float32 weight as the output holds it."""
        if name in self.plan.chosen:
            spec = self.output.quantization.spec  # type: ignore[union-attr]  # the plan is empty without
            dense = weight.T if name in self._transposed else weight
            return quantize(dense, spec.format, spec.block_size, spec.scale_bits).to(self.dtype)
        rounded = weight.to(self.dtype)
        if not rounded.isfinite().all():
            raise RequestError(f"{name} has values that {self.dtype} cannot hold; choose --dtype bfloat16")
        return rounded

    def _output_plan(self, heads: list[str]) -> Plan:
        """Which of the merged weights are quantized: those that `halfbyte quantize` would, less what the base keeps."""
        wanted = self.output.quantization
        if wanted is None:
            return Plan({}, {})
        skip = self._skipped()
        plan = make_plan(self.model, heads=heads, quantize_embeddings=wanted.quantize_embeddings)
        chosen = {name: kind for name, kind in plan.chosen.items() if not any(f".{s}." in f".{name}." for s in skip)}
        return Plan(chosen, plan.skipped)

    def _skipped(self) -> list[str]:
        """Modules that the output keeps dense, as asked or as the base does."""
        asked = list(self.output.quantization.skip_modules) if self.output.quantization else []
        return [*asked, *(name for name in self.skip if name not in asked)]

    def _reading(self) -> HalfbyteConfig | None:
        """How the source is quantized when it is read."""
        if self.stored_quantized:
            return None
        if self.source.quantization is not None:
            return self.source.quantization
        # Nothing is quantized; the loader hands over its tensors one by one all the same.
        return HalfbyteConfig(skip_modules=list(self.kinds), min_quantized_share=0.0)

    def _target(self, name: str) -> list[str]:
        """What the model ties `name` to."""
        return [self.tied[name]] if name in self.tied else []

    def _meta(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.state[name]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter under the names that transformers gives it in a file; experts are cut apart again."""
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, torch.Tensor] = revert_weight_conversion(self.model, {name: tensor})
        return stored

    def _final_config(self) -> Any:
        config = without_quantization(self.config)
        config.architectures = [type(self.model).__name__]
        config.dtype = self.dtype
        if self.report.untied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        return config

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """The base's generation config and whatever else it carries, the adapter's tokenizer, and the report."""
        with model_files(self.base) as folder:
            files = {file.name: file for file in Path(folder).iterdir() if file.name not in ("config.json", INDEX)}
            files |= {file.name: file for file in self.adapter.iterdir() if file.name.startswith(_TOKENIZER)}
            for name, file in sorted(files.items()):
                if file.is_file() and file.suffix in CARRIED and name != REPORT and not name.startswith("."):
                    yield name, file.read_bytes()
        yield REPORT, (json.dumps(self.report.as_dict(), indent=2) + "\n").encode()

    def _request(self) -> dict[str, Any]:
        """What makes a merge the same merge."""
        source, wanted = self.source, self.output.quantization
        request = {
            "base": str(source.path),
            "adapter": str(self.adapter),
            "task": self.task,
            "fitted_quantization": source.quantization and source.quantization.own_dict(),
            "fitted_dtype": source.dtype and str(source.dtype).removeprefix("torch."),
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": wanted and wanted.own_dict(),
            "generator": f"halfbyte {version('halfbyte')}, peft {version('peft')}",
        }
        weights = hashlib.sha256((self.adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
        asked = {**request, "weights": weights, "config": self.overlay.config, "files": source_state(self.base)}
        return request | {"digest": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()}

    def _told(self) -> str:
        wanted = self.output.quantization
        return f"rounding to {wanted.spec.format if wanted else self.dtype}"

    def _worst(self) -> str:
        name, survival = min(self.report.layers.items(), key=lambda item: item[1].share)
        return f"{name} keeps {survival.share:.1%}"


def _decoded(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """What an output's tensor stands for, in float32 and the model's shape."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor.float()
    dense = tensor.dequantize(torch.float32)
    return dense.T if transposed else dense


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product of two tensors, summed in float64 by parts so that no copy of that width is made."""
    return sum(float(x.double().flatten() @ y.double().flatten()) for x, y in zip(a, b, strict=True))
