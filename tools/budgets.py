"""Size budgets, and two rules that no ready-made linter knows. `make lint` runs it; exit code 1 when anything is found.

    python tools/budgets.py            # the repository this file lies in
    python tools/budgets.py FOLDER     # another checkout

**Budgets.** A source file has up to 500 lines, a function up to 60 (a function under `kernels/` 120), a signature up to
8 parameters. They are questions, not walls: something that is better long stays long, and a comment says why:

    # budget: one table for each format; splitting it would hide that they are the same shape
    def encode(...):

The comment counts for a function on the line above it (or above its decorators) or anywhere in its signature, and for a
file among its first five lines. A function's length runs from `def` to its last line and leaves out its docstring: a
budget must not be a reason to explain less. `self` and `cls` are not parameters; `*args` and `**kwargs` are one each.

**The environment.** In the package only `env.py` touches `os.environ`, so that one file lists every variable.

**This machine.** No file names a folder of the machine it was written on, or an address out of the pip configuration in
force: neither means anything to a reader elsewhere. Which files count is what `git ls-files` lists (tracked, or new and
not ignored).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 500
FUNCTION_LINES = 60
KERNEL_LINES = 120
PARAMETERS = 8

SOURCE_SUFFIXES = {".py", ".cpp", ".h"}
REASON = re.compile(r"(?:#|//)\s*budget:\s*\S")
# Written with brackets so that the pattern does not match itself.
MACHINE_FOLDER = re.compile(r"(?<![\w.~}])/(?:[w]ork|[r]oot|[h]ome/\w+|[o]pt/(?:pypi|wheels))(?![\w-])")
PUBLIC_HOSTS = {"pypi.org", "files.pythonhosted.org", "download.pytorch.org"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def listed_files(root: Path) -> list[Path]:
    """The files of a checkout that are tracked, or new and not ignored, and that still exist."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({root / name for name in names if name and (root / name).is_file()})


def pip_addresses() -> set[str]:
    """Hosts and absolute folders named by the pip configuration in force, public package indexes left out."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    values = "\n".join(line for line in text.splitlines() if re.search(r"index|find-links|host", line.split("=")[0]))
    hosts = {match.split("@")[-1].split(":")[0] for match in re.findall(r"https?://([^/\s']+)", values)}
    folders = set(re.findall(r"(?:file://|(?<=[\s'\"]))(/[^\s'\"]+)", values))
    return (hosts - PUBLIC_HOSTS) | folders


def size_offences(path: Path, text: str, in_kernels: bool) -> Iterator[tuple[int, str]]:
    """(line, what is over its budget) of one source file."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES and not has_reason(lines[:5]):
        yield 1, f"{len(lines)} lines, the budget is {FILE_LINES}"
    if path.suffix != ".py":
        return
    allowed = KERNEL_LINES if in_kernels else FUNCTION_LINES
    for node in ast.walk(ast.parse(text, filename=str(path))):
        if not isinstance(node, Function) or has_reason(heading(node, lines)):
            continue
        length = function_length(node)
        if length > allowed:
            yield node.lineno, f"{node.name}() has {length} lines without its docstring, the budget is {allowed}"
        count = parameter_count(node)
        if count > PARAMETERS:
            yield node.lineno, f"{node.name}() has {count} parameters, the budget is {PARAMETERS}"


def has_reason(lines: list[str]) -> bool:
    """Whether one of the lines is, or ends with, a comment `budget: why`."""
    return any(REASON.search(line) for line in lines)


def heading(node: Function, lines: list[str]) -> list[str]:
    """The source lines where a function's reason may stand: the one above it, its decorators, its signature."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return lines[max(first - 2, 0) : max(node.body[0].lineno - 1, node.lineno)]


def function_length(node: Function) -> int:
    """Lines from `def` to the last one, docstring left out."""
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    spoken = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - spoken


def parameter_count(node: Function) -> int:
    """Parameters that a caller can give: without self and cls, with *args and **kwargs as one each."""
    arguments = node.args
    named = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    own = 1 if named and named[0] in {"self", "cls"} else 0
    return len(named) - own + len(arguments.kwonlyargs) + bool(arguments.vararg) + bool(arguments.kwarg)


def environment_offences(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) for every use of the process environment in one module."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name):
            used = {node.attr} if node.value.id == "os" else set()
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            used = {alias.name for alias in node.names} & names
        else:
            continue
        for name in sorted(used):
            yield node.lineno, f"os.{name} outside env.py, the only reader of the environment"


def machine_offences(text: str, addresses: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what) for every folder or address that means something on this machine only."""
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_FOLDER.search(line):
            yield number, "names a folder of the machine it was written on"
        elif any(address in line for address in addresses):
            yield number, "names an address out of this machine's pip configuration"


def offences(root: Path) -> list[str]:
    """Everything found in a checkout, one `path:line: what` each."""
    addresses = pip_addresses()
    found = []
    for path in listed_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and other binary files
        parts = path.relative_to(root).parts
        here = list(machine_offences(text, addresses))
        if path.suffix in SOURCE_SUFFIXES:
            here += size_offences(path, text, in_kernels="kernels" in parts[:-1])
        if path.suffix == ".py" and parts[:2] == ("src", "halfbyte") and parts[2:] != ("env.py",):
            here += environment_offences(text)
        found += [f"{path.relative_to(root)}:{line}: {what}" for line, what in sorted(here)]
    return found


def main() -> int:
    """Print what was found; 1 when there is anything, else 0."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = offences(root)
    for line in found:
        print(line)
    print(f"budgets: {len(found)} over or out of place" if found else "budgets: kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
