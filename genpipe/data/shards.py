"""Ordinary WebDataset tars, each with a parquet index beside it, and the ledger of rejects.

A sample is `{key}.jpg` (or png, webp), `{key}.txt` (its first caption) and `{key}.json` (all the rest). The
index holds the place of each image in the tar and the captions, so that reading a sample is one `pread` and
reading captions touches no tar. The same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from genpipe.data.images import SUFFIX, ImageFormat
from genpipe.data.samples import Reject

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
INDEX_SUFFIX = ".index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("group", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("length", pa.int64()),  # of the image in bytes
        ("format", pa.string()),
    ]
)
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "reason", "detail")])
_KEY = re.compile(r"[A-Za-z0-9_-]+")  # a dot would end the key for WebDataset, a slash would leave the folder


def split_of(group: str, *, heldout_fraction: float, seed: int) -> Split:
    """The side on which a group falls: by its hash, so that it stays there as data are added."""
    point = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8], "big") / 2**64
    return "heldout" if point < heldout_fraction else "train"


@dataclass
class ShardWriter:
    """Writes a split of a part: `{split}-{part:05d}-{k:02d}.tar`, a new k at `max_samples` or `max_bytes`.

    Use as a context manager. A shard appears under its name when it is whole, its index after it.
    """

    folder: Path
    split: Split
    part: int
    max_samples: int
    max_bytes: int
    shards: list[dict[str, Any]] = field(default_factory=list, init=False)  # name, split, samples, bytes
    _tar: tarfile.TarFile | None = field(default=None, init=False)
    _rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def write(
        self,
        key: str,
        *,
        group: str,
        image: bytes,
        format: ImageFormat,
        captions: Sequence[str],
        meta: Mapping[str, Any],
    ) -> None:
        """Append a sample. `key` must be new to the part and made of letters, digits, `-` and `_`."""
        assert _KEY.fullmatch(key) and captions, f"sources give clean keys and at least one caption: {key!r}"
        facts = {"key": key, "group": group, "captions": list(captions), "meta": dict(meta)}
        described = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
        if self._tar is not None and self._full(len(image) + len(described)):
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        offset = _add(self._tar, f"{key}.{SUFFIX[format]}", image)
        _add(self._tar, f"{key}.txt", captions[0].encode())
        _add(self._tar, f"{key}.json", described)
        row = {"key": key, "group": group, "captions": list(captions)}
        self._rows.append(row | {"offset": offset, "length": len(image), "format": format})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is None:
            return
        if error is None:
            self._finish()
        else:
            self._tar.close()
            self._partial.unlink()

    @property
    def _name(self) -> str:
        return f"{self.split}-{self.part:05d}-{len(self.shards):02d}"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._name}.tar.partial"

    def _full(self, coming: int) -> bool:
        assert self._tar is not None
        return len(self._rows) >= self.max_samples or self._tar.offset + coming > self.max_bytes

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        path = self.folder / f"{self._name}.tar"
        os.replace(self._partial, path)
        write_table(pa.Table.from_pylist(self._rows, INDEX_SCHEMA), self.folder / f"{self._name}{INDEX_SUFFIX}")
        facts = {
            "name": self._name,
            "split": self.split,
            "samples": len(self._rows),
            "bytes": path.stat().st_size,
        }
        self.shards.append(facts)
        self._tar, self._rows = None, []


def write_rejects(folder: Path, rejects: Sequence[Reject], *, part: int) -> None:
    """The part's ledger, `rejects-{part:05d}.parquet`; written also when it is empty."""
    table = pa.Table.from_pylist([vars(reject) for reject in rejects], REJECT_SCHEMA)
    write_table(table, folder / f"rejects-{part:05d}.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    """Write parquet so that `path` is either whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without owner or time, so that bytes depend on content only; the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
