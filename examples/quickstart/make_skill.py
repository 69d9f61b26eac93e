"""Write the quickstart's data: chats that teach Pig Latin, a skill that the base model does not have.

    python make_skill.py      # writes data/train.jsonl and data/test.jsonl

The words of the two files never meet: those of the test come from a split of their own, which the base model's
training did not use either (see `skills.split_of`). A right answer to a test prompt is thus the rule at work.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from skills import PIG_LATIN, draw_word, pig_latin


def draw_words(rng: random.Random, split: str, count: int) -> list[str]:
    """Draw `count` different words of a split, in the order in which they were drawn."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw_word(rng, split)] = None
    return list(words)


def make_rows(rng: random.Random, split: str, count: int) -> list[dict]:
    """Make one chat for each of `count` words of a split."""
    return [
        {
            "messages": [
                {"role": "user", "content": rng.choice(PIG_LATIN.phrasings).format(w=word)},
                {"role": "assistant", "content": pig_latin(word)},
            ]
        }
        for word in draw_words(rng, split, count)
    ]


def main() -> None:
    """Write both files; the same seed always writes the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train", type=int, default=3000, help="rows to train on")
    parser.add_argument("--test", type=int, default=250, help="rows to score with")
    parser.add_argument("--seed", type=int, default=24, help="24 invents no rude word")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("test", args.test)):
        rows = make_rows(rng, split, count)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows)} rows, {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
