"""KL and agreement against the definition, on models whose logits are a table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import RequestError
from halfbyte.evaluate import parity, reference

WORDS = 5


class Table:
    """A language model whose next token depends on the last one only."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor, limit: int | None = None) -> None:
        self.table = table
        text = SimpleNamespace(max_position_embeddings=limit)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def __call__(self, ids, **_):
        return SimpleNamespace(logits=self.table[ids], past_key_values=None)


def test_a_model_agrees_with_itself():
    model = Table(torch.randn(WORDS, WORDS))
    found = parity(reference(model, [[1, 2], [3]], max_new_tokens=4), model)
    assert (found.kl, found.largest_kl, found.agreement) == (0, 0, 1)
    assert found.positions == (2 + 4 - 1) + (1 + 4 - 1)


def test_kl_and_agreement_are_the_definition():
    p, q = Table(torch.randn(WORDS, WORDS)), Table(torch.randn(WORDS, WORDS))
    wanted = reference(p, [[0, 4, 2]], max_new_tokens=6)
    ids = wanted.rows[0]
    assert len(ids) == 9 and ids[3] == int(p.table[2].argmax())
    found = parity(wanted, q)
    logs = [(p.table[i].log_softmax(-1), q.table[i].log_softmax(-1)) for i in ids[:-1]]
    each = [(log_p.exp() * (log_p - log_q)).sum() for log_p, log_q in logs]
    assert found.kl == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert found.largest_kl == pytest.approx(float(max(each)), rel=1e-5)
    same = [int(p.table[i].argmax() == q.table[i].argmax()) for i in ids[2:-1]]  # the answer's positions only
    assert found.agreement == pytest.approx(sum(same) / len(same))


def test_the_context_bounds_an_answer_and_refuses_a_prompt():
    model = Table(torch.randn(WORDS, WORDS), limit=5)
    assert len(reference(model, [[1, 2]]).rows[0]) == 5
    for row in ([], [1] * 5):
        with pytest.raises(RequestError, match="prompt 1 has"):
            reference(model, [row])


def test_another_vocabulary_is_refused():
    wanted = reference(Table(torch.randn(WORDS, WORDS)), [[1]], max_new_tokens=2)
    with pytest.raises(RequestError, match="7 and 5 tokens"):
        parity(wanted, Table(torch.randn(WORDS, 7)))
