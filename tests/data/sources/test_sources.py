"""The same photographs with the same captions, brought in every form that there is, make the same shards."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_files import jpeg, ledger, make, stored
from source_files import parquet, put, tar_of

from genpipe.stages import shard

COUNT = 24
CAPTIONS = [f"photo number {number}" for number in range(COUNT)]
Files = dict[str, bytes | str]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that has the photographs."""
    folder = tmp_path_factory.mktemp("web")
    put(folder, {f"{number}.jpg": jpeg(number) for number in range(COUNT)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def as_folder(numbers: range) -> Files:
    return {f"{n}.jpg": jpeg(n) for n in numbers} | {f"{n}.txt": CAPTIONS[n] for n in numbers}


def as_tar(numbers: range) -> Files:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in numbers:
            for suffix, content in (("jpg", jpeg(n)), ("txt", CAPTIONS[n].encode())):
                info = tarfile.TarInfo(f"{n:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return {"00000.tar": buffer.getvalue()}


def as_parquet(numbers: range) -> Files:
    images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in numbers]
    return {"data.parquet": parquet({"image": images, "text": [CAPTIONS[n] for n in numbers]})}


def as_urls(numbers: range, web: str) -> Files:
    return {"urls.csv": "\n".join(["url,caption", *(f"{web}/{n}.jpg,{CAPTIONS[n]}" for n in numbers)])}


@pytest.fixture
def brought(store_uri: str, web: str) -> dict[str, dict[str, Any]]:
    """The settings of each kind of source, its files in place in a folder or under S3."""
    every = range(COUNT)
    forms = {"folder": as_folder(every), "webdataset": as_tar(every), "parquet": as_parquet(every)}
    forms["urls"] = as_urls(every, web)
    for kind, files in forms.items():
        put(f"{store_uri}/{kind}", files)
    put(f"{store_uri}/first", as_folder(range(5)))
    put(f"{store_uri}/rest", as_tar(range(5, COUNT)))
    settings: dict[str, dict[str, Any]] = {kind: {"kind": kind, "path": f"{store_uri}/{kind}"} for kind in forms}
    settings["urls"]["fetch"] = {"allow_private": True}
    first = {"kind": "folder", "path": f"{store_uri}/first"}
    rest = {"kind": "webdataset", "path": f"{store_uri}/rest"}
    return settings | {"mix": {"kind": "mix", "sources": {"first": first, "rest": rest}}}


def test_every_kind_of_source_makes_the_same_shards(brought: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    made: dict[str, dict[str, str]] = {}
    for kind, source in brought.items():
        cfg = shard.Config.model_validate({"source": source, "image_size": 32, "part_size": 7, "heldout_fraction": 0.4})
        out = tmp_path / f"shards-{kind}"
        manifest = make(cfg, out)
        assert manifest.metrics["samples_in"] == COUNT and manifest.metrics["rejected"] == 0, kind
        made[kind] = {row["captions"][0]: row["sha256"] for row in stored(out).values()}
    assert sorted(made["folder"]) == sorted(CAPTIONS)
    for kind, rows in made.items():
        assert rows == made["folder"], kind


def test_a_key_that_a_table_has_twice_is_stored_once(tmp_path: Path) -> None:
    columns = {"image": [jpeg(n) for n in range(6)], "text": CAPTIONS[:6], "id": ["a", "b", "a", "c", "d", ""]}
    put(tmp_path / "in", {"t.parquet": parquet(columns)})
    source = {"kind": "parquet", "path": str(tmp_path / "in"), "key": "id"}
    make(shard.Config.model_validate({"source": source, "image_size": 32, "heldout_fraction": 0.4}), tmp_path / "out")
    assert sorted(stored(tmp_path / "out")) == ["a", "b", "c", "d", "t-00000005"]
    assert stored(tmp_path / "out")["a"]["captions"] == [CAPTIONS[0]]
    assert [(row["key"], row["reason"], row["source"]) for row in ledger(tmp_path / "out")] == [
        ("a", "duplicate_key", "t.parquet:2")
    ]


def test_no_kind_of_image_is_overlooked(tmp_path: Path) -> None:
    """Browsers save JPEG as .jfif; what no library here reads is a reject."""
    picture = Image.open(io.BytesIO(jpeg(0)))
    formats = {
        "jfif": "JPEG",
        "tif": "TIFF",
        "TIFF": "TIFF",
        "avif": "AVIF",
        "jp2": "JPEG2000",
        "ppm": "PPM",
        "bmp": "BMP",
    }
    files: Files = {"0.heic": b"\0\0\0\x18ftypheic", "0.txt": "not to be read"}
    for number, (suffix, format) in enumerate(formats.items(), start=1):
        buffer = io.BytesIO()
        picture.save(buffer, format)
        files |= {f"{number}.{suffix}": buffer.getvalue(), f"{number}.txt": f"a picture in {suffix}"}
    put(tmp_path / "folder", files)
    put(tmp_path / "webdataset", {"0.tar": tar_of(*((name, as_bytes(content)) for name, content in files.items()))})
    for kind in ("folder", "webdataset"):
        source = {"kind": kind, "path": str(tmp_path / kind)}
        out = tmp_path / f"shards-{kind}"
        make(shard.Config.model_validate({"source": source, "image_size": 32, "heldout_fraction": 0.6}), out)
        assert sorted(row["captions"][0] for row in stored(out).values()) == sorted(
            f"a picture in {s}" for s in formats
        )
        assert [row["reason"] for row in ledger(out)] == ["unsupported"]


def as_bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content
