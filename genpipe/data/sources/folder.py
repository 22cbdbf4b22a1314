"""A folder of images with captions: `.txt` sidecars, or metadata as Hugging Face's ImageFolder has it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from genpipe.config import Config
from genpipe.data.samples import Reject, Sample, clean_captions
from genpipe.data.sources.captions import CAPTION_FIELDS, WEIGHTS_FIELD, CaptionFields, captions_of
from genpipe.data.sources.listing import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    blames_storage,
    digest_entries,
    is_hidden,
    is_text,
    part_names,
    read_ahead,
    suffix_of,
    unique_keys,
)
from genpipe.data.sources.records import Record, jsonable, read_records
from genpipe.data.sources.rowgroups import read_parquet
from genpipe.storage import check_key, local_path, open_storage

METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})


class FolderConfig(Config):
    """A folder of images; subfolders are included, hidden files and folders are not."""

    kind: Literal["folder"]
    path: str = Field(min_length=1, description="folder of images, or s3://bucket/prefix; `~` is expanded")
    captions: CaptionFields = Field({}, description="metadata fields to weights; default: text, caption, captions")


@dataclass(frozen=True)
class _Row:
    """What a metadata line says about one image."""

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Image:
    name: str  # relative to the folder, with forward slashes
    key: str
    row: _Row


class FolderSource:
    """The samples of a folder in the order of their names.

    Captions are those of the image's metadata line if it has any, else the lines of its `.txt` sidecar. The
    group is the metadata's `group`, else the file's stem (so `cat.jpg` and `other/cat.png` are one subject).

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
        self._files = {entry.key: entry for entry in sorted(self.storage.list()) if _is_wanted(entry.key)}
        self._entries = self._list_entries()

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: slices of `part_size` names."""
        return part_names(-(-len(self._entries) // self.part_size))

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The samples of a part; a file that cannot be read or has no caption is a Reject."""
        start = int(part) * self.part_size
        return read_ahead(self._read, self._entries[start : start + self.part_size], storage=self.storage)

    def digest(self) -> str:
        """sha256 over the relative name, size and time (or ETag) of each image and caption file."""
        return digest_entries(self._files.values())

    def _list_entries(self) -> list[_Image | Reject]:
        images = [name for name in self._files if suffix_of(name) in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(
                f"{self.setting}.path: no images in {self.storage.uri} or its subfolders (looked for "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}); give the folder that holds the images"
            )
        rows, rejects = self._read_metadata(set(images))
        has_row = any(row.captions for row in rows.values())
        if not has_row and not any(_sidecar(name) in self._files for name in images):
            raise ValueError(
                f"{self.setting}.path: no captions for the {len(images)} images in {self.storage.uri}: looked for a "
                f".txt beside each image (as {_sidecar(images[0])}) and for {', '.join(sorted(METADATA_NAMES))} "
                f'with lines such as {{"file_name": "{images[0]}", "text": "a caption"}}; add one of them'
            )
        faults = {name: fault for name in images if (fault := _fault(name))}
        rejects += [Reject("", name, "bad_name", fault) for name, fault in faults.items()]
        keys = unique_keys([name for name in images if name not in faults])
        return [*(_Image(name, key, rows.get(name, _Row())) for name, key in keys.items()), *rejects]

    def _read_metadata(self, images: set[str]) -> tuple[dict[str, _Row], list[Reject]]:
        rows: dict[str, _Row] = {}
        rejects: list[Reject] = []
        for file in (name for name in self._files if _is_metadata(name)):
            try:
                records = self._records(file)
            except ValueError as error:
                raise ValueError(f"{self.setting}.path: {self.storage.uri}/{file} {error}") from None
            for number, record in records:
                where = f"{file}:{number}"
                try:
                    name, row = _describe(record, folder=os.path.dirname(file), captions=self.cfg.captions)
                except ValueError as error:
                    rejects.append(Reject("", where, "bad_metadata", str(error)))
                    continue
                if name in rows:
                    rejects.append(Reject(name, where, "duplicate_key", f"{name} has an earlier metadata line"))
                elif name not in images:
                    rejects.append(Reject(name, where, "missing_file", f"no image {name} in {self.storage.uri}"))
                else:
                    rows[name] = row
        return rows, rejects

    def _records(self, file: str) -> Iterator[tuple[int, Record | ValueError | OSError]]:
        if suffix_of(file) == ".parquet":
            return read_parquet(self.storage, self._files[file])
        return read_records(io.BytesIO(self.storage.read(file)), suffix=suffix_of(file))

    def _read(self, entry: _Image | Reject) -> Sample | Reject:
        if isinstance(entry, Reject):
            return entry
        name, row, sidecar = entry.name, entry.row, _sidecar(entry.name)
        for file in (name, sidecar):
            if file in self._files and self._files[file].size > MAX_FILE_BYTES:
                return Reject(entry.key, name, "too_large", f"{file} is larger than {MAX_FILE_BYTES} bytes")
        try:
            captions = row.captions or self._read_sidecar(sidecar)
            image = self.storage.read(name)
        except ValueError as error:
            return Reject(entry.key, name, "bad_caption", f"{sidecar}: {error}")
        except OSError as error:
            if blames_storage(error, storage=self.storage):
                raise
            return Reject(entry.key, name, "unreadable", str(error))
        if not captions:
            detail = f"neither metadata nor {sidecar} has a caption for it"
            return Reject(entry.key, name, "no_caption", detail)
        meta = {**row.meta, "file_name": name}
        group = row.group or PurePosixPath(name).stem
        return Sample(entry.key, group, image, captions, meta, caption_weights=row.weights)

    def _read_sidecar(self, name: str) -> tuple[str, ...]:
        if name not in self._files:
            return ()
        return clean_captions(self.storage.read(name).decode("utf-8-sig").splitlines())


def _is_wanted(name: str) -> bool:
    return not is_hidden(name) and (
        suffix_of(name) in IMAGE_SUFFIXES or suffix_of(name) == ".txt" or _is_metadata(name)
    )


def _is_metadata(name: str) -> bool:
    return PurePosixPath(name).name in METADATA_NAMES


def _sidecar(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _fault(name: str) -> str:
    """Why a file's name can stand in no table or archive, or "" if it can."""
    if not is_text(name):
        return "not UTF-8"
    try:
        check_key(name)
    except ValueError as error:
        return str(error)
    return ""


def _describe(fields: Record | ValueError | OSError, *, folder: str, captions: Mapping[str, float]) -> tuple[str, _Row]:
    """The image's name relative to the source and what its line says. ValueError tells what is wrong."""
    if not isinstance(fields, dict):
        raise ValueError(str(fields))
    if not isinstance(fields.get("file_name"), str):
        raise ValueError('expected a "file_name" string')
    name = os.path.normpath(os.path.join(folder, fields["file_name"])).replace(os.sep, "/")
    if name.startswith(("../", "/")):
        raise ValueError(f"file_name {name} lies outside the folder")
    texts, weights = captions_of(fields, wanted=captions)
    group = fields.get("group")
    if group is not None and not isinstance(group, str | int):
        raise ValueError('"group" must be a string or an integer')
    used = {"file_name", "group", WEIGHTS_FIELD, *(captions or CAPTION_FIELDS)}
    meta = {name: jsonable(value) for name, value in fields.items() if name not in used}
    return name, _Row(texts, weights, None if group is None else str(group), meta)
