"""Parquet with images in it, or with their paths: the layout of Hugging Face datasets and others like it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.listing import blames_storage, digest_entries, read_ahead
from genpipe.data.sources.tables import Row, TableConfig, Tables
from genpipe.storage import Storage, check_key, open_storage


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
        """sha256 over the name, size and time (or ETag) of each table; images that lie beside are not looked at."""
        return digest_entries(self.tables.entries)

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
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*texts, *binaries))


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    image, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    return image if isinstance(image, bytes) else None, path if isinstance(path, str) else None
