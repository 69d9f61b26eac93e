from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import budgets


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An empty git checkout; new files count as soon as they are written."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def function(lines: int, heading: str = "def f():") -> str:
    """A function of that many lines, `heading` included."""
    return heading + "\n" + "    x = 1\n" * (lines - 1)


def test_a_kept_budget_is_silent(checkout: Path) -> None:
    write(checkout, "src/halfbyte/a.py", function(60))
    write(checkout, "src/halfbyte/b.py", "x = 1\n" * 500)
    assert budgets.offences(checkout) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("src/halfbyte/a.py", function(61), "a.py:1: f() has 61 lines"),
        ("src/halfbyte/kernels/a.py", function(121), "the budget is 120"),
        ("src/halfbyte/a.py", "x = 1\n" * 501, "a.py:1: 501 lines"),
        ("csrc/a.cpp", "int x;\n" * 501, "501 lines"),
        ("src/halfbyte/a.py", "def f(a, b, c, d, *e, f, g, h, **i): ...\n", "f() has 9 parameters"),
        ("src/halfbyte/a.py", "class A:\n    async def f(self, a, b, c, d, e, f, g, h, i): ...\n", "9 parameters"),
    ],
)
def test_over_a_budget(checkout: Path, name: str, text: str, said: str) -> None:
    write(checkout, name, text)
    (found,) = budgets.offences(checkout)
    assert said in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("src/halfbyte/kernels/a.py", function(120)),
        ("src/halfbyte/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n"),
        ("src/halfbyte/a.py", function(61, "# budget: one table\ndef f():")),
        ("src/halfbyte/a.py", function(61, "# budget: one table\n@cache\ndef f():")),
        ("src/halfbyte/a.py", function(61, "def f():  # budget: one table")),
        ("src/halfbyte/a.py", function(61, "def f(\n    x,  # budget: one table\n):")),
        ("src/halfbyte/a.py", "# budget: generated\n" + "x = 1\n" * 501),
        ("src/halfbyte/a.py", 'def f():\n    """' + "Words.\n" * 90 + '    """\n' + "    x = 1\n" * 50),
    ],
)
def test_within_or_with_a_reason(checkout: Path, name: str, text: str) -> None:
    write(checkout, name, text)
    assert budgets.offences(checkout) == []


@pytest.mark.parametrize("comment", ["# budget:", "# budget", "# over budget: why"])
def test_a_reason_needs_its_words(checkout: Path, comment: str) -> None:
    write(checkout, "src/halfbyte/a.py", function(61, f"{comment}\ndef f():"))
    assert len(budgets.offences(checkout)) == 1


@pytest.mark.parametrize(
    "line", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "x = 1\nfrom os import environ"]
)
def test_only_env_reads_the_environment(checkout: Path, line: str) -> None:
    write(checkout, "src/halfbyte/env.py", line)
    write(checkout, "tests/test_a.py", line)
    write(checkout, "src/halfbyte/models/env.py", line)
    (found,) = budgets.offences(checkout)
    assert found.startswith("src/halfbyte/models/env.py:2: os.")


def test_folders_of_this_machine(checkout: Path) -> None:
    here = "/" + "work"
    write(checkout, "docs/a.md", f"see {here}/main\n`{here}`\n")
    write(checkout, "docs/fine.md", f"frame{here}s, .{here}/x, {here}space, {here}-flow\n")
    assert [line.split(": ")[0] for line in budgets.offences(checkout)] == ["docs/a.md:1", "docs/a.md:2"]


def test_addresses_of_this_machine(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Configured:
        stdout = (
            "global.index-url='https://user:pass@wheels.example:8080/simple'\n"
            ":env:.find-links='/depot/wheels'\n"
            "global.extra-index-url='https://pypi.org/simple'\n"
            "global.cert='/etc/ssl/ca.crt'\n"
        )

    monkeypatch.setattr(budgets.subprocess, "run", lambda *_, **__: Configured)
    assert budgets.pip_addresses() == {"wheels.example", "/depot/wheels"}
    monkeypatch.undo()
    monkeypatch.setattr(budgets, "pip_addresses", lambda: {"wheels.example"})
    write(checkout, "Makefile", "a:\n\tpip install --index-url https://wheels.example/simple x\n")
    (found,) = budgets.offences(checkout)
    assert found.startswith("Makefile:2: ")


def test_ignored_and_binary_files_do_not_count(checkout: Path) -> None:
    write(checkout, ".gitignore", "runs/\n")
    write(checkout, "runs/a.py", function(61))
    (checkout / "weights.bin").write_bytes(b"\xff\xfe" + ("/" + "work").encode() + b"\x00\x81")
    assert budgets.offences(checkout) == []


def test_exit_codes(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(budgets.sys, "argv", ["budgets.py", str(checkout)])
    assert budgets.main() == 0
    write(checkout, "a.py", function(61))
    assert budgets.main() == 1
    assert "a.py:1: f() has 61 lines" in capsys.readouterr().out
