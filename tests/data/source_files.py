"""What the tests of the sources share: small pictures, tables and tars of them, files put and read whole."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import TypeAdapter

from genpipe.data.samples import Reject, Sample
from genpipe.data.sources import Source, SourceConfig, open_source
from genpipe.storage import open_storage

Member = tuple[str, bytes]


def png(color: str | int = "red") -> bytes:
    """A picture of 8 pixels: of a named color, or one of many by number."""
    rgb = (color % 256, color // 256 % 256, 77) if isinstance(color, int) else color
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), rgb).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """A table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def tar_of(*members: Member | tarfile.TarInfo) -> bytes:
    """A tar of files, as name and content, or of members given whole."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def described(key: str, caption: str | None = "a cat", **fields: Any) -> list[Member]:
    """A sample as img2dataset writes it."""
    record = {"caption": caption, "url": f"http://host/{key}", "key": key, "status": "success", **fields}
    members = [(f"{key}.jpg", png(int(key) if key.isdecimal() else 0)), (f"{key}.json", json.dumps(record).encode())]
    return [*members, (f"{key}.txt", caption.encode())] if caption else members


def put(uri: object, files: dict[str, bytes | str]) -> None:
    """Write files into a folder, or under `s3://`."""
    storage = open_storage(str(uri))
    for name, content in files.items():
        storage.write(name, content.encode() if isinstance(content, str) else content)


def source(kind: str, path: object, *, part_size: int = 100, **options: Any) -> Source:
    """A source opened as a configuration file would have it."""
    settings = {"kind": kind, "path": str(path)} | options
    return open_source(TypeAdapter(SourceConfig).validate_python(settings), part_size=part_size)


def read_all(opened: Source) -> list[Sample | Reject]:
    return [item for part in opened.parts() for item in opened.read(part)]


def samples(opened: Source) -> dict[str, Sample]:
    return {item.key: item for item in read_all(opened) if isinstance(item, Sample)}


def rejects(opened: Source) -> list[tuple[str, str]]:
    return [(item.reason, item.source) for item in read_all(opened) if isinstance(item, Reject)]
