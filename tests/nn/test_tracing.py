"""No data-dependent Python: a step is one graph to torch.compile, and runs where there is no data to look at."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import halfbyte as hb
from halfbyte import nn
from halfbyte.models import fused
from halfbyte.nn.parts import OWN

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch._dynamo.reset()


def compiled(f):
    """One graph or an error; its operations run as they are, since no compiler of C++ is needed to know."""
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def result_and_gradients(f, *tensors):
    for tensor in tensors:
        tensor.grad = None
    result = f(*tensors)
    result.square().sum().backward()
    return [result.detach(), *(None if tensor.grad is None else tensor.grad.clone() for tensor in tensors)]


def assert_traced(f, *tensors):
    for got, wanted in zip(result_and_gradients(compiled(f), *tensors), result_and_gradients(f, *tensors), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_product_with_its_branch(dropout):
    q = hb.quantize(torch.randn(32, 64))
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 64), (4, 64), (32, 4)))

    def f(x, a, b):
        return nn.lora_linear(x, hb.QuantizedTensor.packed(q), None, a, b, 0.5, dropout)

    if dropout:  # torch.compile draws other numbers: that it is one graph is what is asked for
        assert result_and_gradients(compiled(f), x, a, b)[1].norm() > 0
    else:
        assert_traced(f, x, a, b)
        with torch.no_grad():
            assert torch.equal(compiled(f)(x, a, b), f(x, a, b))


def test_products_of_one_input():
    weights = [hb.quantize(torch.randn(rows, 64)) for rows in (32, 16)]
    shapes = (5, 64), (4, 64), (32, 4), (2, 64), (16, 2)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def f(x, *adapters):
        layers = [
            nn.LoraWeights(hb.QuantizedTensor.packed(q), None, a, b, 0.5)
            for q, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True)
        ]
        return torch.cat(nn.lora_linears(x, layers), 1)

    assert_traced(f, *tensors)


@pytest.mark.parametrize("num_items", [None, 7])
def test_a_loss_with_ignored_labels(num_items, monkeypatch):
    """Several chunks; the traced loss projects ignored tokens too, and counts them out."""
    monkeypatch.setattr("halfbyte.nn.cross_entropy.CHUNK_ROWS", 4)
    monkeypatch.setattr("halfbyte.nn.cross_entropy.CHUNK_ROWS_LEAST", 4)
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((11, 8), (33, 8), (33,)))
    labels = torch.randint(33, (11,))
    labels[[0, 3, 4, 5, 6, 10]] = -100

    def f(hidden, weight, bias):
        return nn.linear_cross_entropy(hidden, weight, labels, bias, num_items=num_items)

    found = result_and_gradients(compiled(f), hidden, weight, bias)
    for got, wanted in zip(found, result_and_gradients(f, hidden, weight, bias), strict=True):
        # The sums have zeros more, and other chunks: a few units in the last place.
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert (found[1][labels == -100] == 0).all()


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.11", reason="graphs break with torch 2.6 and 2.7; up to 2.11 none was tried")
def test_a_training_step_of_a_whole_model(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    base = hb.load_model(tmp_path, quantization=hb.HalfbyteConfig())
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    ids = torch.randint(96, (2, 9))
    found = []
    for f in (compiled(loss), loss):
        model.zero_grad()
        f(ids).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 7 * 2
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-6 * found[1][name].norm(), name


@pytest.fixture
def on_meta(monkeypatch):
    """The 4-bit model with adapters on a device that is no CPU and has no numbers, where `item` is an error."""
    from halfbyte.models.peft_dispatch import register_dispatcher

    monkeypatch.setattr(fused, "operations", lambda tensor: OWN)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # torch knows none for it
    register_dispatcher()
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed = hb.quantize(torch.randn(module.weight.shape, device="cpu")).to("meta")
                layer = hb.Linear4bit(module.in_features, module.out_features, bias=False)
                layer.weight = torch.nn.Parameter(packed, requires_grad=False)
                model.set_submodule(name, layer)
        fused.fuse(model.requires_grad_(False))
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_ask_for_no_number(on_meta, checkpointing):
    """Neither do layers that are computed again. Left out: transformers' masks and the loss, which ask once."""
    if checkpointing:
        on_meta.enable_input_require_grads()
        on_meta.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device="meta")
    hidden = on_meta.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden.square().sum().backward()
    assert sum(p.grad is not None for p in on_meta.parameters()) == 2 * 7 * 2
    with pytest.raises(RuntimeError, match="meta"):
        hidden.sum().item()


class Asked(TorchDispatchMode):
    """Counts what a device would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_loss_asks_for_its_labels_once():
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(33, 8)
    labels = torch.randint(33, (30,))
    labels[::3] = -100
    with Asked() as asked:
        nn.linear_cross_entropy(hidden, weight, labels, num_items=torch.tensor(5)).backward()
    assert asked.found == ["aten.nonzero.default"]
