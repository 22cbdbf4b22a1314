"""Ordinary WebDataset tars, each with a parquet index beside it, and the ledger of rejects.

A sample is `{key}.jpg` (or png, webp, ...), `{key}.txt` (its first caption) and `{key}.json` (all the rest), with
`{key}.cls` (the index of its class) and `{key}.condition.png` (its conditioning image) where it has them. The
index holds the place of each image in the tar, the captions and the class, so that reading a sample is one `pread`
and reading captions touches no tar. The same samples give the same bytes.

The index decides which samples exist: a tar may hold members that the index no longer names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.data.images import SUFFIX
from genpipe.data.samples import Reject

Split = Literal["train", "combinations", "heldout"]
"""Trained on; held out of a group that others are trained on; held out with its whole group."""

SPLITS: tuple[Split, ...] = ("train", "combinations", "heldout")
INDEX_SUFFIX = ".index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("group", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("length", pa.int64()),  # of the image in bytes
        ("format", pa.string()),
        ("source", pa.string()),  # its name in a mix, else empty
        ("caption_weights", pa.list_(pa.float32())),  # one a caption; null where all are as likely
        ("height", pa.int32()),  # of the upright image in pixels
        ("width", pa.int32()),
        ("sha256", pa.string()),  # of the image's bytes in the tar, in hex
        ("label", pa.int32()),  # its place in the list `classes` of the artifact's meta; -1 without one
        ("condition_offset", pa.int64()),  # as of the image; null without a conditioning image
        ("condition_length", pa.int64()),
        ("condition_format", pa.string()),
        ("condition_sha256", pa.string()),
    ]
)
NO_LABEL = -1
CONDITION = "condition"
STATISTICS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int64()),
        ("captions", pa.int64()),
        ("caption_chars", pa.int64()),
        ("pixels", pa.int64()),  # of all its images
        ("image_bytes", pa.int64()),
        ("bytes", pa.int64()),  # of the tar
    ]
)
STATISTICS = "statistics.parquet"
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "reason", "detail")])
_KEY = re.compile(r"[A-Za-z0-9_-]+")  # a dot would end the key for WebDataset, a slash would leave the folder


def split_of(group: str, *, heldout_fraction: float, combinations_fraction: float = 0.0, seed: int) -> Split:
    """The split of a group: by its hash, so that it never changes as data are added.

    A group of `combinations` gives one sample up, if it has several; `data.combinations` says which. Which groups
    are held out does not depend on `combinations_fraction`.
    """
    point = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8], "big") / 2**64
    if point < heldout_fraction:
        return "heldout"
    return "combinations" if point < heldout_fraction + combinations_fraction else "train"


@dataclass
class ShardWriter:
    """Writes a split of a part: `{split}-{part:05d}-{k:02d}.tar`, a new k at `max_samples` or `max_bytes`.

    Use as a context manager. A shard appears under its name once it is complete, its index after it.
    """

    folder: Path
    split: Split
    part: int
    max_samples: int
    max_bytes: int
    shards: list[dict[str, Any]] = field(default_factory=list, init=False)  # what `statistics` says of each
    _tar: tarfile.TarFile | None = field(default=None, init=False)
    _rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def write(
        self,
        key: str,
        *,
        group: str,
        image: bytes,
        format: str,
        height: int,
        width: int,
        captions: Sequence[str],
        caption_weights: Sequence[float] = (),
        source: str = "",
        label: int = NO_LABEL,
        condition: bytes | None = None,
        condition_format: str = "",
        meta: Mapping[str, Any],
    ) -> None:
        """Append a sample. `key` must be new to the part and made of letters, digits, `-` and `_`.

        `format` and `condition_format` are of `images.SUFFIX`; `height` and `width` are those of the upright image,
        which a conditioning image shares unless both are kept as the source has them.
        """
        assert _KEY.fullmatch(key) and captions, f"sources give clean keys and at least one caption: {key!r}"
        assert len(caption_weights) in (0, len(captions)), "one weight a caption, or none"
        facts: dict[str, Any] = {"key": key, "group": group, "source": source, "captions": list(captions)}
        facts["caption_weights"] = list(caption_weights) or None
        described = json.dumps({**facts, "meta": dict(meta)}, ensure_ascii=False, sort_keys=True).encode()
        if self._tar is not None and self._full(len(image) + len(described) + len(condition or b"")):
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        offset = _add(self._tar, f"{key}.{SUFFIX[format]}", image)
        _add(self._tar, f"{key}.txt", captions[0].encode())
        _add(self._tar, f"{key}.json", described)
        if label != NO_LABEL:
            _add(self._tar, f"{key}.cls", str(label).encode())
        place = _place(offset, image, format=format) | {"height": height, "width": width, "label": label}
        if condition is not None:
            offset = _add(self._tar, f"{key}.{CONDITION}.{SUFFIX[condition_format]}", condition)
            of_condition = _place(offset, condition, format=condition_format)
            place |= {f"{CONDITION}_{name}": value for name, value in of_condition.items()}
        self._rows.append(facts | place)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is None:
            return
        try:
            if error is None:
                self._finish()
        finally:
            if self._tar is not None:  # closing writes the end of the archive, for which the disk may be too full
                with suppress(OSError):
                    self._tar.close()
                self._partial.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """The shard that the last sample went to."""
        return f"{self.split}-{self.part:05d}-{len(self.shards):02d}"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self.name}.tar.partial"

    def _full(self, coming: int) -> bool:
        assert self._tar is not None
        return len(self._rows) >= self.max_samples or self._tar.offset + coming > self.max_bytes

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        path = self.folder / f"{self.name}.tar"
        os.replace(self._partial, path)
        index = pa.Table.from_pylist(self._rows, INDEX_SCHEMA)
        write_table(index, self.folder / f"{self.name}{INDEX_SUFFIX}")
        facts = statistics(self.name, index, tar_bytes=path.stat().st_size)
        self._tar, self._rows = None, []
        self.shards.append(facts)


def _place(offset: int, image: bytes, *, format: str) -> dict[str, Any]:
    """An image's columns of the index."""
    digest = hashlib.sha256(image).hexdigest()
    return {"offset": offset, "length": len(image), "format": format, "sha256": digest}


