"""Checkpoints on the host: gradients to the bit, what stays on the device, and copies that nobody may outrun.

There is no card here, so the CPU stands for one: its lane copies as late as the waits allow, and until then the target
holds NaN. What is used before it was waited for makes NaN of the loss or of a gradient.
"""

from __future__ import annotations

import contextlib
import gc
import io
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

import halfbyte as hb
from halfbyte.errors import RecipeError, RequestError
from halfbyte.train import guards, sft
from halfbyte.train.offload import CudaLane, Offload, check_offloading, cuda_lane
from halfbyte.train.recipe import make_recipe

PATHS = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d"}


class LateLane:
    """Copies when somebody waits for them, in the order in which they were started."""

    def __init__(self):
        self.started = self.done = 0
        self.queue = []
        self.buffers = []  # as they were asked for
        self.most = 0  # copies under way at once
        self.fetched, self.held = [], 0  # what was copied back, and the most of it that was there at once
        self.hosts = set()

    def host(self, nbytes):
        self.buffers.append(nbytes)
        buffer = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self.hosts.add(buffer.data_ptr())
        return buffer

    def start(self, target, source):
        target.fill_(float("nan"))
        self.queue.append((target, source))
        self.started += 1
        if target.data_ptr() not in self.hosts:
            self.fetched.append(StorageWeakRef(target.untyped_storage()))
            self.held = max(self.held, sum(not storage.expired() for storage in self.fetched))
        self.most = max(self.most, len(self.queue))
        return self.started

    def wait(self, copied):
        while self.done < copied:
            target, source = self.queue.pop(0)
            target.copy_(source)
            self.done += 1


@pytest.fixture
def make_model(tmp_path, tiny_llama):
    """The tiny Llama in 4 bits with an adapter and checkpointed layers; with a lane it is offloaded, too."""

    def make(lane=None, *, layers=5, device="cpu", **options):
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path / f"{layers} layers"
        if not folder.exists():
            torch.manual_seed(1)
            config = LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=layers)
            LlamaForCausalLM(config).save_pretrained(folder)
        base = hb.load_model(folder, quantization=hb.HalfbyteConfig(), device=device)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
        model = get_peft_model(base, lora).train()
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
        if lane is not None:
            Offload(lambda _: lane).attach(model)
        return model

    return make


