"""Rows of parquet: cut into parts from the footer alone, read lazily by row group and column."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.data.sources.listing import blames_storage
from genpipe.data.sources.records import BLOCK, Part, Record
from genpipe.storage import Entry, Storage, open_object

BATCH_ROWS = 32  # rows decoded at once: with images in them, they must fit into memory


def open_parquet(storage: Storage, table: Entry) -> pq.ParquetFile:
    """A table of which only the footer is read. Raises ValueError if that cannot be understood."""
    try:
        file = pq.ParquetFile(open_object(storage, table, block=BLOCK), buffer_size=BLOCK, pre_buffer=False)
        if sum(group_sizes(file)) != file.metadata.num_rows:
            raise pa.ArrowInvalid("its row groups have not as many rows as it says")
        return file
    except (FileNotFoundError, PermissionError, ConnectionError):
        raise
    except (OSError, pa.ArrowException) as error:  # Arrow says either of damage
        raise ValueError(f"is not intact parquet: {error}; replace it with an intact copy") from None


def group_sizes(file: pq.ParquetFile) -> list[int]:
    """How many rows each row group has."""
    return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


def may_have_nulls(file: pq.ParquetFile, column: str) -> bool:
    """Whether a column, or `struct.field`, has a null, or statistics that do not say that it has none."""
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    statistics = [chunk.statistics for chunk in columns if chunk.path_in_schema == column]
    return any(known is None or not known.has_null_count or known.null_count for known in statistics)


def unique_values(storage: Storage, table: Entry, column: str) -> Iterator[Any]:
    """The different values of a column in each row group; of those that are damaged none."""
    try:
        file = open_parquet(storage, table)
    except ValueError:
        return
    for group in range(file.metadata.num_row_groups):
        try:
            yield from pc.unique(file.read_row_group(group, columns=[column], use_threads=False)[column]).to_pylist()
        except OSError as error:
            if blames_storage(error, storage=storage):
                raise
        except (ValueError, pa.ArrowException):  # of a list, too
            continue


def cut_row_groups(table: Entry, sizes: list[int], *, part_size: int) -> list[Part]:
    """Runs of row groups of at most `part_size` rows in all, and slices of groups that are larger."""
    parts: list[Part] = []
    first = start = 0  # the row group and the row where the next part begins
    for group, stop in enumerate(itertools.accumulate(sizes)):
        last_fits = group + 1 == len(sizes) or stop + sizes[group + 1] - start > part_size
        if last_fits and stop > start:
            parts += [
                Part(table, low, min(stop, low + part_size), row_groups=range(first, group + 1))
                for low in range(start, stop, part_size)
            ]
        if last_fits:
            first, start = group + 1, stop
    return parts


def read_row_groups(storage: Storage, part: Part, *, columns: list[str]) -> Iterator[Record | ValueError | OSError]:
    """Each row of a part; an unreadable one as the error."""
    try:
        file = open_parquet(storage, part.table)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and blames_storage(error, storage=storage):
            raise
        yield from itertools.repeat(error, part.stop - part.start)
        return
    sizes = group_sizes(file)
    begin = sum(sizes[: part.row_groups.start])
    for group in part.row_groups:
        low, high = max(begin, part.start), min(begin + sizes[group], part.stop)
        if low < high:
            yield from _read_rows(storage, file, group, columns=columns, skip=low - begin, count=high - low)
        begin += sizes[group]


def read_parquet(storage: Storage, table: Entry) -> Iterator[tuple[int, Record | ValueError | OSError]]:
    """The number and the record of each row of a whole table. Raises ValueError as `open_parquet` does."""
    file = open_parquet(storage, table)
    whole = Part(table, 0, file.metadata.num_rows, row_groups=range(file.metadata.num_row_groups))
    return enumerate(read_row_groups(storage, whole, columns=file.schema_arrow.names))


def _read_rows(
    storage: Storage, file: pq.ParquetFile, group: int, *, columns: list[str], skip: int, count: int
) -> Iterator[Record | ValueError | OSError]:
    """`count` rows of a row group after the first `skip`: as many intact ones as possible, then the error."""
    damage: ValueError | OSError = ValueError("the row group holds fewer rows than the footer says")
    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            rows = batch.slice(skip, count)
            skip, count = max(0, skip - len(batch)), count - len(rows)
            yield from _records(rows)
            if not count:
                return
    except OSError as error:
        if blames_storage(error, storage=storage):
            raise
        damage = error
    except (ValueError, pa.ArrowException) as error:
        damage = ValueError(str(error))
    yield from itertools.repeat(damage, count)


def _records(rows: pa.RecordBatch) -> Iterator[Record | ValueError]:
    """Each row, or why it cannot be a Python value: bytes that are not UTF-8, a year beyond 9999, ..."""
    try:
        yield from rows.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if len(rows) == 1:
            yield ValueError(str(error))
            return
        for number in range(len(rows)):
            yield from _records(rows.slice(number, 1))
