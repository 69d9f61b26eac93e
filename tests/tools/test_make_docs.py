"""The recipe's page is what the code says."""

from __future__ import annotations

import make_docs


def test_recipe_page_is_not_stale():
    assert make_docs.PAGE.read_text(encoding="utf-8") == make_docs.page(), "run: python tools/make_docs.py"


def test_every_key_has_a_line():
    lines = make_docs.page().splitlines()
    for name in make_docs.Recipe.model_fields:
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1
