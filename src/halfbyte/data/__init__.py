"""Data files -> conversations -> tokens with a loss mask.

One direction, one module for each step:

    sources.py         what a recipe names: files, folders, data sets on the hub
    read.py            a file becomes rows, each of which knows the line it came from
    turns.py           turns and tool calls, brought to one spelling
    conversations.py   a row becomes an example: messages, or plain text
    preferences.py     a row becomes a pair of answers, or an answer and whether it is good
    labels.py          a row becomes a text and the name of its class; the way of a classifier, which renders nothing
    tagged.py          a row becomes words and their tags, and these stand at the first tokens of the words
    examples.py        the rows of all sources as one sequence: checked, mixed by weight, split by seed
    render.py          messages become the text a model sees; the same renderer serves training and inference
    tokens.py          text becomes token ids and labels; what is not trained is known here, and nowhere later
    pairs.py           the same for pairs of answers and judged answers
    packing.py         several rows in one, each of which sees only itself
    preview.py         rows as the model sees them, and the odd ones
    store.py           rows of token ids on disk, found again by what they were made from
    eviction.py        which of them go when they are too many
"""

from __future__ import annotations

from halfbyte.data.conversations import Example, read_examples
from halfbyte.data.examples import Examples
from halfbyte.data.labels import LabelledText, count_labels, label_names, read_labelled, tokenize_labelled
from halfbyte.data.lengths import LengthReport, RowFacts, Tokenized
from halfbyte.data.packing import check_isolation, pack
from halfbyte.data.pairs import tokenize_judgments, tokenize_preferences
from halfbyte.data.preferences import Judgment, Preference, read_judgments, read_preferences
from halfbyte.data.preview import Oddity, odd_labels, odd_rows, shown_answers, shown_row
from halfbyte.data.problems import Problems
from halfbyte.data.read import Row, read_rows
from halfbyte.data.render import IGNORE, Renderer
from halfbyte.data.sources import Source, is_hub_dataset
from halfbyte.data.tagged import TaggedText, read_tagged, shown_tags, tokenize_tagged
from halfbyte.data.tokens import pad_rows, tokenize
from halfbyte.data.turns import Message

__all__ = [
    "IGNORE",
    "Example",
    "Examples",
    "Judgment",
    "LabelledText",
    "LengthReport",
    "Message",
    "Oddity",
    "Preference",
    "Problems",
    "Renderer",
    "Row",
    "RowFacts",
    "Source",
    "TaggedText",
    "Tokenized",
    "check_isolation",
    "count_labels",
    "is_hub_dataset",
    "label_names",
    "odd_labels",
    "odd_rows",
    "pack",
    "pad_rows",
    "read_examples",
    "read_judgments",
    "read_labelled",
    "read_preferences",
    "read_rows",
    "read_tagged",
    "shown_answers",
    "shown_row",
    "shown_tags",
    "tokenize",
    "tokenize_judgments",
    "tokenize_labelled",
    "tokenize_preferences",
    "tokenize_tagged",
]
