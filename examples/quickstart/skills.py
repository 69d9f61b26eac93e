"""The skills of the quickstart, as small pure functions.

A *skill* turns a random draw into a prompt and the one right answer. The base model learns the skills of
`BASE_SKILLS`; `PIG_LATIN` is kept apart, so that the quickstart can teach it with QLoRA to a model that has
never met it. Everything is made from words, and every word belongs to exactly one split (see `split_of`), so a
score on held-out words measures the rule that the model learned and not the words that it remembers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from words import COMMON_WORDS

VOWELS = "aeiou"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z",
    "bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "qu", "sh", "sl", "st", "th", "tr", "",
)  # fmt: skip
NUCLEI = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "oo", "ou", "y")
CODAS = ("", "", "", "b", "d", "l", "ll", "lt", "m", "n", "nd", "ng", "p", "r", "rk", "rt", "s", "sh", "st", "x")
MIN_LETTERS, MAX_LETTERS = 3, 9

Fields = dict[str, str]
NextWord = Callable[[], str]


@dataclass(frozen=True)
class Skill:
    """A named rule: `draw` gives the words of the prompt and the answer, a phrasing turns the words into a prompt."""

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random, NextWord], tuple[Fields, str]]
    weight: float = 1.0  # how often the base sees it; rules that move letters about need more examples


def split_of(word: str) -> str:
    """Name the split that owns `word`: "train", "held" (scores the base) or "test" (scores the new skill).

    A checksum decides, so no list has to be kept, and every script agrees on the split of every word.
    """
    bucket = zlib.crc32(word.encode()) % 20
    return {0: "held", 1: "test"}.get(bucket, "train")


def invent_word(rng: random.Random) -> str:
    """Invent a pronounceable word of one to three syllables, such as "trand" or "voasherk"."""
    while True:
        syllables = range(rng.choice((1, 2, 2, 2, 3)))
        word = "".join(rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in syllables)
        if MIN_LETTERS <= len(word) <= MAX_LETTERS:
            return word


def draw_word(rng: random.Random, split: str) -> str:
    """Draw a word that belongs to `split`: one in three is a common English word, the others are invented."""
    while True:
        word = rng.choice(COMMON_WORDS) if rng.random() < 1 / 3 else invent_word(rng)
        if split_of(word) == split:
            return word


def ask(skill: Skill, rng: random.Random, split: str) -> tuple[str, str]:
    """Draw one (prompt, answer) of `skill` whose words all come from `split`."""
    fields, answer = skill.draw(rng, lambda: draw_word(rng, split))
    return rng.choice(skill.phrasings).format(**fields), answer


def pig_latin(word: str) -> str:
    """Say a word in (simple) Pig Latin: move its first letter to the end and add "ay"."""
    return word[1:] + word[0] + "ay"


def number_in_words(number: int) -> str:
    """Write a number from 0 to 99 in words."""
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens] + (f"-{UNITS[unit]}" if unit else "")


def plural(word: str) -> str:
    """Form the plural by the spelling rule alone (no irregular words)."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def _word_skill(name: str, rule: Callable[[str], str], *phrasings: str, weight: float = 1.0) -> Skill:
    """Make a skill out of a rule that maps one word to its answer."""

    def draw(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
        word = next_word()
        return {"w": word}, rule(word)

    return Skill(name, phrasings, draw, weight)


def _draw_suffix(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    word, suffix = next_word(), "".join(rng.choices(ALPHABET, k=rng.randint(1, 3)))
    return {"w": word, "s": suffix}, word + suffix


def _draw_prefix(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    word, prefix = next_word(), "".join(rng.choices(ALPHABET, k=rng.randint(1, 3)))
    return {"w": word, "s": prefix}, prefix + word


def _draw_swap(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    first, second = next_word(), next_word()
    return {"w": first, "v": second}, f"{second} {first}"


def _draw_join(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    first, second = next_word(), next_word()
    return {"w": first, "v": second}, first + second


def _draw_sum(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    first, second = rng.randint(0, 20), rng.randint(0, 20)
    return {"a": str(first), "b": str(second)}, str(first + second)


def _draw_number(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    number = rng.randint(0, 99)
    return {"a": str(number)}, number_in_words(number)


def _draw_digits(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    number = rng.randint(0, 99)
    return {"a": number_in_words(number)}, str(number)


def _draw_following(names: tuple[str, ...]) -> Callable[[random.Random, NextWord], tuple[Fields, str]]:
    """Make a draw that asks what comes after one of `names`, which are in a circle."""

    def draw(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
        index = rng.randrange(len(names))
        return {"a": names[index]}, names[(index + 1) % len(names)]

    return draw


def _draw_hello(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    return {"a": rng.choice(("Hello", "Hi", "Good morning", "Good evening"))}, "Hello! Give me a word."


def _draw_about(rng: random.Random, next_word: NextWord) -> tuple[Fields, str]:
    return {"a": rng.choice(("Who", "What"))}, "I am the tiny halfbyte quickstart model."


BASE_SKILLS: tuple[Skill, ...] = (
    _word_skill("copy", lambda w: w, "Repeat {w}.", "Copy: {w}", "Say the word {w}."),
    _word_skill(
        "reverse", lambda w: w[::-1], "Reverse {w}.", "Write {w} backwards.", "Say {w} from end to start.", weight=3
    ),
    _word_skill("upper", str.upper, "Write {w} in capitals.", "Uppercase: {w}", "Shout {w}."),
    _word_skill("capitalise", str.capitalize, "Capitalise {w}.", "Start {w} with a capital letter."),
    _word_skill("first", lambda w: w[0], "First letter of {w}?", "What does {w} start with?"),
    _word_skill("last", lambda w: w[-1], "Last letter of {w}?", "What does {w} end with?"),
    _word_skill("length", lambda w: str(len(w)), "How many letters are in {w}?", "Length of {w}?", weight=2),
    _word_skill("double", lambda w: w + w, "Double {w}.", "Say {w} twice.", "Write {w} two times in a row.", weight=2),
    _word_skill(
        "consonants",
        lambda w: "".join(c for c in w if c not in VOWELS) or "none",
        "Remove the vowels from {w}.",
        "Write {w} without vowels.",
        weight=1.5,
    ),
    _word_skill(
        "vowels",
        lambda w: "".join(c for c in w if c in VOWELS) or "none",
        "Vowels of {w}?",
        "Keep only the vowels of {w}.",
        weight=1.5,
    ),
    _word_skill("spell", "-".join, "Spell {w}.", "Write {w} letter by letter.", "Put dashes into {w}."),
    _word_skill("drop first", lambda w: w[1:], "Drop the first letter of {w}.", "Write {w} without its first letter."),
    _word_skill("drop last", lambda w: w[:-1], "Drop the last letter of {w}.", "Write {w} without its last letter."),
    _word_skill("rotate", lambda w: w[-1] + w[:-1], "Move the last letter of {w} to the front.", "Rotate {w}."),
    _word_skill(
        "swap ends",
        lambda w: w[-1] + w[1:-1] + w[0],
        "Swap the first and last letter of {w}.",
        "Exchange the ends of {w}.",
        weight=2,
    ),
    _word_skill("sort", lambda w: "".join(sorted(w)), "Sort the letters of {w}.", "Put {w} in order.", weight=3),
    _word_skill("plural", plural, "Plural of {w}?", "One {w}, many what?"),
    _word_skill("both ends", lambda w: f"{w[0]} {w[-1]}", "First and last letter of {w}?", "Ends of {w}?"),
    Skill("suffix", ("Add {s} to the end of {w}.", "Append {s} to {w}.", "Write {w} and then {s}."), _draw_suffix, 2),
    Skill("prefix", ("Put {s} before {w}.", "Start {w} with {s}."), _draw_prefix),
    Skill("swap", ("Swap the words: {w} {v}", "In the other order: {w} {v}"), _draw_swap, 1.5),
    Skill("join", ("Join {w} and {v}.", "Glue {w} to {v}."), _draw_join),
    Skill("sum", ("What is {a} plus {b}?", "{a} + {b} = ?", "Add {a} and {b}."), _draw_sum, 2),
    Skill("number", ("Write {a} in words.", "Say the number {a}."), _draw_number),
    Skill("digits", ("Write {a} in digits.", "Which number is {a}?"), _draw_digits),
    Skill("day", ("Which day comes after {a}?", "The day after {a}?"), _draw_following(DAYS), 0.5),
    Skill("month", ("Which month comes after {a}?", "The month after {a}?"), _draw_following(MONTHS), 0.5),
    Skill("letter", ("Which letter comes after {a}?", "The letter after {a}?"), _draw_following(tuple(ALPHABET)), 0.5),
    Skill("hello", ("{a}.", "{a}!"), _draw_hello, 0.2),
    Skill("about", ("{a} are you?",), _draw_about, 0.2),
)

PIG_LATIN = _word_skill(
    "pig latin",
    pig_latin,
    "Say {w} in Pig Latin.",
    "Pig Latin: {w}",
    "Write {w} in Pig Latin.",
    "What is {w} in Pig Latin?",
)
