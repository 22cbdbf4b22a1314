"""Tables of samples (parquet, CSV, JSON lines): which columns mean what, and the rows part by part."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from genpipe.config import Config, Location
from genpipe.data.classes import class_names
from genpipe.data.samples import Reject
from genpipe.data.sources.captions import (
    CAPTION_FIELDS,
    WEIGHTS_FIELD,
    CaptionFields,
    caption_columns,
    captions_of,
    check_templates,
    label_of,
    labels_of,
)
from genpipe.data.sources.listing import list_files, member_key, part_names, read_ahead, suffix_of, unique_keys
from genpipe.data.sources.records import Part, Record, cut_lines, jsonable, read_lines
from genpipe.data.sources.rowgroups import (
    cut_row_groups,
    group_sizes,
    may_have_nulls,
    open_parquet,
    read_row_groups,
    unique_values,
)
from genpipe.storage import Entry


class TableConfig(Config):
    """What the kinds of tables have in common: where they are, and which columns mean what."""

    path: Location = Field(
        min_length=1, description="table, folder of tables, pattern such as *.parquet, or s3:// of these"
    )
    captions: CaptionFields = Field(
        {}, description="columns, or templates ('a photo of a {label}'), to weights; default: text, caption, captions, "
        "else prompt or description",
    )  # fmt: skip
    label: str = Field("", description="column of class names or numbers")
    condition: str = Field("", description="column of conditioning images, as that of the images")
    group: str = Field("", description="column that names the subject; default: the image's path or URL, else the key")
    key: str = Field("", description="column of keys, none twice in a part; default: the table's name and row's number")
    meta: tuple[str, ...] = Field((), description="columns that travel with the sample")

    @model_validator(mode="after")
    def _templates_have_labels(self) -> Self:
        check_templates(self.captions, label=self.label)
        return self


@dataclass(frozen=True)
class Row:
    """A row with its captions, label and meta; the image is yet to be read."""

    key: str
    place: str  # the table and the number of the row
    table: str
    image: Any  # of the column that `Tables` was told
    condition: Any  # of the column of conditioning images
    label: str | None
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
        self._named |= {cfg.label: "label", cfg.condition: "condition"}
        self._named |= dict.fromkeys(caption_columns(cfg.captions) if cfg.captions else (), "captions")
        self._named |= dict.fromkeys(cfg.meta, "meta")
        self._named.pop("", None)
        self.storage, self.entries = list_files(cfg.path, suffixes=suffixes, setting=f"{setting}.path", what="tables")
        self._keys = unique_keys([entry.key for entry in self.entries])
        self._parts = [part for parts in read_ahead(self._cut, self.entries, storage=self.storage) for part in parts]
        if not self._parts:
            raise ValueError(
                f"{setting}.path: the tables of {cfg.path} have no rows ({len(self.entries)} tables read); give others"
            )
        self._names = self._declared_names() if cfg.label else ()

    def parts(self) -> list[str]:
        """`00000`, `00001`, ..."""
        return part_names(len(self._parts))

    def schema(self) -> pa.Schema:
        """The types of the columns of the first table, if it is parquet."""
        return open_parquet(self.storage, self._parts[0].table).schema_arrow

    def classes(self) -> tuple[str, ...]:
        """The names of the classes: those that Hugging Face's metadata give the numbers, else what the column holds.

        Without such metadata the column is read through.
        """
        if self._names or not self.cfg.label:
            return self._names
        # Of parquet whole tables, whose row groups give their different values at once.
        pieces = dict.fromkeys(part.table if part.row_groups else part for part in self._parts)
        found = read_ahead(self._labels, pieces, storage=self.storage)
        return class_names({label for labels in found for label in labels})

    def rows(self, part: str) -> Iterator[Row | Reject]:
        """The rows of a part in their order; one without a caption or with a fault is a Reject."""
        cut = self._parts[int(part)]
        usual = () if self.cfg.captions else (*caption_columns({}), WEIGHTS_FIELD)
        for number, record in enumerate(self._records(cut, columns=[*self._named, *usual]), start=cut.start):
            yield self._row(record, table=cut.table.key, number=number)

    def cells(self, column: str) -> Iterator[tuple[str, Any]]:
        """The table and the value of one column for each row of all tables that can be read.

        Of a parquet struct the column `struct.field` reads this field only, and gives `{field: value}`.
        """
        is_column = suffix_of(self._parts[0].table.key) != ".parquet" or column in self.schema().names
        root = column if is_column else column.split(".")[0]
        for part in self._parts:
            for value in _cells(self._records(part, columns=[column]), root):
                yield part.table.key, value

    def has_nulls(self, column: str) -> bool:
        """Whether a column of parquet, or `struct.field`, may have nulls, as the footers tell."""
        return any(may_have_nulls(open_parquet(self.storage, table), column) for table in self.entries)

    def _records(self, part: Part, *, columns: list[str]) -> Iterator[Record | ValueError | OSError]:
        if part.row_groups:
            return read_row_groups(self.storage, part, columns=columns)
        return read_lines(self.storage, part, suffix=suffix_of(part.table.key))

    def _labels(self, piece: Entry | Part) -> set[str]:
        column = self.cfg.label
        if isinstance(piece, Entry):
            return labels_of(unique_values(self.storage, piece, column))
        return labels_of(_cells(self._records(piece, columns=[column]), column))

    def _declared_names(self) -> tuple[str, ...]:
        """The names of a Hugging Face ClassLabel column, else ()."""
        if suffix_of(self._parts[0].table.key) != ".parquet":
            return ()
        metadata = (self.schema().metadata or {}).get(b"huggingface", b"{}")
        try:
            feature = json.loads(metadata)["info"]["features"][self.cfg.label]
            names = feature.get("names") or ()
        except (ValueError, KeyError, TypeError, AttributeError):
            return ()
        return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()

    def _label(self, record: Record) -> str | None:
        """The name of a row's class. Raises ValueError for what cannot be one."""
        value = record.get(self.cfg.label) if self.cfg.label else None
        if not self._names or not isinstance(value, int) or isinstance(value, bool):
            return label_of(value)
        if value == -1:  # what Hugging Face has for an unknown class
            return None
        if not 0 <= value < len(self._names):
            raise ValueError(f"the label {value} is none of the {len(self._names)} classes that the table declares")
        return self._names[value]

    def _row(self, record: Record | ValueError | OSError, *, table: str, number: int) -> Row | Reject:
        key, place = f"{self._keys[table]}-{number:08d}", f"{table}:{number}"
        if isinstance(record, OSError):
            return Reject(key, place, "unreadable", str(record))
        if isinstance(record, ValueError):
            return Reject(key, place, "bad_metadata", str(record))
        if own := _text(record, self.cfg.key):
            key = member_key(own)
        try:
            label = self._label(record)
        except ValueError as error:
            return Reject(key, place, "bad_label", str(error))
        if self.cfg.label and label is None:
            return Reject(
                key, place, "no_label", f"none in {self.cfg.label}; fill it, or leave {self.setting}.label out"
            )
        try:
            captions, weights = captions_of(record, wanted=self.cfg.captions, label=label)
        except ValueError as error:
            return Reject(key, place, "bad_caption", str(error))
        if not captions:
            return Reject(key, place, "no_caption", f"none in {', '.join(caption_columns(self.cfg.captions))}")
        meta = {name: jsonable(record.get(name)) for name in self.cfg.meta}
        group = _text(record, self.cfg.group)
        condition = record.get(self.cfg.condition) if self.cfg.condition else None
        return Row(
            key=key,
            place=place,
            table=table,
            image=record.get(self.image),
            condition=condition,
            label=label,
            captions=captions,
            weights=weights,
            group=group,
            meta=meta,
        )

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
        for name in (*self._named, *caption_columns({}), WEIGHTS_FIELD):
            if columns.count(name) > 1:
                raise ValueError(
                    f"{self.setting}.path: {where} has several columns {name!r}; {has}; rename all but one"
                )
        if not self.cfg.captions and not set(caption_columns({})) & set(columns):
            looked = ", ".join(CAPTION_FIELDS)
            raise ValueError(
                f"{self.setting}.captions: {where} has none of the columns {looked}; {has}; name those with captions"
            )


def _cells(records: Iterator[Record | ValueError | OSError], column: str) -> Iterator[Any]:
    return (record.get(column) for record in records if isinstance(record, dict))


def _text(record: Record, column: str) -> str:
    """The text of a column, "" for nothing; the empty column name means that none is set."""
    value = jsonable(record.get(column)) if column else None
    return "" if value is None else str(value)
