"""Data files into rows.

A row is a dictionary that remembers where it came from, because the person who has to mend a data file needs the line
and not only the complaint. JSON, JSON lines, CSV and TSV give one row for each record; a plain text file is one row
with the column `text`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import DataError, nearest

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)


@dataclass(frozen=True)
class Row:
    """One record of a data file.

    Attributes:
        columns: the record.
        source: the file it came from.
        number: its line, or its place in a JSON array; both count from 1.
        unit: what `number` counts, "line" or "item".
    """

    columns: dict[str, Any]
    source: Path
    number: int
    unit: str = "line"

    @property
    def where(self) -> str:
        """`train.jsonl, line 7`: how every message about this row begins."""
        return f"{self.source}, {self.unit} {self.number}"


def read_rows(path: str | Path) -> list[Row]:
    """Read a data file.

    Raises:
        DataError: the file is missing, empty, not UTF-8, damaged, or of a kind that is not read. The message gives the
            file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there are no data files in {path.parent}"
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"data file {path} {what}; {hint}.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"data file {path} ends in {suffix!r}, which is not read; {nearest(suffix, SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark must not become part of the first column
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}.") from error
    if suffix in TABLE_SUFFIXES:
        rows = list(_table(path, text, TABLE_SUFFIXES[suffix]))
    elif suffix in JSON_SUFFIXES:
        rows = list(_json_array(path, text) if text.lstrip().startswith("[") else _json_lines(path, text))
    else:
        rows = [Row({"text": text}, path, 1)] if text.strip() else []
    if not rows:
        raise DataError(f"data file {path} is empty; it needs at least one row.")
    return rows


def _json_array(path: Path, text: str) -> Iterator[Row]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    for number, record in enumerate(records, 1):
        yield Row(_record(record, f"{path}, item {number}"), path, number, "item")


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # split("\n"), not splitlines(): a JSON string may hold U+2028, which splitlines takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}).") from error
        yield Row(_record(record, f"{path}, line {number}"), path, number)


def _record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be an object with named columns, this one is a {type(record).__name__}.")
    return record


def _table(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    # TSV has no quoting by convention: a sentence may begin with a quotation mark.
    lines = io.StringIO(text, newline="")
    if delimiter == "\t":
        reader = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: the row has not as many columns as the header "
                    f"({', '.join(reader.fieldnames or ())})."
                )
            yield Row(dict(record), path, reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({error}).") from error
