"""Tables of samples (parquet, CSV, JSON lines): which columns mean what, and the rows part by part."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from genpipe.config import Config
from genpipe.data.samples import Reject
from genpipe.data.sources.captions import CAPTION_FIELDS, WEIGHTS_FIELD, CaptionFields, captions_of
from genpipe.data.sources.listing import list_files, member_key, part_names, read_ahead, suffix_of, unique_keys
from genpipe.data.sources.records import Part, Record, cut_lines, jsonable, read_lines
from genpipe.data.sources.rowgroups import cut_row_groups, group_sizes, open_parquet, read_row_groups
from genpipe.storage import Entry


class TableConfig(Config):
    """What the kinds of tables have in common: where they are, and which columns mean what."""

    path: str = Field(min_length=1, description="table, folder of tables, pattern such as *.parquet, or s3:// of these")
    captions: CaptionFields = Field({}, description="columns to weights; default: text, caption, captions")
    group: str = Field("", description="column that names the subject; default: the image's path or URL, else the key")
    key: str = Field("", description="column of keys, none twice in a part; default: the table's name and row's number")
    meta: tuple[str, ...] = Field((), description="columns that travel with the sample")


@dataclass(frozen=True)
class Row:
    """A row with its captions: what is left to do is to get the image."""

    key: str
    place: str  # the table and the number of the row
    table: str
    image: Any  # of the column that `Tables` was told
    captions: tuple[str, ...]
    weights: tuple[float, ...]
    group: str  # "" where the row has none
    meta: dict[str, Any]


class Tables:
    """The rows of one or many tables, in parts of at most `part_size` rows.

    A part of parquet is a run of row groups, or a slice of a large one, found from the footers. CSV and JSON
    lines are read through once to find where the parts start. `image` names the column of images, itself set by
    `image_setting`. Raises ValueError for a missing path, no tables, no rows, a table that cannot be read, and
    columns that are not there.
    """

    def __init__(
        self,
        cfg: TableConfig,
        *,
        image: str,
        image_setting: str,
        part_size: int,
        suffixes: Collection[str],
        setting: str,
    ) -> None:
        self.cfg, self.image, self.part_size, self.setting = cfg, image, part_size, setting
        self._named = {image: image_setting, cfg.key: "key", cfg.group: "group"}
        self._named |= dict.fromkeys(cfg.captions, "captions") | dict.fromkeys(cfg.meta, "meta")
        self._named.pop("", None)
        self.storage, self.entries = list_files(cfg.path, suffixes=suffixes, setting=f"{setting}.path", what="tables")
        self._keys = unique_keys([entry.key for entry in self.entries])
        self._parts = [part for parts in read_ahead(self._cut, self.entries, storage=self.storage) for part in parts]
        if not self._parts:
            raise ValueError(
                f"{setting}.path: the tables of {cfg.path} have no rows ({len(self.entries)} looked at); give others"
            )

    def parts(self) -> list[str]:
        """`00000`, `00001`, ..."""
        return part_names(len(self._parts))

    def schema(self) -> pa.Schema:
        """The types of the columns of the first table, if it is parquet."""
        return open_parquet(self.storage, self._parts[0].table).schema_arrow

    def rows(self, part: str) -> Iterator[Row | Reject]:
        """The rows of a part in their order; one without a caption or with a fault is a Reject."""
        cut = self._parts[int(part)]
        if cut.row_groups:
            wanted = [*self._named, *(() if self.cfg.captions else (*CAPTION_FIELDS, WEIGHTS_FIELD))]
            records = read_row_groups(self.storage, cut, columns=wanted)
        else:
            records = read_lines(self.storage, cut, suffix=suffix_of(cut.table.key))
        for number, record in enumerate(records, start=cut.start):
            yield self._row(record, table=cut.table.key, number=number)

    def _row(self, record: Record | ValueError | OSError, *, table: str, number: int) -> Row | Reject:
        key, place = f"{self._keys[table]}-{number:08d}", f"{table}:{number}"
        if isinstance(record, OSError):
            return Reject(key, place, "unreadable", str(record))
        if isinstance(record, ValueError):
            return Reject(key, place, "bad_metadata", str(record))
        if own := _text(record, self.cfg.key):
            key = member_key(own)
        try:
            captions, weights = captions_of(record, wanted=self.cfg.captions)
        except ValueError as error:
            return Reject(key, place, "bad_caption", str(error))
        if not captions:
            return Reject(key, place, "no_caption", f"none in {', '.join(self.cfg.captions or CAPTION_FIELDS)}")
        meta = {name: jsonable(record.get(name)) for name in self.cfg.meta}
        group = _text(record, self.cfg.group)
        return Row(key, place, table, record.get(self.image), captions, weights, group, meta)

    def _cut(self, table: Entry) -> list[Part]:
        suffix = suffix_of(table.key)
        try:
            if suffix == ".parquet":
                file = open_parquet(self.storage, table)
                columns = file.schema_arrow.names
                parts = cut_row_groups(table, group_sizes(file), part_size=self.part_size)
            else:
                columns, parts = cut_lines(self.storage, table, suffix=suffix, part_size=self.part_size)
        except ValueError as error:
            raise ValueError(
                f"{self.setting}.path: {self.storage.uri}/{table.key} {error}, or narrow the path"
            ) from None
        if parts:
            self._check_columns(columns, table=table)
        return parts

    def _check_columns(self, columns: Sequence[str], *, table: Entry) -> None:
        where, has = f"{self.storage.uri}/{table.key}", f"its columns are {', '.join(columns) or 'none'}"
        plain = {column.lower(): column for column in columns}
        for name, setting in self._named.items():
            if name not in columns:
                near = difflib.get_close_matches(name.lower(), plain, n=1)
                remedy = f"did you mean {plain[near[0]]!r}?" if near else "name another"
                raise ValueError(f"{self.setting}.{setting}: {where} has no column {name!r}; {has}; {remedy}")
        for name in (*self._named, *CAPTION_FIELDS, WEIGHTS_FIELD):
            if columns.count(name) > 1:
                raise ValueError(
                    f"{self.setting}.path: {where} has several columns {name!r}; {has}; rename all but one"
                )
        if not self.cfg.captions and not set(CAPTION_FIELDS) & set(columns):
            looked = ", ".join(CAPTION_FIELDS)
            raise ValueError(
                f"{self.setting}.captions: {where} has none of the columns {looked}; {has}; name those with captions"
            )


def _text(record: Record, column: str) -> str:
    """What a column says, "" for nothing; a column may have the empty name, which as a setting means none."""
    value = jsonable(record.get(column)) if column else None
    return "" if value is None else str(value)
