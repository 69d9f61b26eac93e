"""Data files into rows.

A row is a dictionary that remembers where it came from, because the person who has to mend a data file needs the line
and not only the complaint. JSON, JSON lines, CSV, TSV and Parquet give one row for each record; a plain text file is
one row with the column `text`; a CoNLL file is one row for each sentence, with the columns `tokens` and `tags`. Files
are read as a stream, a JSON array too: a file may be larger than memory, only a single record may not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from halfbyte.data.problems import Problems
from halfbyte.errors import DataError, nearest

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".txt", ".text", ".md")
CONLL_SUFFIX = ".conll"
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, PARQUET_SUFFIX, CONLL_SUFFIX, *TEXT_SUFFIXES)

_BOM = b"\xef\xbb\xbf"  # Windows programs begin a file with it; it must not become part of the first column
_CHUNK = 1 << 20  # characters of a JSON array that are read at once


@dataclass(frozen=True)
class Row:
    """One record of a data set.

    Attributes:
        columns: the record.
        where: `train.jsonl, line 7`: how every message about this row begins.
    """

    columns: dict[str, Any]
    where: str


def read_rows(path: str | Path, problems: Problems) -> Iterator[Row]:
    """Read a data file, row by row.

    Args:
        path: the file.
        problems: takes rows that are damaged; reading goes on behind them where the format allows it.

    Raises:
        DataError: at once, if the file is missing or of a kind that is not read; while it is read, if it is empty,
            cannot be read, or not UTF-8. The message gives the file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there are no data files in {path.parent}"
        raise DataError(f"data file {path} does not exist; {hint}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data file {path} ends in {path.suffix.lower()!r}, which is not read; "
            f"{nearest(path.suffix.lower(), SUFFIXES)}."
        )
    return _rows(path, problems)


def _rows(path: Path, problems: Problems) -> Iterator[Row]:
    suffix, found, before = path.suffix.lower(), False, problems.count
    try:
        if suffix in TABLE_SUFFIXES:
            rows = _table(path, TABLE_SUFFIXES[suffix], problems)
        elif suffix == PARQUET_SUFFIX:
            rows = _parquet(path)
        elif suffix == CONLL_SUFFIX:
            rows = _conll(path, problems)
        elif suffix in TEXT_SUFFIXES:
            rows = _text(path)
        else:
            rows = _json_array(path, problems) if _is_array(path) else _json_lines(path, problems)
        for row in rows:
            found = True
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 text: byte {error.object[error.start]:#04x} in it.") from error
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}.") from error
    if not found and problems.count == before:
        raise DataError(f"data file {path} is empty; it needs at least one row.")


def _text(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield Row({"text": text}, f"{path}, line 1")


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    """Lines of text with their ends. Split at line feeds alone: a JSON string may hold U+2028, which str.splitlines
    takes for the end of a line.
    """
    for number, line in enumerate(file, 1):
        try:
            yield (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 text (byte {line[error.start]:#04x}).") from error


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if stripped := line.removeprefix(_BOM).strip():
                return stripped.startswith(b"[")
    return False


def _json_lines(path: Path, problems: Problems) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                problems.add(f"{where}: not JSON ({error.msg}, column {error.colno}).")
                continue
            with problems.collect():
                yield Row(_record(record, where), where)


def _json_array(path: Path, problems: Problems) -> Iterator[Row]:
    """Items of a JSON array, decoded one at a time from a window over the file."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        window = file.read(_CHUNK)
        position, line, number = window.index("[") + 1, 1 + window.count("\n", 0, window.index("[")), 0
        size = _CHUNK
        while True:
            start = position
            while position < len(window) and window[position] in " \t\r\n,":
                position += 1
            line += window.count("\n", start, position)
            if position < len(window) and window[position] == "]":
                return
            try:
                record, end = decode(window, position)
            except json.JSONDecodeError as error:
                more = file.read(size)
                if not more:
                    line += window.count("\n", position, error.pos)
                    raise DataError(f"{path}, line {line}: not JSON ({error.msg}).") from error
                window, position, size = window[position:] + more, 0, 2 * size
                continue
            number, size = number + 1, _CHUNK
            where = f"{path}, item {number} (line {line})"
            with problems.collect():
                yield Row(_record(record, where), where)
            line += window.count("\n", position, end)
            position = end


def _record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be an object with named columns, this one is a {type(record).__name__}.")
    return record


def _table(path: Path, delimiter: str, problems: Problems) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the default refuses a text of 131,073 letters
    with path.open("rb") as file:
        lines = _lines(file, path)
        # TSV has no quoting by convention: a sentence may begin with a quotation mark.
        if delimiter == "\t":
            reader = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    header = ", ".join(reader.fieldnames or ())
                    problems.add(f"{where}: the row has not as many columns as the header ({header}).")
                else:
                    yield Row(dict(record), where)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not a table ({error}).") from error


def _conll(path: Path, problems: Problems) -> Iterator[Row]:
    """Sentences of a file with a word on each line: columns split by tabs, or by spaces if the first line has no tab.

    The first column is the word and the last its tag, as in the shared tasks of CoNLL; `-DOCSTART-` begins a document.
    """
    delimiter, width, start = None, 0, 0
    words: list[tuple[str, ...]] = []
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip() or line.startswith("-DOCSTART-"):
                if words:
                    yield _sentence(words, f"{path}, line {start}")
                words = []
                continue
            if not width:
                delimiter = "\t" if "\t" in line else None
                width = max(2, len(line.rstrip("\r\n").split(delimiter)))
            columns = line.rstrip("\r\n").split(delimiter)
            if len(columns) != width:
                problems.add(
                    f"{path}, line {number}: there are {len(columns)} columns, not {width} (a word, and its tag last)."
                )
                continue
            start = start if words else number
            words.append((columns[0], columns[-1]))
    if words:
        yield _sentence(words, f"{path}, line {start}")


def _sentence(words: list[tuple[str, ...]], where: str) -> Row:
    tokens, tags = zip(*words, strict=True)
    return Row({"tokens": list(tokens), "tags": list(tags)}, where)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(record, f"{path}, row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0].rstrip('.')}).") from error
