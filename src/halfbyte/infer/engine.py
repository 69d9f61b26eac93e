"""`Engine`: a 4-bit model and its adapters, answering.

Models of the Llama family run in the native decoder, or on a card in a CUDA graph of Triton's kernels; prompts go
through the same network in torch operations, whose products have many rows. Every other model runs through
transformers' own forward, and `engine.decoder` says why.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.data import Message, Renderer
from halfbyte.errors import CheckpointError, RequestError, nearest
from halfbyte.infer.costs import ProductCosts, product_costs
from halfbyte.infer.few_rows import few_rows_decoder
from halfbyte.infer.network import NotCoveredError, branches, check_covered, make_network
from halfbyte.infer.offload import Offload, make_offload
from halfbyte.infer.placement import choose_device, slots_that_fit
from halfbyte.infer.requests import Adapters, Completion, Event, Handle, Request, normalize_adapters
from halfbyte.infer.sampling import SamplingParams
from halfbyte.infer.scheduler import CHUNK, CHUNK_ALONE, Scheduler, Statistics
from halfbyte.infer.transformers_decoder import TransformersDecoder
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.decoder import STEP_ROWS, Branches, Cache, Matrix, Mix, Network
from halfbyte.kernels.reference.decoder import TorchDecoder
from halfbyte.models import HalfbyteConfig, load_model, load_tokenizer
from halfbyte.nn import Linear4bit
from halfbyte.tensor import quantize

if TYPE_CHECKING:
    from collections.abc import Generator

    from halfbyte.kernels.triton.decoder import TritonDecoder

Prompt = str | Sequence[Message] | Sequence[int]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_DEFAULT_LENGTH = 4096
_MIB = 2**20


class Engine:
    """Answers requests with one model and any number of adapters.

    Args:
        path: a `.nf4dq` archive or a model folder; or a transformers model that is loaded already.
        adapters: name -> adapter folder (peft's format).
        tokenizer: None: the one that lies with the model.
        quantization: how a model that is not quantized yet is to be; None: as it is stored.
        device: "cpu", "cuda" or "cuda:1"; None: the first card if there is one, and a loaded model stays where it is.
        dtype: "bfloat16", "float16" (on a card only) or "float32", of the activations that enter products; None: the
            model's own compute dtype. On the CPU everything between the products is float32.
        max_length: tokens of prompt and answer together; None: the model's own limit, 4,096 at most.
        slots: sequences that are answered at the same time; fewer where a card has no memory for so many.
        cache_dtype: "float32", "bfloat16" or "int8", of keys and values; None: as `dtype`.
        quantize_head: put an output layer that is dense into NF4: faster, and not the same numbers.
        drafts: tokens that prompt lookup proposes at a time; 0: none. Greedy answers stay the same.
        queue_limit: requests that may wait for a slot.
        max_memory: bytes that weights of a mapped file may take up, on the CPU; None: what is available. Where they do
            not fit, some layers stay in memory and the others are read from the file at each step (`offload.py`).
        verify: compare an archive's checksums first, which reads it once.

    Attributes:
        decoder: what runs the model, with the reason, in a sentence.
        drafts: as given; 0 where the decoder cannot verify them.
        offload: has weights read that do not fit into the memory; None on a card, or where the decoder is
            transformers'.

    Raises:
        CheckpointError: see `load_model`; or an adapter that does not fit.
        RequestError: an argument that cannot be.
    """

    # budget: the settings of an engine are keyword arguments of one call
    def __init__(
        self,
        path: Any,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        tokenizer: Any = None,
        quantization: HalfbyteConfig | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        slots: int = 8,
        cache_dtype: str | None = None,
        quantize_head: bool = False,
        drafts: int = 0,
        queue_limit: int = 256,
        max_memory: int | None = None,
        verify: bool = True,
    ) -> None:
        for name, value, choices in (("dtype", dtype, _DTYPES), ("cache_dtype", cache_dtype, _CACHES)):
            if value is not None and value not in choices:
                raise RequestError(f"{name} {value!r} is not offered; {nearest(value, choices)}")
        if not 1 <= slots <= STEP_ROWS:
            raise RequestError(f"slots is {slots}; choose 1 to {STEP_ROWS}.")
        if max_memory is not None and max_memory < 0:
            raise RequestError(f"max_memory is {max_memory}; give bytes, 0 or more.")
        loaded = not isinstance(path, str | Path)
        place = path.device if loaded and device is None else choose_device(device)
        if dtype == "float16" and place.type == "cpu":
            raise RequestError("dtype 'float16' is offered on a card only; the nearest here is 'float32'.")
        if max_memory is not None and place.type != "cpu":
            raise RequestError(f"max_memory is for the CPU, and the model would be on {place}; choose device cpu.")
        self.model = path if loaded else load_model(path, quantization=quantization, verify=verify)
        if self.model.device != place:
            self.model.to(place)
        self.model.eval()
        if tokenizer is None:
            tokenizer = load_tokenizer(self.model.name_or_path if loaded else path)
        self.renderer = Renderer(tokenizer)
        self.tokenizer = self.renderer.tokenizer
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_LENGTH
        self.max_length: int = min(max_length or min(limit, _DEFAULT_LENGTH), limit)
        self._dtype = _compute_dtype(self.model) if dtype is None else _DTYPES[dtype]
        self._names: list[str] = []
        self._branches: dict[str, Branches] = {}
        self._few: NativeDecoder | TritonDecoder | None = None  # takes steps of few rows
        self._torch: TorchDecoder | None = None
        self._fallback: TransformersDecoder | None = None
        self.offload: Offload | None = None
        for name, folder in (adapters or {}).items():
            self._attach(name, Path(folder))
        self.slots = slots
        self.decoder = self._make_decoder(_CACHES.get(cache_dtype or "", self._dtype), quantize_head, max_memory)
        if self.offload is not None and self.offload.offloaded:
            here, size = self.offload.nbytes - self.offload.offloaded, self.offload.nbytes
            self.decoder += f"; {here / _MIB:.0f} of {size / _MIB:.0f} MiB of weights fit into the memory"
        decode: Any = self._few or self._torch or self._fallback
        cache = self._torch.cache if self._torch is not None else None
        self.drafts = drafts if cache is not None else 0
        self._scheduler = Scheduler(
            decode.step,
            self._torch.step if self._torch is not None else None,
            None if cache is None else cache.copy,
            self.slots,
            queue_limit,
            self.drafts,
            self._mix,
            CHUNK_ALONE.get(self.device.type, CHUNK),
        )

    def _make_decoder(self, cache_dtype: torch.dtype, quantize_head: bool, max_memory: int | None) -> str:
        try:
            if self.device.type not in CHUNK_ALONE:
                raise NotCoveredError(f"it is on {self.device}")
            check_covered(self.model)
            self._branches = {name: branches(self.model, name, self._dtype) for name in self._names}
            network = make_network(self.model, self.max_length, self._dtype)
        except NotCoveredError as reason:
            self._fallback = TransformersDecoder(self.model, self.slots)
            self._set_names(self._names)
            return f"transformers' own forward, because {reason}"
        if quantize_head:
            network = _with_quantized_head(network)
        asked, self.slots = self.slots, slots_that_fit(network, cache_dtype, self.slots, self._dtype)
        cache = Cache.empty(network, self.slots, cache_dtype)
        if network.device.type == "cpu":
            self.offload = make_offload(network, max_memory)
        enter = None if self.offload is None else self.offload.enter
        self._torch = TorchDecoder(network, cache, self._dtype, enter)
        self._few, told = few_rows_decoder(network, cache, self._dtype, enter)
        self._set_names(self._names)
        return told if self.slots == asked else f"{told}; its memory has room for {self.slots} of {asked} slots"

    # ------------------------------------------------------------------------------------------------------- adapters
    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that requests may name."""
        return list(self._names)

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Load an adapter while answers go on; requests may name it from now on.

        Raises:
            CheckpointError: the folder is incomplete, damaged, or made for another model.
            RequestError: the name is taken, or the adapter asks for what the decoder does not do.
        """
        if name in self._names or not name:
            raise RequestError(f"an adapter named {name!r} is there already; choose another name.")
        self._scheduler.between_steps(lambda: self._add(name, Path(folder)))

    def _add(self, name: str, folder: Path) -> None:
        self._attach(name, folder)
        try:
            if self._fallback is None:
                self._branches[name] = branches(self.model, name, self._dtype)
        except NotCoveredError as reason:
            self._detach(name)
            raise RequestError(f"{reason}, which the decoder does not do; merge it into the model first.") from None
        self._set_names(self._names)

    def _attach(self, name: str, folder: Path) -> None:
        """Put peft's layers of an adapter onto the model."""
        from peft import PeftModel
        from safetensors import SafetensorError

        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} is not an adapter: it has no adapter_config.json.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise CheckpointError(
                f"adapter {folder} has no adapter_model.safetensors; other files (pickles) are not read."
            )
        first = not hasattr(self.model, "peft_config")
        try:
            if first:
                self._use_model(PeftModel.from_pretrained(self.model, str(folder), adapter_name=name))
            else:
                self.model.load_adapter(str(folder), adapter_name=name)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            if not first and name in self.model.peft_config:
                self.model.delete_adapter(name)
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"adapter {folder} does not fit the model or is damaged: {reason}") from error
        self.model.eval()
        self._names = [*self._names, name]

    def _detach(self, name: str) -> None:
        self._names = [other for other in self._names if other != name]
        if self._names:
            self.model.delete_adapter(name)
        else:  # peft cannot be without any
            self._use_model(self.model.unload())

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: there is none of this name, or a request is using it.
        """
        self._known(((name, 1.0),))
        self._scheduler.between_steps(lambda: self._remove(name))

    def _remove(self, name: str) -> None:
        if self._scheduler.uses(name):
            raise RequestError(f"adapter {name!r} is being used by a request; cancel that or wait for its end.")
        self._detach(name)
        self._branches.pop(name, None)
        self._scheduler.forget(name)
        self._set_names(self._names)

    def _use_model(self, model: Any) -> None:
        self.model = model
        if self._fallback is not None:
            self._fallback.model = model

    def _set_names(self, names: list[str]) -> None:
        self._names = names
        for decoder in (self._few, self._torch):
            if decoder is not None:
                decoder.set_adapters([self._branches[name] for name in names])
        if self._fallback is not None:
            self._fallback.names = names

    def _mix(self, adapters: Adapters) -> Mix:
        return [(self._names.index(name), weight) for name, weight in adapters]

    def _known(self, adapters: Adapters) -> None:
        for name, weight in adapters:
            if name not in self._names:
                raise RequestError(
                    f"there is no adapter {name!r}; {nearest(name, self._names or ['(none is loaded)'])}"
                )
            if not abs(weight) < float("inf"):
                raise RequestError(f"adapter {name!r} has the weight {weight}; give a finite number.")
        if self._fallback is not None and (len(adapters) > 1 or any(weight != 1.0 for _, weight in adapters)):
            raise RequestError("this model takes one adapter at a time, unweighted; name one.")

    # ------------------------------------------------------------------------------------------------------- requests
    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | Mapping[str, float] | None = None,
        listener: Callable[[Event | BaseException], None] | None = None,
    ) -> Handle:
        """Queue a request and return at once.

        Args:
            prompt: text, which is continued as it stands; messages, which the chat template renders; or token ids.
            params: how to write.
            adapter: a name, or names with weights (the adapters' sum); None: the model alone.
            listener: called with each event, or with the exception that ended the request, by the engine's thread,
                which must not be kept waiting; the handle then has no events of its own.

        Raises:
            BusyError: too many requests are waiting.
            RequestError: an unknown adapter; a prompt that is empty or leaves no room for an answer.
        """
        params = params or SamplingParams()
        mix = normalize_adapters(adapter)
        self._known(mix)
        ids = self.token_ids(prompt)
        if not ids:
            raise RequestError("the prompt is empty; give it at least one token.")
        if len(ids) >= self.max_length:
            raise RequestError(f"the prompt has {len(ids)} tokens; with its answer it may have {self.max_length}.")
        room = min(params.max_tokens, self.max_length - len(ids))
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        tell = listener or events.put
        request = Request(ids, params, mix, self.end_ids, self.tokenizer.backend_tokenizer, room, tell)
        self._scheduler.submit(request)
        return Handle(request, events)

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        adapter: str | Mapping[str, float] | None = None,
    ) -> list[Completion]:
        """Answer all prompts, in their order; they are answered together."""
        handles = [self.submit(prompt, params, adapter=adapter) for prompt in prompts]
        return [handle.result() for handle in handles]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | Mapping[str, float] | None = None,
    ) -> Generator[str]:
        """The answer's text as it is written."""
        handle = self.submit(prompt, params, adapter=adapter)
        try:
            for event in handle:
                yield event.text
        finally:
            handle.cancel()

    def token_ids(self, prompt: Prompt) -> list[int]:
        """A prompt as the model gets it.

        Raises:
            RequestError: ids that are not in the vocabulary.
        """
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            return ids
        items: list[Any] = list(prompt)
        if not all(isinstance(item, int) for item in items):
            return list(self.renderer.ids(items, prompt=True))
        size = self.model.get_input_embeddings().weight.shape[0]
        if any(not 0 <= item < size for item in items):
            raise RequestError(f"a token id is not in 0 to {size - 1}, the model's vocabulary.")
        return items

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the chat template, and the model's own."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset(
            [*self.renderer.stop_ids, *(own if isinstance(own, list) else [own] if own is not None else [])]
        )

    @property
    def statistics(self) -> Statistics:
        """Counts since the engine began."""
        return self._scheduler.statistics

    def snapshot(self) -> Statistics:
        """A copy of the counts, taken between two steps, so that they belong together."""

        def take() -> Statistics:
            counts = copy.deepcopy(self.statistics)
            for decoder in (self._few, self._torch, self._fallback):
                for part, seconds in (decoder.seconds if decoder is not None else {}).items():
                    counts.parts[part] = counts.parts.get(part, 0.0) + seconds
            if self.offload is not None and self.offload.offloaded:
                counts.parts["disk"] = self.offload.waited
            return counts

        counts: Statistics = self._scheduler.between_steps(take)
        return counts

    @property
    def device(self) -> torch.device:
        """What the model is on."""
        device: torch.device = self.model.device
        return device

    @property
    def network(self) -> Network | None:
        """What the decoder runs; None where transformers' own forward does."""
        return None if self._torch is None else self._torch.network

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Of the cached keys and values; None where transformers keeps them."""
        return None if self._torch is None else self._torch.cache.keys.dtype

    def product_costs(self) -> ProductCosts | None:
        """Measure what products with the packed weights cost, between two steps; None: there are none."""
        network = self.network
        costs: ProductCosts | None = (
            None if network is None else self._scheduler.between_steps(lambda: product_costs(network))
        )
        return costs

    def logits(self, prompt: Prompt, *, adapter: str | Mapping[str, float] | None = None) -> torch.Tensor:
        """What the model finds likely after each token of a prompt, computed as in decoding.

        Returns:
            float32 [tokens, vocabulary].

        Raises:
            BusyError: every slot is answering.
            RequestError: an unknown adapter, or a prompt that is empty or too long.
        """
        mix = normalize_adapters(adapter)
        self._known(mix)
        ids = self.token_ids(prompt)
        if not 1 <= len(ids) <= self.max_length:
            raise RequestError(f"the prompt has {len(ids)} tokens; it may have 1 to {self.max_length}.")
        rows: torch.Tensor = self._scheduler.between_steps(lambda: self._scheduler.logits(ids, mix))
        return rows

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._scheduler.running

    def close(self) -> None:
        """Cancel what is running and stop the engine's thread."""
        self._scheduler.close()
        if self.offload is not None:
            self.offload.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _compute_dtype(model: Any) -> torch.dtype:
    """What the model's layers compute in; float32 stands for float16 on CPUs, which have no fast products of it."""
    layer = next((module for module in model.modules() if isinstance(module, Linear4bit)), None)
    dtype: torch.dtype = (layer.compute_dtype if layer is not None else None) or model.dtype
    offered = dtype == torch.bfloat16 or (dtype == torch.float16 and model.device.type != "cpu")
    return dtype if offered else torch.float32


def _with_quantized_head(network: Network) -> Network:
    head = network.head
    if not isinstance(head.weight, torch.Tensor):
        return network
    packed = quantize(head.weight)
    return replace(network, head=Matrix(packed.packed(), head.n, head.k, head.bias))
