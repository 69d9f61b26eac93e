"""Stopping and going on: the same bits, whatever the state is and wherever it lies; what does not fit is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import CheckpointError, RequestError

SHAPES = ((129, 65), (4096,), (300,), (0,), (20000,))
CASES = {
    "float32": {"state": "float32"},
    "8bit": {"state": "8bit"},
    "4bit": {"state": "4bit"},
    "8bit paged": {"state": "8bit", "paged": "file", "page_budget": 1 << 16},
    "float32 paged": {"state": "float32", "paged": "file", "page_budget": 1 << 16},
    "4bit master": {"state": "4bit", "bf16": "master"},
    "8bit clipped": {"state": "8bit", "max_grad_norm": 0.1},
}


def parameters(dtype):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def advance(params, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, p in enumerate(params):
            # The third parameter has no gradient in some steps, so steps differ between parameters.
            p.grad = None if number == 2 and step % 3 == 0 else torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def saved(optimizer):
    """A state dict that went through a file, read the safe way."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_not_stopped(case, dtype):
    options = {"lr": 1e-2, **CASES[case]}
    whole = parameters(dtype)
    advance(whole, hb.optim.AdamW(whole, seed=5, **options), 0, 7)
    for stop in range(1, 7):
        params = parameters(dtype)
        optimizer = hb.optim.AdamW(params, seed=5, **options)
        advance(params, optimizer, 0, stop)
        state = saved(optimizer)
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = hb.optim.AdamW(again, **options)  # the seed comes from the state
        resumed.load_state_dict(state)
        advance(again, resumed, stop, 7)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True)), stop


def test_a_state_moves_between_memory_and_file():
    params = parameters(torch.float32)
    optimizer = hb.optim.AdamW(params, state="8bit", paged="file")
    advance(params, optimizer, 0, 3)
    again = copy.deepcopy(params)
    other = hb.optim.AdamW(again, state="8bit")
    other.load_state_dict(optimizer.state_dict())
    advance(params, optimizer, 3, 5)
    advance(again, other, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))


def test_settings_come_along_and_the_kind_of_state_does_not():
    params = parameters(torch.float32)
    optimizer = hb.optim.AdamW(params, lr=0.5, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    advance(params, optimizer, 0, 1)
    other = hb.optim.AdamW(params)
    other.load_state_dict(optimizer.state_dict())
    ours, theirs = optimizer.param_groups[0], other.param_groups[0]
    assert all(ours[key] == theirs[key] for key in ("lr", "betas", "eps", "weight_decay", "initial_lr"))


def test_hooks_of_torch_are_called():
    params = parameters(torch.float32)
    optimizer, seen = hb.optim.AdamW(params), []
    optimizer.register_load_state_dict_pre_hook(lambda _o, state: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda _o: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _o, state: seen.append("written"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["written", "before", "after"]


def damaged(state):
    """Name -> a state dict with one thing wrong, and what the sentence says."""
    cases = {}

    def case(name, sentence, change):
        wrong = copy.deepcopy(state)
        changed = change(wrong)
        cases[name] = (changed if name in ("empty", "no dict") else wrong, sentence)

    case("version", "has format 2, and this halfbyte reads format 1", lambda s: s["halfbyte"].update(version=2))
    case("empty", "no optimizer state, or a damaged one", lambda s: {"state": {}})
    case("no dict", "no optimizer state, or a damaged one", lambda s: [1, 2])
    case("tag", "no optimizer state, or a damaged one", lambda s: s.update(halfbyte={"version": 1}))
    case("groups", r"groups of \[1\] parameters.* of \[5\]", lambda s: s["param_groups"][0].update(params=[0]))
    case("missing", "lacks or should lack absmax1", lambda s: s["state"][0].pop("absmax1"))
    case("moment", "is damaged: it has", lambda s: s["state"][0].pop("state1"))
    case("shape", r"absmax1 of parameter 0 .*\(3,\)", lambda s: s["state"][0].update(absmax1=torch.zeros(3)))
    case("dtype", "state1 of .* is torch.int8", lambda s: s["state"][0].update(state1=s["state"][0]["state1"].char()))
    case("nan", "absmax2 of .* is not finite", lambda s: s["state"][4]["absmax2"].fill_(torch.nan))
    case("step", "its step is 0", lambda s: s["state"][4].update(step=torch.tensor(0.0)))
    case("no step", "is damaged: it has", lambda s: s["state"][4].pop("step"))
    case("text", "something but tensors", lambda s: s["state"][4].update(extra="?"))
    return cases


def test_what_does_not_fit_is_one_sentence_and_changes_nothing():
    params = parameters(torch.float32)
    optimizer = hb.optim.AdamW(params, state="8bit")
    advance(params, optimizer, 0, 2)
    state = saved(optimizer)
    for name, (wrong, sentence) in damaged(state).items():
        with pytest.raises(CheckpointError, match=sentence):
            optimizer.load_state_dict(wrong)
        now = optimizer.state_dict()
        same = [torch.equal(now["state"][i][k], t) for i, s in state["state"].items() for k, t in s.items()]
        assert all(same), name
    with pytest.raises(
        CheckpointError, match="is 8bit, and this optimizer keeps it in 4bit; make it with state='8bit'"
    ):
        hb.optim.AdamW(params, state="4bit").load_state_dict(state)
    names = ["embed.weight", "b", "c", "d", "e"]
    with pytest.raises(
        CheckpointError, match=r"state of embed\.weight is 8bit, and this optimizer keeps it in float32"
    ):
        hb.optim.AdamW(zip(names, params, strict=True), state="8bit").load_state_dict(state)


def test_bitsandbytes_has_no_4bit_states_and_no_masters():
    for options, dtype in (({"state": "4bit"}, torch.float32), ({"state": "8bit", "bf16": "master"}, torch.bfloat16)):
        params = parameters(dtype)
        optimizer = hb.optim.AdamW(params, **options)
        advance(params, optimizer, 0, 1)
        with pytest.raises(RequestError, match="bitsandbytes has neither"):
            optimizer.bitsandbytes_state_dict()
