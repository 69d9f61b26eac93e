"""What the documents say must hold: links resolve, recipes are accepted, commands exist, figures come out again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELLS = {"bash", "sh", "console"}


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(document, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def named(block: Block) -> str:
    return f"{block.document.relative_to(ROOT)}:{block.line}"


def in_language(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in languages], ids=named)


def mentioned(program: str) -> set[str]:
    """First arguments of `program` in shell blocks and in code spans: {"train", ...}."""
    shell = "\n".join(block.text for block in BLOCKS if block.language in SHELLS)
    prose = "\n".join(re.sub(r"^```.*?^```$", "", d.read_text(), flags=re.M | re.S) for d in DOCUMENTS)
    pattern = rf"{program} +([a-z][\w-]*)"
    return set(re.findall(rf"^(?:\$ )?{pattern}", shell, re.M)) | set(re.findall(rf"`{pattern}[^`]*`", prose))


def run_block(block: Block) -> str:
    done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


@in_language("yaml")
def test_recipes_are_accepted(block: Block) -> None:
    from halfbyte.train.recipe import make_recipe

    make_recipe(yaml.safe_load(block.text), source=named(block))


@in_language("python")
def test_python_compiles(block: Block) -> None:
    compile(block.text, named(block), "exec")


def test_commands_exist() -> None:
    commands = mentioned("halfbyte")
    assert "train" in commands
    for command in sorted(commands):
        call = [sys.executable, "-c", "from halfbyte.cli.main import main; main()", command, "--help"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"halfbyte {command}: {done.stderr}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert "quickstart" in mentioned("make")
    assert mentioned("make") <= targets


def test_figures_of_the_formats_page() -> None:
    """The block that measures distortion prints what the table under it, and the sentence on entropy, say."""
    page = ROOT / "docs/formats.md"
    (block,) = [block for block in blocks_of(page) if "distortion" in block.text]
    printed = run_block(block)
    table = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) dB \|$", page.read_text(), re.M)
    assert len(table) == 5
    for name, mse, sqnr in table:
        seen = re.search(rf"^{name} Distortion\(mse=([\d.e-]+), sqnr_db=([\d.]+)", printed, re.M)
        assert seen is not None, printed
        assert f"{float(seen[1]):.{len(mse) - 2}f}" == mse
        assert f"{float(seen[2]):.2f}" == sqnr
    (entropy,) = re.findall(r"entropy of ([\d.]+) bits", page.read_text())
    assert f"nf4 entropy of a code in bits: {entropy}" in printed


def test_tables_of_the_formats_page() -> None:
    """NF4's values and the bits a parameter takes are the code's own."""
    from halfbyte.formats import SCALE_BITS, QuantSpec, get_codebook

    page = (ROOT / "docs/formats.md").read_text()
    pairs = re.findall(r"(?<=\| )(\d+) \| (-?\d\.\d+)", page)
    assert {int(code): float(value) for code, value in pairs} == dict(enumerate(get_codebook("nf4").values))
    bits = re.findall(r"^\| (float32|\d bits) \| .* \| ([\d.]+) \|$", page, re.M)
    said = {None if name == "float32" else int(name[0]): float(value) for name, value in bits}
    assert said == {width: QuantSpec("nf4", 64, width).nominal_bits() for width in SCALE_BITS}
