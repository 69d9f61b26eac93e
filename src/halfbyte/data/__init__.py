"""Data files -> conversations -> tokens with a loss mask.

One direction, one module for each step:

    read.py            a file becomes rows, each of which knows the line it came from
    conversations.py   a row becomes an example: messages, or plain text
    labels.py          a row becomes a text and the name of its class; the way of a classifier, which renders nothing
    render.py          messages become the text a model sees; the same renderer serves training and inference
    tokens.py          text becomes token ids and labels; what is not trained is known here, and nowhere later
"""

from __future__ import annotations

from halfbyte.data.conversations import Example, Message, read_examples
from halfbyte.data.labels import LabelledText, label_names, read_labelled, tokenize_labelled
from halfbyte.data.read import Row, read_rows
from halfbyte.data.render import IGNORE, Renderer
from halfbyte.data.tokens import LengthReport, Tokenized, pad_rows, tokenize

__all__ = [
    "IGNORE",
    "Example",
    "LabelledText",
    "LengthReport",
    "Message",
    "Renderer",
    "Row",
    "Tokenized",
    "label_names",
    "pad_rows",
    "read_examples",
    "read_labelled",
    "read_rows",
    "tokenize",
    "tokenize_labelled",
]