def batch(rows=2, length=12, device="cpu"):
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(length)).to(device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def gradients(model, *batches):
    """Of the sum of the losses, one backward pass for each."""
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    for one in batches:
        model(**one).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys() and len(got) >= 14
    for name, gradient in wanted.items():
        assert gradient.isfinite().all()
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_equal_to_the_bit(make_model, layers, dropout):
    lane = LateLane()
    model = make_model(lane, layers=layers, lora_dropout=dropout)
    got = gradients(model, batch())
    assert_equal(got, gradients(make_model(layers=layers, lora_dropout=dropout), batch()))
    assert len(lane.buffers) == layers
    assert lane.started == 2 * layers - 1  # the last layer's input has not left yet when it is needed


def test_the_emulation_would_show_a_missing_wait(make_model, monkeypatch):
    lane = LateLane()
    model = make_model(lane)
    monkeypatch.setattr(lane, "wait", lambda copied: None)
    assert not all(gradient.isfinite().all() for gradient in gradients(model, batch()).values())


def test_the_next_checkpoint_is_fetched_ahead_and_no_other(make_model):
    lane = LateLane()
    model = make_model(lane)
    loss = model(**batch()).loss
    lane.wait(lane.started)
    lane.most = 0
    loss.backward()
    assert lane.most == 1  # while a layer is computed again the one before it is on its way
    assert lane.held == 2


def test_two_inputs_of_layers_stay_on_the_device(make_model):
    """The last, whose copy is under way, and the first: it is the embeddings' output, which a hook has made a leaf."""
    kept = {}
    for name, lane in {"offloaded": LateLane(), "not": None}.items():
        model = make_model(lane)
        inputs = []

        def look(_, args, inputs=inputs):
            inputs.append(StorageWeakRef(args[0].untyped_storage()))

        hooks = [layer.register_forward_pre_hook(look) for layer in model.get_base_model().model.layers]
        loss = model(**batch()).loss
        kept[name] = [not storage.expired() for storage in inputs]
        for hook in hooks:
            hook.remove()
        loss.backward()
    assert kept == {"offloaded": [True, False, False, False, True], "not": [True] * 5}


def test_host_memory_is_used_again_and_grows_with_the_rows(make_model):
    lane = LateLane()
    model = make_model(lane)
    size = 2 * 12 * 32 * 4
    wanted = make_model()
    for lengths in ((12,), (12,), (5,), (12, 5)):
        batches = [batch(length=length) for length in lengths]
        assert_equal(gradients(model, *batches), gradients(wanted, *batches))
    assert lane.buffers == [size] * 5
    gradients(model, batch(length=13))
    assert lane.buffers == [size] * 5 + [size * 13 // 12] * 5


def test_a_step_that_fails_gives_its_memory_back(make_model):
    """A copy that is under way is waited for, since its target is somebody else's memory afterwards."""
    lane = LateLane()
    model = make_model(lane)
    layer = model.get_base_model().model.layers[2]
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) > 1:
            raise ZeroDivisionError

    hook = layer.self_attn.register_forward_hook(fail)  # once in the forward pass, and again where it is computed again
    with pytest.raises(ZeroDivisionError):
        gradients(model, batch())
    hook.remove()
    gc.collect()
    assert lane.done == lane.started
    assert_equal(gradients(model, batch()), gradients(make_model(), batch()))
    assert len(lane.buffers) == 5


def test_two_forward_passes_before_a_backward_pass(make_model):
    """As KTO and DPO do."""

    def both(model):
        model.zero_grad()
        (model(**batch()).loss * model(**batch(length=7)).loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_equal(both(make_model(LateLane())), both(make_model()))


def test_a_graph_that_is_kept_is_gone_through_twice(make_model):
    def twice(model):
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_equal(twice(make_model(LateLane())), twice(make_model()))


def test_what_needs_no_gradient_or_is_no_plain_tensor_stays(make_model):
    lane = LateLane()
    offload = Offload(lambda _: lane)
    for tensor in (
        torch.ones(3, 4),
        torch.ones(3, 4, requires_grad=True).t(),
        torch.nn.Parameter(torch.ones(3)),
    ):
        assert offload._pack(tensor) is tensor
    assert lane.started == 0
    assert cuda_lane(torch.device("cpu")) is None
    with torch.no_grad():
        make_model(lane)(**batch())
    make_model(lane).eval()(**batch()).loss.backward()
    assert lane.started == 0


def test_it_is_gone_with_the_model(make_model):
    lane = LateLane()
    model = make_model(lane)
    gradients(model, batch())
    gone = weakref.ref(lane)
    del model, lane
    gc.collect()
    assert gone() is None


def test_an_encoder_whose_mask_is_given_by_position(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    found = {}
    for name, lane in {"offloaded": LateLane(), "not": None}.items():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64)).train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        if lane is not None:
            Offload(lambda _, lane=lane: lane).attach(model)
        torch.manual_seed(0)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, 7:] = 0
        model(input_ids=batch()["input_ids"], attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
        if lane is not None:
            assert len(lane.buffers) == 3
    assert_equal(found["offloaded"], found["not"])


def test_a_model_without_checkpointed_layers_is_refused():
    with pytest.raises(RequestError, match="Linear has no layers that transformers checkpoints"):
        Offload().attach(torch.nn.Linear(2, 2))


def test_the_recipe_key():
    with pytest.raises(RecipeError, match="activation_offloading is true but gradient_checkpointing is not"):
        make_recipe({**PATHS, "activation_offloading": True})
    with pytest.raises(RecipeError) as found:
        make_recipe({**PATHS, "activation_offloading": True, "gradient_checkpointing": "perhaps"})
    assert len(found.value.mistakes) == 1
    recipe = make_recipe({**PATHS, "activation_offloading": True, "gradient_checkpointing": True})
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="needs a CUDA device, and there is none"):
            check_offloading(recipe)
    check_offloading(make_recipe(PATHS))


