"""A tokenizer as GGUF metadata, or a sentence that says why llama.cpp would cut text differently.

llama.cpp does not run tokenizer.json. It has four tokenizers of its own, and the file picks one and fills its tables; a
wrong pick gives a model that runs and answers worse, which nobody sees. So the pick is made from what the tokenizer
*does* (its model, normalizer and pre-tokenizer, as transformers runs them), and what does not match is refused. The
usual converter tells byte-level pre-tokenizers apart by a hash over a test text; one added token changes that hash.

| tokenizer | GGUF | what has to hold |
|---|---|---|
| BPE with byte fallback, spaces as ▁ (Llama 2, Gemma) | `llama` | the merges have each pair that makes a token |
| byte-level BPE (Llama 3, Qwen, GPT-2) | `gpt2` | its regular expression is one of `_PRE` |
| one token a character | `t5` | no token of several characters |

`llama` merges the pair whose result has the highest score, transformers the pair that is first in the merges. A score
that falls with the first merge that makes a token gives the same order. (The usual converter writes the same score for
every token when a folder has no tokenizer.model, and pairs are then merged from left to right.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import RequestError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits text before byte-level merges, and whether a word that is a token is taken whole -> llama.cpp's name.
_PRE = {
    ("bytes", False): "gpt-2",
    ("digits bytes", False): "smollm",
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "smaug-bpe",
    (_WORDS % r"\p{N}", False): "qwen2",
    (_CASED, True): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tables.

    Attributes:
        values: metadata by key.
        notes: what is different in llama.cpp, one sentence each.
    """

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_vocabulary(tokenizer: Any, rows: int, config: Any, stops: list[int]) -> Vocabulary:
    """What GGUF says about a tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: of the embedding table; the list of tokens is as long.
        config: the model's transformers config.
        stops: the ids that generation_config.json ends an answer at.

    Raises:
        RequestError: llama.cpp has no tokenizer that does the same, or there are more tokens than rows.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise RequestError(
            f"{type(tokenizer).__name__} has no tokenizer.json form, and only that can be written as GGUF"
        )
    described = json.loads(core.to_str())
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        raise RequestError(
            f"the tokenizer has {size:,} tokens and the embedding table {rows:,} rows, so the model cannot know them "
            "all; resize the model's embeddings"
        )
    notes: list[str] = []
    values = {"tokenizer.ggml." + key: value for key, value in _tables(described, rows, notes).items()}
    values |= _specials(tokenizer, config, stops, notes)
    values |= _template(tokenizer)
    return Vocabulary(values, notes)


def _tables(described: dict[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    """The kind of tokenizer and its tokens."""
    model = described["model"]
    for token in described["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            notes.append(f"{token['content']!r} takes the spaces beside it along in transformers and not in llama.cpp")
    kind = model["type"]
    if kind == "BPE" and _is_byte_level(described):
        return _byte_level(described, rows, notes)
    if _is_characters(described):
        return _characters(described, rows, notes)
    if kind == "BPE" and model.get("byte_fallback"):
        return _sentencepiece(described, rows, notes)
    raise RequestError(
        f"a tokenizer of kind {kind} with {_kind(described['pre_tokenizer'])} before it has no counterpart in "
        "llama.cpp; known are SentencePiece-like BPE, byte-level BPE and single characters"
    )


# ------------------------------------------------------------------------------------------- SentencePiece-like BPE
def _sentencepiece(described: dict[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    model = described["model"]
    prefix = _prefix_space(described, notes)
    vocabulary: dict[str, int] = model["vocab"]
    merges = [_pair(merge) for merge in model["merges"]]
    added = {token["content"] for token in described["added_tokens"]}
    score: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        made = left + right
        if made in score and made != last:
            raise RequestError(f"the merges that make {made!r} are not together, which llama.cpp's scores cannot say")
        score.setdefault(made, -float(rank))
        last = made
    known = set(merges)
    for token in vocabulary:
        if len(token) == 1 or (token in added and token not in score) or _byte(token) is not None:
            continue
        odd = next((pair for pair in _halves(token, vocabulary) if pair not in known), None)
        if odd is not None:
            raise RequestError(f"llama.cpp would merge {odd[0]!r} and {odd[1]!r}, and this tokenizer has no such merge")

    def classify(token: str) -> tuple[str, int]:
        return token, BYTE if _byte(token) is not None else NORMAL

    def classify_added(token: dict[str, Any]) -> tuple[str, int]:
        text = token["content"]
        if not token["normalized"] and text in score:
            return text, NORMAL  # Gemma's runs of spaces: found as ▁ in the text, made from spaces by merges
        return _added_text(token, any(True for _ in _halves(text, vocabulary)), notes)

    lowest = -float(len(merges))
    tokens, kinds = _list_tokens(described, rows, classify, classify_added)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": kinds,
        "scores": [score.get(token, lowest) for token in tokens],
        "add_space_prefix": prefix,
    }


def _halves(token: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs that llama.cpp would merge into a token: of tokens, and of any characters, be they tokens or not."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return (pair for pair in cuts if all(len(half) == 1 or half in vocabulary for half in pair))


def _added_text(token: dict[str, Any], made: bool, notes: list[str]) -> tuple[str, int]:
    """An added token where spaces become ▁: its text and type.

    transformers looks for it before its normalizer has run, or after (`normalized`); llama.cpp always before.

    Args:
        token: its description.
        made: whether llama.cpp would also make it from the tokens of its parts.
        notes: gets what is different.
    """
    text: str = token["content"]
    if token["normalized"]:
        return text.replace(_SPACE, " "), USER_DEFINED
    if _SPACE in text and made:
        notes.append(f"{text!r} is left out: it stands for {_SPACE} itself, and llama.cpp would take spaces for it")
        return "", UNUSED
    return text, USER_DEFINED


def _prefix_space(described: dict[str, Any], notes: list[str]) -> bool:
    """Whether a space is put before the text; refuses every normalizer and pre-tokenizer but the known ones."""
    steps = [step for step in _steps(described["normalizer"], "normalizers") if step != _replace(" ", _SPACE)]
    if steps == [{"type": "Prepend", "prepend": _SPACE}]:
        prepended, steps = True, []
        for token in described["added_tokens"]:
            if token["normalized"]:
                notes.append(f"{token['content']!r} is found by transformers after a space only, by llama.cpp anywhere")
    else:
        prepended = False
    if steps:
        raise RequestError(f"the normalizer {steps[0]['type']} has no counterpart in llama.cpp's tokenizer 'llama'")
    before = described["pre_tokenizer"]
    if before is None or (before["type"] == "Split" and before["pattern"] == {"String": " "}):
        return prepended  # Gemma splits at spaces that its normalizer has replaced: never
    if before["type"] == "Metaspace" and before["replacement"] == _SPACE and not before.get("split", True):
        scheme = before["prepend_scheme"]
        if scheme != "never":
            again = "after a special token and " if scheme == "first" else ""
            notes.append(f"llama.cpp puts a space {again}before text that begins with one, this tokenizer does not")
        return bool(scheme != "never")
    raise RequestError(f"the pre-tokenizer {_kind(before)} has no counterpart in llama.cpp's tokenizer 'llama'")


# -------------------------------------------------------------------------------------------------- byte-level BPE
def _is_byte_level(described: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(described["pre_tokenizer"], "pretokenizers"))


def _byte_level(described: dict[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    model = described["model"]
    normalizer = described["normalizer"]
    if _kind(normalizer) == "NFC":
        notes.append("text that is not in Unicode's NFC form is composed by transformers and not by llama.cpp")
    elif normalizer is not None:
        raise RequestError(f"the normalizer {_kind(normalizer)} has no counterpart in llama.cpp's tokenizer 'gpt2'")
    *before, last = _steps(described["pre_tokenizer"], "pretokenizers")
    split = _split_name(before, last)
    name = _PRE.get((split, bool(model.get("ignore_merges"))))
    if name is None:
        raise RequestError(
            f"the pre-tokenizer {split!r} (ignore_merges: {bool(model.get('ignore_merges'))}) is none of llama.cpp's "
            f"that are known here: {', '.join(_PRE.values())}"
        )
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    if not merges:
        raise RequestError("a byte-level tokenizer without merges cannot be said in GGUF")
    tokens, kinds = _list_tokens(
        described, rows, lambda token: (token, NORMAL), lambda token: (token["content"], USER_DEFINED)
    )
    return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": kinds, "merges": merges}


def _split_name(before: list[dict[str, Any]], last: dict[str, Any]) -> str:
    """What `_PRE` calls a pre-tokenizer."""
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return f"{last['type']} with add_prefix_space" if last["type"] == "ByteLevel" else str(last["type"])
    if last["use_regex"]:
        if not before:
            return "bytes"
        if before == [{"type": "Digits", "individual_digits": True}]:
            return "digits bytes"
    elif len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated":
        return str(before[0]["pattern"].get("Regex", before[0]["pattern"]))
    return " + ".join(step["type"] for step in [*before, last])


# ----------------------------------------------------------------------------------------------- single characters
def _is_characters(described: dict[str, Any]) -> bool:
    """Whether every character becomes a token of its own: nothing merges, or a split at each character."""
    model, before = described["model"], described["pre_tokenizer"]
    if model["type"] == "BPE":
        return not model["merges"] and not model.get("byte_fallback")
    return bool(
        model["type"] == "WordLevel"
        and _kind(before) == "Split"
        and before["pattern"].get("Regex") in (r"[\s\S]", r"(?s).", r"(?s:.)")
        and before["behavior"] == "Isolated"
        and described["normalizer"] is None
    )


def _characters(described: dict[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    """llama.cpp's unigram tokenizer: with one character a token there is one way to cut a text."""
    model = described["model"]
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    longer = next((token for token in model["vocab"] if len(token) > 1 and token not in added), None)
    if longer is not None:
        raise RequestError(f"{longer!r} is a token that this tokenizer never makes; llama.cpp's would")
    unknown = model.get("unk_token")
    if unknown not in model["vocab"]:
        raise RequestError("a tokenizer of characters needs an unk_token to be written as GGUF")
    prefix = _prefix_space(described, notes) if model["type"] == "BPE" else False
    if not model.get("fuse_unk"):
        notes.append("characters without a token next to each other are one unknown token in llama.cpp")

    def classify(token: str) -> tuple[str, int]:
        if token == unknown:
            return token, UNKNOWN
        return token.replace(" ", _SPACE), CONTROL if token in added else NORMAL

    tokens, kinds = _list_tokens(described, rows, classify, lambda token: _added_text(token, True, notes))
    return {
        "model": "t5",
        "pre": "default",
        "tokens": tokens,
        "token_type": kinds,
        "scores": [-1.0] * rows,
        "add_space_prefix": prefix,
    }


