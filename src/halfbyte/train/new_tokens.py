"""New tokens: the tokenizer gets them, and of the embeddings only their rows are trained.

peft's `trainable_token_indices` do the training: the rows lie beside the frozen matrix and stand in for its own at each
use, in the head too where that is tied to the embeddings. So the adapter holds these rows and nothing else. (Training
the embeddings whole, by `modules_to_save`, makes adapters of hundreds of megabytes out of a dozen tokens: peft#1335,
trl#1287.) The rows *replace* those of the base, so it does not matter what a base that is resized later begins with.

**A new row starts as the mean of the rows of the pieces** that the tokenizer made of the token before. Random rows are
like no row that the layers behind have ever seen, and a random row of a head may claim most of the probability at once
(Hewitt 2021, "Initializing new word embeddings"); the mean of pieces lies among the known rows and means about what
the text meant before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfbyte.errors import RequestError
from halfbyte.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.train.recipe import Recipe

Pieces = dict[int, list[int]]


def tokenizer_of(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Pieces]:
    """The recipe's tokenizer with the new tokens, and for each of their ids those of the pieces it was before.

    Raises:
        CheckpointError: there is no tokenizer.
        RequestError: a token is no new one, or the tokenizer does not find it in a text.
    """
    from halfbyte.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model_name_or_path)
    tokens = list(recipe.new_tokens)
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise RequestError(f"new_tokens: {token!r} is in the tokenizer's vocabulary already; leave it out.")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(tokens)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    for token, index in zip(tokens, ids, strict=True):
        if index not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise RequestError(f"new_tokens: the tokenizer does not find {token!r} in a text, even where it is added.")
    return tokenizer, dict(zip(ids, pieces, strict=True))


@torch.no_grad()
def add_rows(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Make the embeddings, and the head, as large as the vocabulary, and set the new rows.

    Raises:
        RequestError: they are quantized, or the head has a bias.
    """
    from halfbyte.models import resize_vocabulary

    name_of = {id(module): name for name, module in model.named_modules()}
    for layer in _layers(model):
        name, weight = name_of[id(layer)], layer.weight
        if isinstance(weight, QuantizedTensor):
            raise RequestError(f"new_tokens need rows in {name}, which is in {weight.spec.format}; leave it as it was.")
        if getattr(layer, "bias", None) is not None:
            raise RequestError(f"new_tokens: {name} has a bias, which peft leaves out beside rows of new tokens.")
    resize_vocabulary(model, max(pieces) + 1)
    for layer in _layers(model):
        rows = layer.weight.data
        for index, parts in pieces.items():
            rows[index] = rows[list(parts) or slice(0, min(pieces))].float().mean(0)


def trained_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """What peft's `trainable_token_indices` has to say: the embeddings, and the head where it is not tied to them."""
    name_of = {id(module): name for name, module in model.named_modules()}
    return {name_of[id(layer)]: list(ids) for layer in _layers(model)}


def show_bias(model: Any) -> None:
    """Let trl's fused head read a wrapped head's bias: peft's wrapper shows the weight only. There is none."""
    head = model.get_output_embeddings()
    if hasattr(head, "token_adapter"):
        head.bias = None


def _layers(model: PreTrainedModel) -> list[Any]:
    """The embeddings, and the head if it has a matrix of its own."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return [embeddings] if not isinstance(head, nn.Linear) or head.weight is embeddings.weight else [embeddings, head]
