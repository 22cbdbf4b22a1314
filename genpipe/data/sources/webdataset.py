"""WebDataset tars of images and captions, as img2dataset (or genpipe) writes them.

A tar may come from anywhere, so it is read and never extracted: of a sample only the image, `.txt`, `.json` and the
members that the settings name are looked at, links are not followed, and no pickle is opened.
"""

from __future__ import annotations

import io
import itertools
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from genpipe.config import Config, Location
from genpipe.data.classes import is_number
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
    list_files,
    member_key,
    part_names,
    unique_keys,
)
from genpipe.data.sources.records import Record, parse_json
from genpipe.storage import Entry, check_key, local_path, open_object

LOCAL_BLOCK, REMOTE_BLOCK = 2**18, 2**23  # bytes a read
PEEKED = 20
LACKING = {
    "no_image": "an image",
    "dotted_key": "an image",
    "no_caption": "a caption",
    "no_label": "a class",
    "no_condition": "a conditioning image",
}
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class WebDatasetConfig(Config):
    """Samples are the members that share a name up to its first dot: an image with a `.json`, a `.txt`, or both."""

    kind: Literal["webdataset"]
    path: Location = Field(
        min_length=1, description="tar, folder of tars, pattern such as {000..123}.tar, or s3:// of these"
    )
    captions: CaptionFields = Field(
        {}, description="fields of .json (txt: the .txt), or templates ('a photo of a {label}'), to weights; default: "
        "text, caption, captions, else prompt or description, else .txt",
    )  # fmt: skip
    label: str = Field("", description="suffix of the members with the class (cls), or a field of .json: a number, or "
                                       "one of `classes`")  # fmt: skip
    classes: tuple[str, ...] = Field((), description="names of the classes, in the order of their numbers")
    condition: str = Field("", description="suffix of the members with a conditioning image, as depth.png, or depth")
    group: str = Field("", description="field of .json that names the subject; default: each sample is its own")
    slice_bytes: int = Field(4 * 2**30, gt=0, description="a larger tar is read as several parts")

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        check_templates(self.captions, label=self.label)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name is listed twice; each class needs its own")
        return self


@dataclass(frozen=True)
class _Slice:
    """The samples whose first member starts at a byte from `start` up to `stop`."""

    entry: Entry
    start: int
    stop: int


@dataclass
class _Group:
    """The members of a sample: what is used of them, and the suffixes of the others."""

    name: str
    offset: int
    files: dict[str, bytes] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    image: str = ""  # its suffix
    condition: str = ""  # likewise
    other_images: list[str] = field(default_factory=list)  # their suffixes
    too_large: str = ""  # a member that is


