"""A folder of images with captions: `.txt` sidecars, or metadata as Hugging Face's ImageFolder has it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from genpipe.config import Config, Location
from genpipe.data.classes import class_names
from genpipe.data.samples import Reject, Sample, clean_captions
from genpipe.data.sources.captions import (
    WEIGHTS_FIELD,
    CaptionFields,
    caption_columns,
    captions_of,
    check_templates,
    label_of,
)
from genpipe.data.sources.identity import digest_entries
from genpipe.data.sources.listing import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    blames_storage,
    is_hidden,
    is_text,
    part_names,
    read_ahead,
    suffix_of,
    unique_keys,
)
from genpipe.data.sources.names import Names, pair_by_stem, stem_of
from genpipe.data.sources.records import Record, jsonable, read_records
from genpipe.data.sources.rowgroups import read_parquet
from genpipe.storage import check_key, local_path, open_storage

METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
FOLDER = "folder"
STEM = "{stem}"


class FolderConfig(Config):
    """A folder of images; subfolders are included, hidden files and folders are not."""

    kind: Literal["folder"]
    path: Location = Field(min_length=1, description="folder of images, or s3://bucket/prefix; `~` is expanded")
    captions: CaptionFields = Field(
        {}, description="metadata fields, or templates ('a photo of a {label}'), to weights; default: text, caption, "
        "captions, else prompt or description, else the .txt beside the image",
    )  # fmt: skip
    label: str = Field("", description="`folder` (the class is the name of the image's folder), or a metadata field")
    condition: str = Field(
        "",
        description="conditioning images: a metadata field of file names, or where they are in the source: "
        "'depth/{stem}.png', '{folder}/{stem}.depth.png', or 'depth/{parent}/{stem}.png' with the image's own folder",
    )

    @model_validator(mode="after")
    def _templates_have_labels(self) -> Self:
        check_templates(self.captions, label=self.label)
        return self


@dataclass(frozen=True)
class _Row:
    """What a metadata line says about one image."""

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    condition: str | None = None  # as it is written there


@dataclass(frozen=True)
class _Image:
    name: str  # relative to the folder, with forward slashes
    key: str
    row: _Row
    sidecar: str  # "" without one
    condition: str  # likewise


@dataclass(frozen=True)
class _Metadata:
    """What was read of a metadata file, for messages."""

    file: str
    lines: int
    fields: tuple[str, ...]
    first: str


class FolderSource:
    """The samples of a folder in the order of their names.

    Captions are those of the image's metadata line if it has any, else the lines of its `.txt` sidecar. The
    group is the metadata's `group`, else the file's path without its suffix (so `cat.jpg` and `cat.png` beside it are
    one subject). Names are matched whatever their Unicode normal form, and sidecars whatever their case where that
    leaves no doubt. Files that are used for nothing are rejects, too.

    Raises ValueError for a missing folder, one without images, and one without any caption.
    """

    def __init__(self, cfg: FolderConfig, *, part_size: int, setting: str) -> None:
        self.cfg = cfg
        self.part_size = part_size
        self.setting = setting
        root = local_path(cfg.path)
        root = root and root.expanduser()
        if root and not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ValueError(f"{setting}.path: the folder {root} {what}; give the folder that holds the images")
        self.storage = open_storage(str(root or cfg.path))
        listed = {entry.key: entry for entry in sorted(self.storage.list()) if not is_hidden(entry.key)}
        self._files = {name: entry for name, entry in listed.items() if _is_wanted(name)}
        self._others = [name for name in listed if name not in self._files]
        self._entries = self._list_entries()
        labels = (entry.row.label for entry in self._entries if isinstance(entry, _Image))
        self._classes = class_names(label for label in labels if label is not None)

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: slices of `part_size` names."""
        return part_names(-(-len(self._entries) // self.part_size))

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The samples of a part; a file that cannot be read or has no caption is a Reject."""
        start = int(part) * self.part_size
        return read_ahead(self._read, self._entries[start : start + self.part_size], storage=self.storage)

    def classes(self) -> tuple[str, ...]:
        """The names of all classes; a folder's are known from its listing."""
        return self._classes

    def digest(self) -> str:
        """sha256 over the relative name, size and content (or ETag) of each image and caption file."""
        return digest_entries(self.storage, self._files.values(), max_bytes=MAX_FILE_BYTES)

    def _list_entries(self) -> list[_Image | Reject]:
        images = [name for name in self._files if suffix_of(name) in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(
                f"{self.setting}.path: no images in {self.storage.uri} or its subfolders (looked for "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}); give the folder that holds the images"
            )
        names = Names(images)
        rows, metadata, rejects = self._read_metadata(names)
        conditions = {name: self._condition(name, rows.get(name, _Row()), names) for name in images}
        conditioning = set(conditions.values())
        images = [name for name in images if name not in conditioning]
        rows = {name: self._labeled(name, rows.get(name, _Row())) for name in images}
        if self.cfg.label and not any(row.label for row in rows.values()):
            raise ValueError(f"{self.setting}.label: {self._no_labels()}")
        texts = [name for name in self._files if suffix_of(name) == ".txt"]
        sidecars = pair_by_stem(images, texts)
        if not any(row.captions for row in rows.values()) and not sidecars:
            raise ValueError(f"{self.setting}.path: {self._no_captions(images, metadata)}")
        used = set(sidecars.values())
        rejects += [
            Reject("", text, "caption_without_image", f"no image is called {stem_of(text)}; rename one of the two")
            for text in texts
            if text not in used
        ]
        rejects += self._unused()
        faults = {name: fault for name in images if (fault := _fault(name))}
        rejects += [Reject("", name, "bad_name", f"{fault}; rename the file") for name, fault in faults.items()]
        keys = unique_keys([name for name in images if name not in faults])
        return [
            *(_Image(name, key, rows[name], sidecars.get(name, ""), conditions[name]) for name, key in keys.items()),
            *rejects,
        ]

    def _read_metadata(self, names: Names) -> tuple[dict[str, _Row], list[_Metadata], list[Reject]]:
        rows: dict[str, _Row] = {}
        read: list[_Metadata] = []
        rejects: list[Reject] = []
        for file in (name for name in self._files if _is_metadata(name)):
            try:
                records = self._records(file)
            except ValueError as error:
                raise ValueError(f"{self.setting}.path: {self.storage.uri}/{file} {error}") from None
            lines, first = 0, None
            for lines, (number, record) in enumerate(records, start=1):  # noqa: B007
                first = record if first is None and isinstance(record, dict) else first
                where = f"{file}:{number}"
                try:
                    written, row = self._describe(record)
                    name = names.find(written, folder=os.path.dirname(file))
                except ValueError as error:
                    rejects.append(Reject("", where, "bad_metadata", str(error)))
                    continue
                if name is None:
                    detail = f"no image {written} in {self.storage.uri}; add it, or correct file_name"
                    rejects.append(Reject(written, where, "missing_file", detail))
                elif name in rows:
                    rejects.append(Reject(name, where, "duplicate_key", f"{name} has an earlier metadata line"))
                else:
                    rows[name] = row
            read.append(_Metadata(file, lines, tuple(first or ()), _shown(first)))
        return rows, read, rejects

    def _records(self, file: str) -> Iterator[tuple[int, Record | ValueError | OSError]]:
        if suffix_of(file) == ".parquet":
            return read_parquet(self.storage, self._files[file])
        return read_records(io.BytesIO(self.storage.read(file)), suffix=suffix_of(file))

    def _describe(self, fields: Record | ValueError | OSError) -> tuple[str, _Row]:
        """The image's name and what its line says of it. ValueError tells what is wrong."""
        cfg = self.cfg
        if not isinstance(fields, dict):
            raise ValueError(str(fields))
        if not isinstance(fields.get("file_name"), str):
            raise ValueError('expected a "file_name" string')
        label = label_of(fields.get(cfg.label)) if cfg.label not in ("", FOLDER) else None
        texts, weights = captions_of(fields, wanted=cfg.captions, label=label)
        group = fields.get("group")
        if group is not None and not isinstance(group, str | int):
            raise ValueError('"group" must be a string or an integer')
        condition = fields.get(cfg.condition) if cfg.condition and STEM not in cfg.condition else None
        if condition is not None and not isinstance(condition, str):
            raise ValueError(f'"{cfg.condition}" must be the name of a conditioning image')
        used = {"file_name", "group", WEIGHTS_FIELD, *caption_columns(cfg.captions), cfg.label, cfg.condition}
        meta = {name: jsonable(value) for name, value in fields.items() if name not in used}
        return fields["file_name"], _Row(texts, weights, None if group is None else str(group), meta, label, condition)

    def _labeled(self, name: str, row: _Row) -> _Row:
        """A row with the class that a folder's name says, and the captions that are made of it."""
        if self.cfg.label == FOLDER:
            folder = name.rpartition("/")[0].rpartition("/")[2]
            row = replace(row, label=label_of(folder) if is_text(folder) else None)
            if row.label and not row.captions and self.cfg.captions:
                captions, weights = captions_of({}, wanted=self.cfg.captions, label=row.label)
                row = replace(row, captions=captions, weights=weights)
        return row

    def _condition(self, name: str, row: _Row, names: Names) -> str:
        """The conditioning image of an image, "" where there is none."""
        if STEM in self.cfg.condition:
            path = PurePosixPath(name)
            folder = "" if str(path.parent) == "." else str(path.parent)
            filled = self.cfg.condition.replace("{folder}", folder).replace("{parent}", path.parent.name)
            place = filled.replace(STEM, path.stem).lstrip("/")
            found = names.exactly(os.path.normpath(place)) or ""
            return "" if found == name else found
        return (names.find(row.condition, folder=os.path.dirname(name)) or "") if row.condition else ""

    def _read(self, entry: _Image | Reject) -> Sample | Reject:
        if isinstance(entry, Reject):
            return entry
        name, row = entry.name, entry.row
        if lacking := self._lacking(entry):
            return lacking
        for file in (name, entry.sidecar, entry.condition):
            if file and self._files[file].size > MAX_FILE_BYTES:
                return Reject(entry.key, name, "too_large", f"{file} is larger than {MAX_FILE_BYTES} bytes")
        try:
            captions = row.captions or self._read_sidecar(entry.sidecar)
            image = self.storage.read(name)
            condition = self.storage.read(entry.condition) if entry.condition else None
        except ValueError as error:
            return Reject(entry.key, name, "bad_caption", f"{entry.sidecar}: {error}; save it as UTF-8")
        except OSError as error:
            if blames_storage(error, storage=self.storage):
                raise
            return Reject(entry.key, name, "unreadable", str(error))
        if not captions:
            where = entry.sidecar or f"{stem_of(name)}.txt"
            return Reject(entry.key, name, "no_caption", f"neither metadata nor {where} has a caption for it; add one")
        meta = {**row.meta, "file_name": name}
        group = row.group or stem_of(name)
        return Sample(
            entry.key,
            group,
            image,
            captions,
            meta,
            caption_weights=row.weights,
            label=row.label,
            condition=condition,
        )

    def _lacking(self, entry: _Image) -> Reject | None:
        """A reject for an image without the label or conditioning image that the source says all have."""
        if self.cfg.label and entry.row.label is None:
            detail = f"no class: {self.setting}.label is {self.cfg.label!r}, and it has none"
            return Reject(entry.key, entry.name, "no_label", detail)
        if self.cfg.condition and not entry.condition:
            detail = f"no conditioning image as {self.setting}.condition {self.cfg.condition!r} says"
            return Reject(entry.key, entry.name, "no_condition", detail)
        return None

    def _read_sidecar(self, name: str) -> tuple[str, ...]:
        return clean_captions(self.storage.read(name).decode("utf-8-sig").splitlines()) if name else ()

    def _unused(self) -> Iterator[Reject]:
        """A reject for each suffix of files that are neither images nor captions."""
        by_suffix: dict[str, list[str]] = {}
        for name in self._others:
            by_suffix.setdefault(suffix_of(name), []).append(name)
        for suffix, names in sorted(by_suffix.items()):
            what = f"with the suffix {suffix}" if suffix else "without a suffix"
            detail = f"{len(names)} files {what} are not read, the first is {names[0]}; convert images to PNG or JPEG"
            yield Reject("", names[0], "other_files", detail)

    def _no_captions(self, images: list[str], metadata: list[_Metadata]) -> str:
        looked = f"no captions for the {len(images)} images in {self.storage.uri}"
        if not metadata:
            return (
                f"{looked}: looked for a .txt beside each image (as {stem_of(images[0])}.txt) and for "
                f"{', '.join(sorted(METADATA_NAMES))} with lines such as "
                f'{{"file_name": "{images[0]}", "text": "a caption"}}; add one of them, or, if the folders are named '
                f'after what they show, set {self.setting}.label: folder and {self.setting}.captions: "{{label}}"'
            )
        first = metadata[0]
        fields, near = ", ".join(first.fields) or "none", os.path.relpath(images[0], os.path.dirname(first.file) or ".")
        wanted = ", ".join(caption_columns(self.cfg.captions))
        return (
            f"{looked}: {first.file} was read ({first.lines} lines with the fields {fields}; the first is "
            f"{first.first}), but no line has both the file_name of an image, such as {near}, and a caption in "
            f"{wanted}; set {self.setting}.captions to the field with the captions, or correct file_name"
        )

    def _no_labels(self) -> str:
        if self.cfg.label == FOLDER:
            return f"no image of {self.storage.uri} lies in a subfolder that could name its class; give their parent"
        return f"no image has the field {self.cfg.label!r} in its metadata line; name another, or `{FOLDER}`"


def _is_wanted(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES or suffix_of(name) == ".txt" or _is_metadata(name)


def _is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA_NAMES


def _fault(name: str) -> str:
    """Why a file's name can stand in no table or archive, or "" if it can."""
    if not is_text(name):
        return "not UTF-8"
    try:
        check_key(name)
    except ValueError as error:
        return str(error)
    return ""


def _shown(record: Record | None) -> str:
    text = str(record)
    return text if len(text) <= 200 else text[:197] + "..."
