"""Write docs/recipe.md from the recipe's own fields, so that the page cannot disagree with the code.

python tools/make_docs.py            write the page
python tools/make_docs.py --check    exit 1 when the page is stale (a test does this)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic_core import PydanticUndefined

from halfbyte.train.recipe import Recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
HEAD = """# The recipe

One YAML file says what `halfbyte train` does. Names follow transformers and peft. A path in a recipe is relative to the
recipe's folder; a path given with `--set key=value` is relative to the current directory. Every mistake is reported at
once, before anything is loaded or written. This page is written by `tools/make_docs.py` from the code.

| key | values | default | |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    rows = []
    for name, field in Recipe.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{_shown(field.default)}`"
        rows.append(f"| `{name}` | {_values(field.annotation)} | {default} | {field.description or ''} |")
    return HEAD + "\n".join(rows) + "\n"


def _values(annotation: Any) -> str:
    """A type in words: literals one by one, types by name."""
    if annotation is type(None):
        return "`null`"
    if get_origin(annotation) is tuple:
        return "name or list of names"
    if get_origin(annotation) is dict:
        return "mapping of name to number"
    members = get_args(annotation)
    if not members:
        return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}.get(annotation, str(annotation))
    return ", ".join(_values(member) if not isinstance(member, str | int) else f"`{member}`" for member in members)


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "[]" if default == () else str(default)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