class WebDatasetSource:
    """A part is a tar, or a slice of a large one, whose headers are walked from the tar's start.

    Key: the tar's name and the sample's. Captions: those of the `.json`, else the `.txt` as one caption. Group:
    the sample's key, or the field that is named for it. Members that are not used are named in the meta; images that
    are not are rejects.

    Raises ValueError for a missing path, one without tars, and if the first samples have no image or caption.
    """

    def __init__(self, cfg: WebDatasetConfig, *, setting: str) -> None:
        self.cfg = cfg
        self.storage, self._tars = list_files(cfg.path, suffixes={".tar"}, setting=f"{setting}.path", what="tars")
        self._keys = unique_keys([tar.key for tar in self._tars], dashes=False)
        step = cfg.slice_bytes
        self._slices = [
            _Slice(tar, start, start + step if start + step < tar.size else sys.maxsize)
            for tar in self._tars
            for start in range(0, max(tar.size, 1), step)
        ]
        self._check_first(setting)

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: the tars, or slices of them, in the order of their names."""
        return part_names(len(self._slices))

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The samples of a part. Where a tar is damaged, what precedes is used and the rest is one Reject."""
        slice = self._slices[int(part)]
        seen: set[str] = set()
        for item in self._groups(slice):
            if isinstance(item, Reject):
                yield item
            elif item.offset >= slice.start:
                yield from self._items(item, tar=slice.entry.key, is_new=item.name not in seen)
            if isinstance(item, _Group):
                seen.add(item.name)

    def classes(self) -> tuple[str, ...] | None:
        """The names that are set; None where labels are numbers and no names are set."""
        return self.cfg.classes or (None if self.cfg.label else ())

    def digest(self) -> str:
        """sha256 over the name, size and content (or ETag) of each tar."""
        return digest_entries(self.storage, self._tars)

    def _groups(self, slice: _Slice) -> Iterator[_Group | Reject]:
        """Every sample from the tar's start to the slice's end, those before the slice without content."""
        tar = slice.entry.key
        group: _Group | None = None
        file = open_object(
            self.storage, slice.entry, block=LOCAL_BLOCK if local_path(self.storage.uri) else REMOTE_BLOCK
        )
        try:
            for info, data in _members(file):
                if fault := _fault(info):
                    if slice.start <= info.offset < slice.stop:
                        yield Reject("", f"{tar}/{info.name}", "unsafe_member", fault)
                    continue
                key, suffix = _split(info.name)
                if info.isdir() or not key:
                    continue
                if group is None or group.name != key or suffix in group.files:
                    if group is not None:
                        yield group
                    if info.offset >= slice.stop:
                        return
                    group = _Group(key, info.offset)
                self._add(group, suffix, size=info.size, data=data if group.offset >= slice.start else bytes)
        except (_DamagedTar, OSError) as error:
            if isinstance(error, OSError) and blames_storage(error, storage=self.storage):
                raise
            key = self._key(tar, group.name) if group else ""
            reason = "truncated" if isinstance(error, _DamagedTar) else "unreadable"
            yield Reject(key, tar, reason, f"{error}; the sample there and what follows cannot be read")
        else:
            if group is not None:
                yield group
            if trailing := _trailing(file):
                yield Reject("", tar, "trailing_data", trailing)

    def _add(self, group: _Group, suffix: str, *, size: int, data: Callable[[], bytes]) -> None:
        """Take a member into its sample if it is used."""
        cfg = self.cfg
        is_condition = bool(cfg.condition) and not group.condition and _is_condition(suffix, cfg.condition)
        is_image = not is_condition and not group.image and f".{suffix}" in IMAGE_SUFFIXES
        if not is_condition and not is_image and suffix not in ("txt", "json", cfg.label):
            is_other_image = f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES and not suffix.startswith("condition.")
            (group.other_images if is_other_image else group.ignored).append(suffix)
        elif size > MAX_FILE_BYTES:
            group.too_large = group.too_large or suffix
        else:
            group.files[suffix] = data()
            group.image = suffix if is_image else group.image
            group.condition = suffix if is_condition else group.condition

    def _items(self, group: _Group, *, tar: str, is_new: bool) -> Iterator[Sample | Reject]:
        """The sample, and a reject for every image in it that has no place there."""
        has_dots = not group.image and bool(group.other_images)
        if not has_dots:
            yield self._sample(group, tar=tar, is_new=is_new)
        base = group.name.rpartition("/")[2]
        for suffix in group.other_images:
            name = f"{base}.{suffix}"
            stem, _, end = name.rpartition(".")
            renamed = f"{stem.replace('.', '_')}{'' if '.' in stem else '_2'}.{end}"
            ends = f"a sample's key ends at the first dot of a name, so that {name} is the image {suffix} of {base}"
            remedy = f"rename it, and what belongs to it, as {renamed}"
            if not has_dots:
                ends += f", which has {base}.{group.image}"
                remedy += f", or set condition to {suffix!r} if it is a conditioning image"
            detail = f"{ends}; {remedy}"
            reason = "dotted_key" if has_dots else "second_image"
            yield Reject(self._key(tar, f"{group.name}.{suffix}"), f"{tar}/{group.name}.{suffix}", reason, detail)

    def _sample(self, group: _Group, *, tar: str, is_new: bool) -> Sample | Reject:
        key, where = self._key(tar, group.name), f"{tar}/{group.name}"
        members = ", ".join([*group.files, *group.other_images, *group.ignored])
        if not is_new:
            detail = f"an earlier sample of the tar has the key, or its members ({members}) do not stand together"
            return Reject(key, where, "duplicate_key", detail)
        if group.too_large:
            return Reject(key, where, "too_large", f"{group.too_large} is larger than {MAX_FILE_BYTES} bytes")
        if not group.image:
            return Reject(key, where, "no_image", f"its members are {members}; pickles are never read")
        try:
            record = parse_json(group.files["json"], nan_as_null=True) if "json" in group.files else {}
        except ValueError as error:
            return Reject(key, where, "bad_metadata", f".json: {error}")
        try:
            label = self._label(record, group)
        except ValueError as error:
            return Reject(key, where, "bad_label", str(error))
        if self.cfg.label and label is None:
            return Reject(key, where, "no_label", f"no {self.cfg.label}; its members are {members}")
        if self.cfg.condition and not group.condition:
            return Reject(key, where, "no_condition", f"no {self.cfg.condition}; its members are {members}")
        try:
            captions, weights = self._captions(record, group.files.get("txt"), label=label)
        except ValueError as error:
            return Reject(key, where, "bad_caption", str(error))
        if not captions:
            looked = ", ".join(self.cfg.captions or (*caption_columns({}), "txt"))
            return Reject(key, where, "no_caption", f"none of {looked} has one; its members are {members}")
        used = {*caption_columns(self.cfg.captions), WEIGHTS_FIELD, self.cfg.group, self.cfg.label}
        meta = {name: value for name, value in record.items() if name not in used}
        meta |= {"file_name": f"{where}.{group.image}"} | ({"ignored": group.ignored} if group.ignored else {})
        subject = record.get(self.cfg.group) if self.cfg.group else None
        return Sample(
            key,
            key if subject in (None, "") else str(subject),
            group.files[group.image],
            captions,
            meta,
            caption_weights=weights,
            label=label,
            condition=group.files[group.condition] if group.condition else None,
        )

    def _label(self, record: Record, group: _Group) -> str | None:
        """The name of the class. Raises ValueError for one that is neither a number nor one of `classes`."""
        member = group.files.get(self.cfg.label)
        label = label_of(record.get(self.cfg.label) if member is None else member.decode("utf-8-sig"))
        if label is None or label in self.cfg.classes or (is_number(label) and not self.cfg.classes):
            return label
        if is_number(label) and int(label) < len(self.cfg.classes):
            return self.cfg.classes[int(label)]
        raise ValueError(
            f"the class {label!r} is neither a number nor one of source.classes; list the names of all classes there"
        )

    def _captions(
        self, record: Record, text: bytes | None, *, label: str | None
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        if "txt" in self.cfg.captions and text is not None:
            record = record | {"txt": text.decode("utf-8-sig")}
        captions, weights = captions_of(record, wanted=self.cfg.captions, label=label)
        if not captions and not self.cfg.captions and text is not None:
            return clean_captions([text.decode("utf-8-sig")]), ()
        return captions, weights

    def _key(self, tar: str, name: str) -> str:
        return member_key(f"{self._keys[tar]}-{name}")

    def _check_first(self, setting: str) -> None:
        """Refuse tars whose first samples all lack an image or a caption: a wrong setting, found before any work."""
        items = list(itertools.islice(self.read("00000"), PEEKED))
        lacking_by = {
            "no_image": "an image",
            "dotted_key": "an image",
            "no_caption": "a caption",
            "no_label": "a class",
        }
        for reason, lacking in {**lacking_by, "no_condition": "a conditioning image"}.items():
            if items and all(isinstance(item, Reject) and item.reason == reason for item in items):
                first = items[0]
                assert isinstance(first, Reject)
                raise ValueError(
                    f"{setting}.path: none of the first {len(items)} samples of {self._tars[0].key} has {lacking}: of "
                    f"{first.source}, {first.detail}; look at the tars and at {setting}.captions"
                )


class _DamagedTar(Exception):
    """A tar that cannot be read any further."""


def _members(file: io.BufferedReader) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The members of a tar, each with a function that reads its content; leaves `file` at the tar's end marker.

    Raises _DamagedTar where headers or content cannot be read, or the end marker is missing.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # which would grow with the tar
                if tar.offset <= info.offset:  # a negative size
                    raise _DamagedTar(f"the header at byte {info.offset} is damaged")
                yield info, partial(_content, file, info)
            end = tar.offset
    except (OSError, _DamagedTar):
        raise
    except Exception as error:  # of damaged headers tarfile raises anything: ReadError, ValueError, RecursionError, ...
        place = file.tell()
        file.seek(0)
        if file.read(6).startswith(COMPRESSED_STARTS):
            raise _DamagedTar("it is compressed; unpack it") from None
        raise _DamagedTar(f"{error} (at byte {place})") from None
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        raise _DamagedTar(f"it ends at byte {end} without a tar's end marker")
    if mark.strip(b"\0"):
        raise _DamagedTar(f"the header at byte {end} is damaged")


def _content(file: io.BufferedReader, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    content = file.read(info.size)
    if len(content) < info.size:
        raise _DamagedTar(f"it ends within {info.name}")
    return content


def _trailing(file: io.BufferedReader) -> str:
    """What is wrong with the bytes after a tar's end marker, where `file` is; "" if they are zeros."""
    start = file.tell()
    while block := file.read(LOCAL_BLOCK):
        if block.strip(b"\0"):
            return f"data follow the end marker at byte {start} and are not read; were tars joined with cat? Split them"
    return ""


def _fault(info: tarfile.TarInfo) -> str:
    """Why a member is not read, or "" for an ordinary file or folder."""
    try:
        info.name.encode()
        check_key(info.name)
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    except ValueError:
        return "the name leads out of the tar's folder"
    if info.issym() or info.islnk():
        return f"a link to {info.linkname}"
    return "" if info.isdir() or (info.isreg() and not info.issparse()) else "a device, pipe or sparse file"


def _split(name: str) -> tuple[str, str]:
    """The sample's name (up to the first dot of the last component) and the suffix; "" for what belongs to none."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else ("", "")


def _is_condition(suffix: str, wanted: str) -> bool:
    """Whether a member's suffix is the one that is wanted, with or without that of an image format."""
    return suffix == wanted or (
        suffix.rpartition(".")[0] == wanted and f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES
    )
