"""Rows of JSON lines and CSV as records; a faulty row becomes a ValueError in its place."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from genpipe.data.sources.captions import WEIGHTS_FIELD
from genpipe.data.sources.listing import blames_storage, is_text
from genpipe.storage import Entry, Storage, open_object

Record = dict[str, Any]
LIST_FIELDS = ("captions", WEIGHTS_FIELD)  # hold JSON lists in CSV
BLOCK = 2**20
FIRST_ROWS = 100
NO_CSV = (
    "not CSV: in the row that starts here a quote is neither closed nor doubled, a carriage return stands alone, or a "
    f"cell has more than {csv.field_size_limit()} characters"
)


@dataclass(frozen=True)
class Part:
    """Rows `start` up to `stop` of a table, and where they lie: in bytes, or in row groups of parquet."""

    table: Entry
    start: int
    stop: int
    offset: int = 0
    length: int = 0
    header: tuple[str, ...] = ()  # of CSV
    delimiter: str = ","  # likewise
    row_groups: range = range(0)


class Row(NamedTuple):
    """One row: the number of its (last) line, the bytes up to its end, and what it holds or what is wrong."""

    line: int
    end: int
    content: bytes | list[str] | ValueError


def split_rows(lines: Iterable[bytes], *, suffix: str, start: int = 0, delimiter: str = ",") -> Iterator[Row]:
    """The rows of a `.jsonl` (their bytes) or `.csv` (their cells, the header's first); blank ones are left out.

    The lines are those of a file from the byte `start` on.
    """
    return _split_csv(lines, start=start, delimiter=delimiter) if suffix == ".csv" else _split_lines(lines)


def read_records(lines: Iterable[bytes], *, suffix: str) -> Iterator[tuple[int, Record | ValueError]]:
    """The number of the line and the record of each row of a whole file, or what is wrong with it.

    Raises ValueError for a CSV without a header.
    """
    delimiter, lines = _delimiter(lines) if suffix == ".csv" else (",", lines)
    rows = split_rows(lines, suffix=suffix, delimiter=delimiter)
    header = _header(rows)[0] if suffix == ".csv" else ()
    return ((row.line, _parse(row.content, header=header)) for row in rows)


def cut_lines(storage: Storage, table: Entry, *, suffix: str, part_size: int) -> tuple[list[str], list[Part]]:
    """The columns of a table (of JSON lines those of its first rows) and its rows in parts; reads it through once.

    Raises ValueError for a CSV without a header.
    """
    lines: Iterable[bytes] = open_object(storage, table, block=BLOCK)
    delimiter, lines = _delimiter(lines) if suffix == ".csv" else (",", lines)
    rows = split_rows(lines, suffix=suffix, delimiter=delimiter)
    header, start = _header(rows) if suffix == ".csv" else ((), 0)
    fields: dict[str, None] = {}
    starts, end, count = [start], start, 0
    for count, row in enumerate(rows, start=1):
        if count <= FIRST_ROWS and suffix == ".jsonl" and isinstance(record := _parse(row.content, header=()), dict):
            fields |= dict.fromkeys(record)
        if count > 1 and (count - 1) % part_size == 0:
            starts.append(end)
        end = row.end
    stops = [*starts[1:], end]
    return [*header, *fields], [
        Part(
            table,
            start=number * part_size,
            stop=min(count, (number + 1) * part_size),
            offset=start,
            length=stop - start,
            header=header,
            delimiter=delimiter,
        )
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
        if count
    ]


def read_lines(storage: Storage, part: Part, *, suffix: str) -> Iterator[Record | ValueError | OSError]:
    """The records of a part; if the table is gone or truncated, as many errors."""
    try:
        data = storage.read_range(part.table.key, offset=part.offset, length=part.length)
    except OSError as error:
        if blames_storage(error, storage=storage):
            raise
        yield from itertools.repeat(error, part.stop - part.start)
        return
    for row in split_rows(io.BytesIO(data), suffix=suffix, start=part.offset, delimiter=part.delimiter):
        yield _parse(row.content, header=part.header)


def parse_json(text: bytes, *, nan_as_null: bool = False) -> Record:
    """A JSON object in UTF-8.

    Raises ValueError for anything else, and for what no other reader takes: lone surrogates and, unless they are
    read as null, NaN and Infinity.
    """
    try:
        record = json.loads(text.decode("utf-8-sig"), parse_constant=(lambda _: None) if nan_as_null else None)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    return record


def jsonable(value: Any) -> Any:
    """A cell as JSON holds it: NaN as null, lists and structs by their members, the rest (times, ...) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {name: jsonable(item) for name, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _split_lines(lines: Iterable[bytes]) -> Iterator[Row]:
    end = 0
    for number, line in enumerate(lines, start=1):
        end += len(line)
        if line.strip():
            yield Row(number, end, line)


def _delimiter(lines: Iterable[bytes]) -> tuple[str, Iterable[bytes]]:
    """The delimiter of a CSV, detected from its first line, and its lines.

    Spreadsheets write semicolons in many locales, databases tabs; a comma takes precedence.
    """
    rest = iter(lines)
    first = next(rest, b"")
    return next((mark for mark in ",;\t" if mark.encode() in first), ","), itertools.chain(
        [first] if first else [], rest
    )


def _split_csv(lines: Iterable[bytes], *, start: int, delimiter: str) -> Iterator[Row]:
    """A malformed row costs its first line only: an unclosed quote must not swallow what follows."""
    rest, again, taken = iter(lines), deque[bytes](), list[bytes]()
    number, end = 0, start

    def decoded() -> Iterator[str]:
        while line := again.popleft() if again else next(rest, b""):
            taken.append(line)
            text = line.decode("utf-8", "surrogateescape")
            yield text if end or len(taken) > 1 else text.removeprefix("\ufeff")

    reader = csv.reader(decoded(), strict=True, delimiter=delimiter)
    while True:
        cells: list[str] | ValueError | None
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = ValueError(NO_CSV)
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(decoded(), strict=True, delimiter=delimiter)
        number, end = number + len(taken), end + sum(map(len, taken))
        taken.clear()
        if cells is None:
            return
        if cells:
            yield Row(number, end, cells)


def _header(rows: Iterator[Row]) -> tuple[tuple[str, ...], int]:
    """The columns of a CSV, from its first row, and the bytes up to there. Raises ValueError for no header."""
    first = next(rows, None)
    if first is None:
        return (), 0
    if not isinstance(first.content, list) or not is_text("".join(first.content)):
        raise ValueError("does not begin with a header of column names in UTF-8; save it as CSV in UTF-8")
    return tuple(first.content), first.end


def _parse(content: bytes | list[str] | ValueError, *, header: tuple[str, ...]) -> Record | ValueError:
    """The record that a row holds, or what is wrong with it.

    Empty cells of CSV are left out; all its values are strings but `captions` and `caption_weights` in JSON.
    """
    if isinstance(content, ValueError):
        return content
    try:
        return parse_json(content) if isinstance(content, bytes) else _from_cells(content, header=header)
    except ValueError as error:
        return error


def _from_cells(cells: list[str], *, header: tuple[str, ...]) -> Record:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells under {len(header)} columns")
    "".join(cells).encode()  # what was not UTF-8 came as a lone surrogate and is a ValueError here
    record: Record = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    for name in LIST_FIELDS:
        if record.get(name, "").startswith("["):
            record[name] = parse_json(f'{{"list": {record[name]}}}'.encode())["list"]
    return record
