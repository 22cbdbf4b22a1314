"""A folder of images with captions: `.txt` sidecars, or `metadata.jsonl` (Hugging Face ImageFolder)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from genpipe.config import Config
from genpipe.data.samples import Reject, Sample, clean_captions

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
METADATA_NAME = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "captions")
MAX_KEY_LENGTH = 150


class FolderConfig(Config):
    """A folder of images; subfolders are included, hidden files and folders are not."""

    kind: Literal["folder"]
    path: str = Field(min_length=1, description="folder of images; `~` is expanded")


@dataclass(frozen=True)
class _Row:
    """What a metadata line says about one image."""

    captions: tuple[str, ...]
    group: str | None
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Image:
    name: str  # relative to the folder, with forward slashes
    key: str
    row: _Row | None


class FolderSource:
    """The samples of a folder in the order of their names.

    Captions are those of the image's metadata line if it has any, else the lines of its `.txt` sidecar. The
    group is the metadata's `group`, else the file's stem (so `cat.jpg` and `other/cat.png` are one subject).

    Raises ValueError for a missing folder, one without images, and one without any caption.
    """

    def __init__(self, cfg: FolderConfig, *, part_size: int) -> None:
        self.root = Path(cfg.path).expanduser()
        self.part_size = part_size
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise ValueError(f"source.path: the folder {self.root} {what}; give the folder that holds the images")
        self._files = sorted(_walk(self.root))
        self._entries = self._list_entries()

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: slices of `part_size` names."""
        return [f"{number:05d}" for number in range(-(-len(self._entries) // self.part_size))]

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The samples of a part; a file that cannot be read or has no caption is a Reject."""
        start = int(part) * self.part_size
        for entry in self._entries[start : start + self.part_size]:
            yield entry if isinstance(entry, Reject) else self._read_image(entry)

    def digest(self) -> str:
        """sha256 over the relative name, size and modification time of each image and caption file."""
        digest = hashlib.sha256()
        for name in self._files:
            stat = (self.root / name).stat()
            digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _list_entries(self) -> list[_Image | Reject]:
        images = [name for name in self._files if _suffix(name) in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(
                f"source.path: no images in {self.root} or its subfolders (looked for "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}); give the folder that holds the images"
            )
        rows, rejects = self._read_metadata(set(images))
        sidecars = {name for name in self._files if _suffix(name) == ".txt"}
        has_row = any(row.captions for row in rows.values())
        if not has_row and not any(_sidecar(name) in sidecars for name in images):
            raise ValueError(
                f"source.path: no captions for the {len(images)} images in {self.root}: looked for a .txt "
                f"beside each image (as {_sidecar(images[0])}) and for {METADATA_NAME} with lines such as "
                f'{{"file_name": "{images[0]}", "text": "a caption"}}; add one of them'
            )
        named = [name for name in images if _is_text(name)]
        rejects += [Reject("", ascii(name), "bad_name", "not UTF-8") for name in images if not _is_text(name)]
        keys = _unique_keys(named)
        return [*(_Image(name, keys[name], rows.get(name)) for name in named), *rejects]

    def _read_metadata(self, images: set[str]) -> tuple[dict[str, _Row], list[Reject]]:
        rows: dict[str, _Row] = {}
        rejects: list[Reject] = []
        for file in (name for name in self._files if name.rsplit("/", 1)[-1] == METADATA_NAME):
            for number, line in enumerate((self.root / file).read_bytes().splitlines(), start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    name, row = _parse_line(line, folder=file[: -len(METADATA_NAME)])
                except ValueError as error:
                    rejects.append(Reject("", where, "bad_metadata", str(error)))
                    continue
                if name in rows:
                    rejects.append(Reject(name, where, "duplicate_key", f"{name} has an earlier metadata line"))
                elif name not in images:
                    rejects.append(Reject(name, where, "missing_file", f"no image {name} in {self.root}"))
                else:
                    rows[name] = row
        return rows, rejects

    def _read_image(self, entry: _Image) -> Sample | Reject:
        path = self.root / entry.name
        row = entry.row or _Row((), None, {})
        try:
            captions = row.captions or self._read_sidecar(entry.name)
            image = path.read_bytes()
        except UnicodeDecodeError as error:
            return Reject(entry.key, entry.name, "bad_caption", f"{_sidecar(entry.name)} is not UTF-8: {error}")
        except OSError as error:
            return Reject(entry.key, entry.name, "unreadable", str(error))
        if not captions:
            detail = f"neither {METADATA_NAME} nor {_sidecar(entry.name)} has a caption for it"
            return Reject(entry.key, entry.name, "no_caption", detail)
        meta = {**row.meta, "file_name": entry.name}
        return Sample(entry.key, row.group or path.stem, image, captions, meta)

    def _read_sidecar(self, name: str) -> tuple[str, ...]:
        path = self.root / _sidecar(name)
        return clean_captions(path.read_text("utf-8-sig").splitlines()) if path.exists() else ()


def _walk(root: Path) -> Iterator[str]:
    """Relative names of the images, sidecars and metadata files under `root`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            wanted = _suffix(name) in IMAGE_SUFFIXES or _suffix(name) == ".txt" or name == METADATA_NAME
            if wanted and not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_text(name: str) -> bool:
    # The file system's bytes that are not UTF-8 come as lone surrogates, which no table or archive takes.
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _sidecar(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _parse_line(line: bytes, *, folder: str) -> tuple[str, _Row]:
    """The image's name relative to the source and what the line says. ValueError tells what is wrong."""
    fields = json.loads(line.decode("utf-8-sig"))
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise ValueError('expected a JSON object with a "file_name" string')
    # Also JSON's reader takes lone surrogates and NaN, which no other reader of our shards would.
    json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    name = os.path.normpath(folder + fields.pop("file_name")).replace(os.sep, "/")
    if name.startswith(("../", "/")):
        raise ValueError(f"file_name {name} lies outside the folder")
    captions: list[str] = []
    for field in CAPTION_FIELDS:
        value = fields.pop(field, None)
        captions += value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{' / '.join(CAPTION_FIELDS)} must be a string or a list of strings")
    group = fields.pop("group", None)
    if group is not None and not isinstance(group, str | int):
        raise ValueError('"group" must be a string or an integer')
    return name, _Row(clean_captions(captions), None if group is None else str(group), fields)


def _unique_keys(names: list[str]) -> dict[str, str]:
    """A member name for each file; names that clash when cleaned (a.jpg, a.png) get a hash of the name."""
    stems = {name: os.path.splitext(name)[0] for name in names}
    plain = {name: re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:MAX_KEY_LENGTH] for name, stem in stems.items()}
    count = Counter(plain.values())
    clashing = [name for name, key in plain.items() if count[key] > 1]
    hashed = {name: hashlib.sha256(name.encode()).hexdigest()[:12] for name in clashing}
    return {name: f"{key}-{hashed[name]}" if name in hashed else key for name, key in plain.items()}