def split_of_shard(name: str) -> Split:
    """The split that a shard holds."""
    return cast(Split, name.split("-")[0])


def statistics(name: str, index: pa.Table, *, tar_bytes: int) -> dict[str, Any]:
    """What STATISTICS_SCHEMA says of a shard, from its index; as JSON values."""
    captions = pc.list_flatten(index["captions"])
    pixels = pc.multiply(index["height"].cast(pa.int64()), index["width"].cast(pa.int64()))
    sums = {"caption_chars": pc.utf8_length(captions), "pixels": pixels, "image_bytes": index["length"]}
    return {
        "name": name,
        "split": split_of_shard(name),
        "samples": len(index),
        "captions": len(captions),
        **{column: pc.sum(values).as_py() or 0 for column, values in sums.items()},
        "bytes": tar_bytes,
    }


def write_statistics(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """`statistics.parquet`: a row for each shard, by name."""
    rows = sorted(shards, key=lambda shard: str(shard["name"]))
    write_table(pa.Table.from_pylist(rows, STATISTICS_SCHEMA), folder / STATISTICS)


def write_rejects(folder: Path, rejects: Sequence[Reject], *, name: str) -> None:
    """A ledger, `rejects-{name}.parquet`; written also when it is empty."""
    table = pa.Table.from_pylist([vars(reject) for reject in rejects], REJECT_SCHEMA)
    write_table(table, folder / f"rejects-{name}.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    """Write parquet so that `path` is either whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_index(path: Path) -> pa.Table:
    """An index with all columns of INDEX_SCHEMA; those that it is too old to have are null."""
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names}
    return pa.table([columns.get(f.name, pa.nulls(len(table), f.type)) for f in INDEX_SCHEMA], schema=INDEX_SCHEMA)


def rewrite_shard(name: str, folder: Path, out: Path, *, without: Collection[str]) -> dict[str, Any]:
    """Rewrite the shard `name` of `folder` to `out` without the keys in `without`; its statistics.

    Members that the index no longer names are dropped as well. All other bytes are copied as they are.
    """
    index = read_index(folder / f"{name}{INDEX_SUFFIX}")
    keys = index["key"].to_pylist()
    rows = [row for row, key in enumerate(keys) if key not in without]
    kept = {keys[row] for row in rows}
    offsets: dict[str, int] = {}
    conditions: dict[str, int] = {}
    with (
        tarfile.open(folder / f"{name}.tar") as old,
        tarfile.open(out / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            key, *suffixes = member.name.split(".")
            if key in kept:
                content = old.extractfile(member) if member.isreg() else None
                assert content is not None, f"{name}.tar: {member.name} is not of our making"
                offset = _add(new, member.name, content.read())
                offsets.setdefault(key, offset)  # the image is a sample's first member
                if suffixes[0] == CONDITION:
                    conditions[key] = offset
    index = index.take(pa.array(rows, pa.int64()))
    for column, found in (("offset", offsets), (f"{CONDITION}_offset", conditions)):
        place = INDEX_SCHEMA.get_field_index(column)
        moved = pa.array([found.get(keys[row]) for row in rows], pa.int64())
        index = index.set_column(place, INDEX_SCHEMA.field(place), moved)
    write_table(index, out / f"{name}{INDEX_SUFFIX}")
    return statistics(name, index, tar_bytes=(out / f"{name}.tar").stat().st_size)


def check_shard(name: str, folder: Path) -> Iterator[str]:
    """Faults of a shard, a sentence each: every row of the index is checked against the tar's bytes."""
    try:
        rows = read_index(folder / f"{name}{INDEX_SUFFIX}").to_pylist()
        with tarfile.open(folder / f"{name}.tar") as tar:
            members = {member.offset_data: member for member in tar}
    except Exception as error:  # Arrow raises any exception for a damaged file
        yield f"{name}: cannot be read: {error}"
        return
    with (folder / f"{name}.tar").open("rb") as file:
        for row in rows:
            of_condition: dict[str, Any] = {"key": f"{row['key']}.{CONDITION}"}
            of_condition |= {what: row[f"{CONDITION}_{what}"] for what in ("offset", "length", "format", "sha256")}
            for image in (row, of_condition) if of_condition["offset"] is not None else (row,):
                if fault := _fault(image, members.get(image["offset"]), file):
                    yield f"{name}: {row['key']}: {fault}"


def _fault(row: Mapping[str, Any], member: tarfile.TarInfo | None, tar: IO[bytes]) -> str:
    """What is wrong with an image that the index places at `member`, or ""."""
    expected = f"{row['key']}.{SUFFIX.get(row['format'], row['format'])}"
    if member is None:
        return f"no member of the tar begins at byte {row['offset']}, where the index has {expected}"
    if not member.isreg() or member.name != expected:
        return f"the tar has {member.name} where the index has {expected}"
    if member.size != row["length"]:
        return f"{member.name} has {member.size} bytes, the index says {row['length']}"
    tar.seek(row["offset"])
    if row["sha256"] and hashlib.sha256(tar.read(row["length"])).hexdigest() != row["sha256"]:
        return f"the bytes of {member.name} differ from the sha256 in the index"
    return ""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without owner or time, so that bytes depend on content only; the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
