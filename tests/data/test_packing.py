"""Packing: nothing is lost, no row sees its neighbour, and the loss and its gradients are those of single rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import IGNORE, Example, Renderer, check_isolation, pack, pad_rows, read_examples, tokenize
from halfbyte.data.packing import best_fit
from halfbyte.errors import RequestError

# Sums differ in order alone. Each gradient is a sum of a few hundred float32 products, whose
# rounding errors are about 6e-8 each and grow like the root of their number; 1e-6 is the bound that a user can rely on.
RELATIVE = 1e-6


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_places_every_row_once_and_within_capacity(lengths, capacity):
    lengths = np.array(lengths, dtype=np.int32)
    rows, counts = best_fit(lengths, capacity)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    packs = np.split(lengths[rows], np.cumsum(counts)[:-1]) if len(counts) else []
    assert all(0 < pack.sum() <= capacity for pack in packs)
    least = -(-int(lengths.sum()) // capacity)
    assert len(counts) <= max(least, 11 * least / 9 + 6 / 9 + sum(lengths * 2 > capacity))


def test_best_fit_prefers_the_pack_that_it_fills():
    rows, counts = best_fit(np.array([6, 3, 5, 4, 2]), 10)  # by length: 6 | 5 | 4 to the 6 | 3 to the 5 | 2 to that
    assert (rows.tolist(), counts.tolist()) == ([0, 3, 1, 2, 4], [2, 3])


def talks(count, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Example(
            f"row {n}",
            (
                {"role": "user", "content": "abc"[n % 3] * int(draw.integers(1, 9))},
                {"role": "assistant", "content": "xyz"[n % 3] * int(draw.integers(1, 9))},
            ),
        )
        for n in range(count)
    ]


def rows_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(0, 99), st.sampled_from(["completion", "all"]))
def test_packs_hold_the_rows_and_no_label_crosses_a_boundary(tiny_tokenizer, count, seed, train_on):
    data = tokenize(talks(count, seed), Renderer(tiny_tokenizer), max_length=24, train_on=train_on)
    packed = pack(data, 24)
    found = []
    for row in rows_of(packed.dataset):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 24
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORE
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    expected = [(row["input_ids"], row["labels"]) for row in rows_of(data.dataset)]
    assert sorted(found) == sorted(expected)
    assert packed.report.trained == sum(x != IGNORE for row in packed.dataset["labels"][:] for x in row)
    assert packed.facts.length.tolist() == [len(ids) for ids in packed.dataset["input_ids"][:]]


def test_packs_are_kept(tiny_tokenizer, tmp_path, write_rows):
    rows = [{"prompt": "q" * (n % 5), "completion": "a"} for n in range(50)]
    read = read_examples(write_rows(rows))
    data = tokenize(read, Renderer(tiny_tokenizer), max_length=24, train_on="completion", cache=tmp_path / "cache")
    packs = [pack(data, width, cache=tmp_path / "cache") for width in (24, 24, 48)]
    assert packs[0].dataset.cache_files == packs[1].dataset.cache_files != packs[2].dataset.cache_files
    assert len(packs[2].dataset) < len(packs[0].dataset) < 50
    assert "50 rows are packed into" in str(packs[0].report)


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["tiny", "stories260K"])
def real_and_tiny(request, tiny_llama):
    if request.param == "tiny":
        return load(tiny_llama)
    return load(request.getfixturevalue("assets") / "models" / "stories260K")


def gradients(model, batches):
    """The summed loss of batches over all their trained tokens, and its gradients, in the order of the parameters."""
    model.zero_grad()
    total = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        part = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        (part / total).backward()
        loss += part.item() / total
    return loss, [p.grad.clone() for p in model.parameters()]


def distance(one, other):
    """Between two gradients as vectors of all parameters, relative to the second's length."""
    one, other = (torch.cat([tensor.flatten() for tensor in tensors]).double() for tensors in (one, other))
    return float((one - other).norm() / other.norm())


def pad_left(rows, pad_id):
    """The rows of `pad_rows`, moved to the right; positions as transformers' generate gives them."""
    batch = {name: tensor.clone() for name, tensor in pad_rows(rows, pad_id).items()}
    for index, row in enumerate(rows):
        for tensor in batch.values():
            tensor[index] = tensor[index].roll(tensor.shape[1] - len(row["input_ids"]))
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def arranged(rows, packs, pad_id):
    """The same rows in other batches."""
    return {
        "batches of 4": [pad_rows(rows[i : i + 4], pad_id) for i in range(0, len(rows), 4)],
        "all at once": [pad_rows(rows, pad_id)],
        "backwards": [pad_rows(rows[i : i + 4][::-1], pad_id) for i in range(0, len(rows), 4)][::-1],
        "padded on the left": [pad_left(rows[i : i + 4], pad_id) for i in range(0, len(rows), 4)],
        "packed": [pad_rows([row], pad_id) for row in packs],
        "packed, batches of 3": [pad_rows(packs[i : i + 3], pad_id) for i in range(0, len(packs), 3)],
    }


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_loss_and_gradients_do_not_depend_on_how_rows_are_arranged(real_and_tiny, train_on):
    model, tokenizer = real_and_tiny
    data = tokenize(talks(24), Renderer(tokenizer), max_length=60, train_on=train_on)
    rows, packs = rows_of(data.dataset), rows_of(pack(data, 60).dataset)
    assert len(packs) <= len(rows) / 2
    pad_id = tokenizer.eos_token_id
    loss, expected = gradients(model, [pad_rows([row], pad_id) for row in rows])
    for name, batches in arranged(rows, packs, pad_id).items():
        got, found = gradients(model, batches)
        assert got == pytest.approx(loss, rel=RELATIVE), name
        assert distance(found, expected) < RELATIVE, name


def test_the_check_above_can_fail(tiny_llama):
    """With one mask over a whole pack, and with a label that crosses a boundary, gradients are far off."""
    model, tokenizer = load(tiny_llama)
    data = tokenize(talks(24), Renderer(tokenizer), max_length=60, train_on="all")
    rows, packs = rows_of(data.dataset), rows_of(pack(data, 60).dataset)
    _, expected = gradients(model, [pad_rows([row], 2) for row in rows])
    seen = [{**pad_rows([row], 2), "attention_mask": torch.ones(1, len(row["input_ids"]))} for row in packs]
    assert distance(gradients(model, seen)[1], expected) > 1000 * RELATIVE
    crossing = copy.deepcopy(packs)
    for row in crossing:
        row["labels"] = row["input_ids"]
    assert distance(gradients(model, [pad_rows([row], 2) for row in crossing])[1], expected) > 1000 * RELATIVE


def test_a_model_that_lets_packed_rows_see_each_other_is_refused(tiny_llama):
    model, _ = load(tiny_llama)
    check_isolation(model)
    forward = model.forward

    def own_mask(input_ids, position_ids, **kwargs):
        return forward(input_ids, torch.ones_like(input_ids), position_ids, **kwargs)

    model.forward = own_mask
    with pytest.raises(RequestError, match=r"packed rows see each other; set packing: false"):
        check_isolation(model)
