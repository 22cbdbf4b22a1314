"""Parquet with images in it, or with their paths: the layout of Hugging Face datasets and others like it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.identity import digest_entries, in_batches
from genpipe.data.sources.listing import MAX_FILE_BYTES, blames_storage, read_ahead
from genpipe.data.sources.tables import Row, TableConfig, Tables
from genpipe.storage import Entry, Storage, check_key, open_storage


class ParquetConfig(TableConfig):
    """Rows with an image: its bytes, a struct `{bytes, path}`, or a path relative to the table or under `s3://`."""

    kind: Literal["parquet"]
    image: str = Field("image", min_length=1, description="column of images or of their paths")


class ParquetSource:
    """The rows of parquet tables. The group is the column that is named for it, else the path, else the key.

    Raises ValueError for a missing path, no tables, no rows, a broken table, and for columns that are not there
    or hold no images.
    """

    def __init__(self, cfg: ParquetConfig, *, part_size: int, setting: str) -> None:
        self.cfg = cfg
        self.tables = Tables(
            cfg, image=cfg.image, image_setting="image", part_size=part_size, suffixes={".parquet"}, setting=setting
        )
        for name, column in (("image", cfg.image), ("condition", cfg.condition)):
            kind = self.tables.schema().field(column).type if column else None
            if kind is not None and not _is_image(kind):
                raise ValueError(
                    f"{setting}.{name}: the column {column!r} holds {kind}, no images or paths; name another"
                )
        self._bucket = cache(lambda bucket: open_storage(f"s3://{bucket}"))

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: runs of row groups, or slices of large ones, of at most `part_size` rows."""
        return self.tables.parts()

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The rows of a part; one that cannot be read, or whose image cannot, is a Reject."""
        return read_ahead(self._sample, self.tables.rows(part), storage=self.tables.storage)

    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as `Tables.classes` finds them."""
        return self.tables.classes()

    def digest(self) -> str:
        """sha256 over the name, size and content (or ETag) of each table, and of each image that lies outside."""
        tables = digest_entries(self.tables.storage, self.tables.entries)
        columns = [column for column in (self.cfg.image, self.cfg.condition) if column]
        outside = [self._digest_outside(column) for column in columns if self._leads_outside(column)]
        return hashlib.sha256("\n".join([tables, *outside]).encode()).hexdigest() if outside else tables

    def _leads_outside(self, column: str) -> bool:
        """Whether cells may be paths: not if all have bytes, as the footers tell."""
        kind = self.tables.schema().field(column).type
        if pa.types.is_struct(kind):
            names = [field.name for field in kind]
            return "path" in names and ("bytes" not in names or self.tables.has_nulls(f"{column}.bytes"))
        return _is_text(kind)

    def _digest_outside(self, column: str) -> str:
        """sha256 over the path and content of each image that a column leads to, in the order of the rows."""
        is_struct = pa.types.is_struct(self.tables.schema().field(column).type)
        digest = hashlib.sha256()
        for batch in in_batches(self.tables.cells(f"{column}.path" if is_struct else column)):
            places = [self._place(_bytes_and_path(cell)[1], table=table) for table, cell in batch]
            for storage in dict.fromkeys(place[0] for place in places if place):
                keys = [place[1] for place in places if place and place[0] is storage]
                entries = read_ahead(partial(_entry, storage), keys, storage=storage)
                digest.update(digest_entries(storage, entries, max_bytes=MAX_FILE_BYTES).encode())
        return digest.hexdigest()

    def _place(self, path: str | None, *, table: str) -> tuple[Storage, str] | None:
        """Where an image lies, None for a cell without a path, or with one that is not followed."""
        try:
            return None if path is None else self._locate(path, table=table)
        except ValueError:
            return None

    def _sample(self, row: Row | Reject) -> Sample | Reject:
        if isinstance(row, Reject):
            return row
        try:
            image, path, group = self._image(row.image, row, column=self.cfg.image)
            condition = self._image(row.condition, row, column=self.cfg.condition)[0] if self.cfg.condition else None
        except _Lacking as lacking:
            return lacking.reject
        meta = {**row.meta, "file_name": row.place} | ({} if path is None else {"path": path})
        return Sample(
            row.key,
            row.group or group,
            image,
            row.captions,
            meta,
            caption_weights=row.weights,
            label=row.label,
            condition=condition,
        )

    def _image(self, cell: Any, row: Row, *, column: str) -> tuple[bytes, str | None, str]:
        """The bytes that a cell holds or leads to, its path, and the group that it makes. Raises _Lacking."""
        image, path = _bytes_and_path(cell)
        if image is not None:
            return image, path, row.key
        if path is None:
            reason = "no_image" if column == self.cfg.image else "no_condition"
            raise _Lacking(Reject(row.key, row.place, reason, f"the column {column} has neither bytes nor a path"))
        try:
            storage, key = self._locate(path, table=row.table)
            return storage.read(key), path, path if "://" in path else key
        except ValueError as error:
            raise _Lacking(Reject(row.key, row.place, "unsafe_path", str(error))) from None
        except OSError as error:
            if blames_storage(error, storage=storage):
                raise
            raise _Lacking(Reject(row.key, row.place, "unreadable", str(error))) from None

    def _locate(self, path: str, *, table: str) -> tuple[Storage, str]:
        """Where an image lies, beside the table or under `s3://`. Raises ValueError for a path that leads elsewhere."""
        if "://" not in path:
            return self.tables.storage, os.path.join(os.path.dirname(table), check_key(path))
        bucket, _, key = path.removeprefix("s3://").partition("/")
        if not path.startswith("s3://") or not bucket:
            raise ValueError(f"{path} is neither relative to the table nor under s3://")
        return self._bucket(bucket), check_key(key)


class _Lacking(Exception):
    """A row without an image that can be read."""

    def __init__(self, reject: Reject) -> None:
        self.reject = reject


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return _is_text(kind) or any(is_kind(kind) for is_kind in binaries)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _entry(storage: Storage, key: str) -> Entry:
    """What is stored under a key, of size 0 and without a version if there is nothing."""
    try:
        return storage.stat(key)
    except ConnectionError:
        raise
    except OSError as error:
        if blames_storage(error, storage=storage):
            raise
        return Entry(key, 0, "")


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    image, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    return image if isinstance(image, bytes) else None, path if isinstance(path, str) else None