LETTERS = "abcdefg"
TASKS = {
    "causal-lm": [{"prompt": c, "completion": c * n} for n, c in enumerate(LETTERS, 2)],
    "preference": [{"prompt": c, "chosen": c.upper() * 3, "rejected": c * n} for n, c in enumerate(LETTERS, 2)],
    "kto": [{"prompt": c, "completion": c * n, "label": n % 2 == 0} for n, c in enumerate(LETTERS, 2)],
    "sequence-classification": [{"text": c * n, "label": n % 2} for n, c in enumerate(LETTERS, 2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_each_task_gives_equal_weights(task, tiny_llama, write_rows, tmp_path, monkeypatch):
    """KTO and DPO have more than one forward pass to a backward pass, some of them without gradients."""
    lane = LateLane()
    monkeypatch.setattr(guards, "Offload", lambda: Offload(lambda _: lane))
    monkeypatch.setattr(sft, "check_offloading", lambda recipe: None)
    data = str(write_rows(TASKS[task]))
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "lora_r": 4}
    trained = {}
    for offloaded in (True, False):
        place = tmp_path / str(offloaded)
        paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(place), "dataset": data, "task": task}
        keys = {"gradient_checkpointing": True, "activation_offloading": offloaded, "lora_dropout": 0.1, "samples": 0}
        sft.train(make_recipe({**paths, **keys, **sizes}), console=Console(file=io.StringIO()))
        trained[offloaded] = load_file(place / "adapter_model.safetensors")
        # Two layers, of which both inputs go out and one comes back; two steps of two micro-batches.
        assert lane.started >= 2 * 2 * 3
        assert lane.done == lane.started
    assert_equal(trained[True], trained[False])


def test_what_a_cuda_lane_asks_of_streams(make_model, monkeypatch):
    """In which order: the copy after what was computed, and what is computed next after the copy."""
    asked = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            asked.append(f"{self.name} records")
            return f"event {len(asked)}"

        def wait_event(self, event):
            asked.append(f"{self.name} waits for {event}")

    computing = Stream("computing")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(asked.append(f"on {stream.name}")))
    lane = CudaLane(torch.device("cpu"))
    monkeypatch.setattr(lane, "_pinned", False)
    got = gradients(make_model(lane, layers=2), batch())
    copy = ["side waits for computing", "on side", "side records"]
    forward = [*copy, *copy, "computing waits for event 3"]  # the second checkpoint lets the first one go
    backward = ["computing waits for event 6", *copy, "computing waits for event 11"]  # fetched ahead, then waited for
    assert asked == forward + backward
    assert_equal(got, gradients(make_model(layers=2), batch()))


def test_pinned_memory_that_ends_is_followed_by_pageable(monkeypatch):
    lane = CudaLane.__new__(CudaLane)  # its stream needs a card
    lane._pinned = True
    asked = []
    empty = torch.empty

    def refuse(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore of it")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match=r"no more pinned memory; .* \(CUDA error: out of memory\)"):
        assert lane.host(5).numel() == 5
    assert lane.host(6).numel() == 6
    assert asked == [True, False, False]


@pytest.mark.gpu
def test_on_a_card(make_model):
    """To the bit as on the CPU, at a length at which copies take a while; and the card holds less."""
    found, held = {}, {}
    for offloaded in (True, False):
        model = make_model(layers=8, device="cuda")
        if offloaded:
            Offload().attach(model)
        one = batch(rows=64, length=64, device="cuda")
        for _ in range(3):
            found[offloaded] = gradients(model, one)
        before = torch.cuda.memory_allocated()
        loss = model(**one).loss
        held[offloaded] = torch.cuda.memory_allocated() - before
        loss.backward()
        del model, loss
    assert_equal(found[True], found[False])
    assert held[False] - held[True] >= 5 * 64 * 64 * 32 * 4