# ----------------------------------------------------------------------------------------------------- all of them
def _list_tokens(
    described: dict[str, Any],
    rows: int,
    classify: Callable[[str], tuple[str, int]],
    classify_added: Callable[[dict[str, Any]], tuple[str, int]],
) -> tuple[list[str], list[int]]:
    """Every row's text and type: added tokens from their own list, what is special of them as such, gaps as unused."""
    tokens, kinds = [""] * rows, [UNUSED] * rows
    for token, index in described["model"]["vocab"].items():
        tokens[index], kinds[index] = classify(token)
    unknown = described["model"].get("unk_token")
    for added in described["added_tokens"]:
        text, index = added["content"], added["id"]
        if added["special"]:
            tokens[index], kinds[index] = text, UNKNOWN if text == unknown else CONTROL
        else:
            tokens[index], kinds[index] = classify_added(added)
    taken = set(tokens)
    for index, text in enumerate(tokens):
        if not text:
            fill = f"[PAD{index}]"
            while fill in taken:
                fill = f"[{fill}]"
            tokens[index] = fill
            taken.add(fill)
    if len(taken - {""}) != rows:
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise RequestError(f"two tokens are both {twice!r} in GGUF, which llama.cpp does not load")
    return tokens, kinds


def _specials(tokenizer: Any, config: Any, stops: list[int], notes: list[str]) -> dict[str, Any]:
    """Ids of special tokens, what is added to a text, and the further ids that end an answer."""
    ids = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else getattr(config, "bos_token_id", None),
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    further = [stop for stop in stops if stop != ids["eos"]]
    if ids["eos"] is None and further:
        ids["eos"] = further.pop(0)
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    if further[2:]:
        notes.append(f"of the tokens that end an answer, {further[2:]} are left out: GGUF has three places")
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)
    first, final = whole[:at], whole[at + len(plain) :]
    if first not in ([], [ids["bos"]]) or final not in ([], [ids["eos"]]):
        raise RequestError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(first)} before a text and "
            f"{tokenizer.convert_ids_to_tokens(final)} behind it; GGUF can say bos before and eos behind"
        )
    values: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if isinstance(index, int)
    }
    return values | {"tokenizer.ggml.add_bos_token": bool(first), "tokenizer.ggml.add_eos_token": bool(final)}


def _template(tokenizer: Any) -> dict[str, Any]:
    """The chat template. `{% generation %}` marks what a training learns from and is unknown outside transformers."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    named = template if isinstance(template, dict) else {"default": template}
    named = {
        name: re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", _as_condition, text)
        for name, text in named.items()
        if text
    }
    default = named.pop("default", None)
    values: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
    if named:
        values |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
        values["tokenizer.chat_templates"] = list(named)
    return values


def _as_condition(found: re.Match[str]) -> str:
    """The same whitespace control around a condition that always holds."""
    before, end, after = found.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _byte(token: str) -> int | None:
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return int(found.group(1), 16) if found else None


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _kind(part: dict[str, Any] | None) -> str:
    return "nothing" if part is None else str(part["type"])
