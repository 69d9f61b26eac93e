"""Spans of tagged words, and which tags make them: what F1 of named entities is counted over.

A tag is `O`, or a letter and a type: B and I begin and go on, E (or L) ends, S (or U) is one word. The rules are those
of conlleval, the script of the CoNLL shared tasks, and so of seqeval: an entity also begins where one word's type
differs from the word's before, and `I` after `O` begins one, so tags of the older IOB1 kind are read right, too. An
entity counts as found when its type and both its ends are right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_TAG = re.compile(r"O|(?P<letter>[BIELSU])(-(?P<type>.+))?")
Entity = tuple[str, int, int]


def are_entity_tags(names: Iterable[str]) -> bool:
    """Whether these names of classes mark spans: all are `O` or a letter and a type, and some is the latter."""
    found = [_TAG.fullmatch(name) for name in names]
    return all(found) and any(match and match["letter"] for match in found)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Type, first word and last word of each entity.

    Args:
        tags: of the words of one sentence, see `are_entity_tags`.
    """
    found: set[Entity] = set()
    begun, before, kind = 0, "O", ""
    for at, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        assert match is not None
        letter, new = match["letter"] or "O", match["type"] or ""
        goes_on = before in "BI" and letter in "IEL" and new == kind
        if before != "O" and not goes_on:
            found.add((kind, begun, at - 1))
        if not goes_on:
            begun = at
        before, kind = letter, new
    return found
